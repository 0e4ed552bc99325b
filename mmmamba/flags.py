"""Flags that say where a model runs and what its weights are held in, and what they come to on this machine."""

from __future__ import annotations

import argparse
import re
import sys
from typing import NamedTuple

import torch

from mmmamba.info import DTYPES
from mmmamba.place import default_device, default_dtype

SCHEMES = ("int8", "int4", "bnb-int8", "bnb-nf4")  # of `quantize`, which is imported when one is asked for


class UsageError(ValueError):
    """A flag or a value on the command line that cannot be used."""


def place_arguments(parser: argparse.ArgumentParser) -> None:
    """Device and precision."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; default: cuda where there is one")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", *DTYPES, *SCHEMES),
        help="how weights are held; auto: as they are stored where that loses nothing, else 16 or 32 bits",
    )
    # Older names, of the two that a precision stands for; together they say what packed weights are multiplied in.
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="what is computed in")
    parser.add_argument("--quantize", default=None, choices=SCHEMES, help="--precision by its older name")


class Place(NamedTuple):
    """Where a model runs, what it computes in, and what its weights are packed by, if they are."""

    device: torch.device
    dtype: torch.dtype
    quantize: str | None


def place_of(args: argparse.Namespace) -> Place:
    """From the flags of `place_arguments`; `auto` is what `mmmamba.place` takes and, for weights, `quantize.precision`,
    whose reason goes to stderr.

    Raises: UsageError; ValueError or OSError if the model is not to be had.
    """
    name = str(default_device()) if args.device == "auto" else args.device
    if not re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", name):
        raise UsageError(f'--device "{name}" is not known; use cpu, cuda, cuda:1 or mps')
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UsageError(f'--device "{name}": torch sees {count} CUDA devices here; use a lower index or --device cpu')
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError('--device "mps": torch cannot use it here; use --device cpu')
    precision = args.quantize or args.precision
    if args.precision != "auto" and (args.quantize or (args.precision in DTYPES and args.dtype != "auto")):
        other = f"--quantize {args.quantize}" if args.quantize else f"--dtype {args.dtype}"
        raise UsageError(f"--precision {args.precision} and {other} both say how weights are held; leave one out")
    if precision == "auto":
        precision = args.dtype
    if precision == "auto":
        from quantize.precision import default_precision

        precision, why = default_precision((args.model,), device, revision=args.revision)
        if why:
            print(f"mmmamba: {why}", file=sys.stderr)
    if precision in DTYPES:
        return Place(device, DTYPES[precision], None)
    return Place(device, default_dtype(device) if args.dtype == "auto" else DTYPES[args.dtype], precision)
