"""Quantize a checkpoint: python -m quantize MODEL OUT --scheme int4"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmmamba.checkpoint import load_model, resolve_checkpoint
from mmmamba.cost import count_parameters
from mmmamba.info import DTYPES
from quantize.api import Quantizer, check_target, save_quantized
from quantize.schemes import SCHEMES


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m quantize",
        description="Write a checkpoint whose linear layers are in 8 or 4 bits; load_model and --model read it.",
    )
    p.add_argument("model", metavar="MODEL", help="checkpoint directory, Hub id or bundled name")
    p.add_argument("out", metavar="OUT", type=Path, help="directory to write")
    p.add_argument("--scheme", required=True, choices=tuple(SCHEMES), help="bnb-*: by bitsandbytes, if it is installed")
    p.add_argument("--group-size", type=int, default=None, metavar="N", help="weights to a scale, for int4 (64)")
    p.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="of what stays as it is (%(default)s)")
    p.add_argument("--revision", default=None, help="revision of a model on the Hub")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        quantizer = Quantizer(args.scheme, args.group_size)
        directory = resolve_checkpoint(args.model, revision=args.revision)
        check_target(args.out, directory)  # before the work, not after it
        model = load_model(directory, dtype=DTYPES[args.dtype], quantize=quantizer)
        source = Path(args.model).resolve().name if Path(args.model).is_dir() else args.model
        weights = save_quantized(model, args.out, source=source)
    except (ValueError, OSError) as error:
        print(f"quantize: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    size = weights.stat().st_size
    full = count_parameters(model.config).total * DTYPES[args.dtype].itemsize
    print(f"{weights}: {size / 1e6:,.1f} MB; in {args.dtype} the parameters take {full / 1e6:,.1f} MB")
    if errors := quantizer.errors:
        worst = max(errors, key=lambda name: errors[name])
        mean = sum(errors.values()) / len(errors)
        print(f"relative error of a weight: {mean:.2%} on average, {errors[worst]:.2%} at most ({worst})")
    elif quantizer.scheme.method == "packed":
        print("nothing was rounded: every weight is stored on a grid of this scheme already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
