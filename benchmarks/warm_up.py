"""What a first token costs in a new process, its kernels compiled before: `python -m benchmarks.warm_up`.

A model of the published size with random weights; a JSON line with the seconds that it takes to make and check the
fused decoder, to read a prompt of one tile and 40 words for the first time, and to capture and run the first token.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise

import torch

from benchmarks import prefill
from benchmarks.full_size import KINDS, SCHEMES, config_of, random_model
from mmmamba import generate
from mmmamba.decoder import decoder_for


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.warm_up", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--kind", default="linear", choices=KINDS)
    p.add_argument("--scheme", default="bf16", choices=SCHEMES)
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        p.error("torch sees no CUDA device here")
    device = torch.device("cuda")
    model = random_model(config_of(args.kind), device, args.scheme)
    inputs = prefill.inputs_of(model, prefill.Prompt(prefill.WORDS, tiles=1))
    state = model.new_state()
    torch.cuda.synchronize()
    times = [time.perf_counter()]

    def done() -> None:
        torch.cuda.synchronize()
        times.append(time.perf_counter())

    decoder = decoder_for(model)
    done()
    logits = generate.prefill(model, inputs, state, piece_size=generate.piece_size(device))
    done()
    generate.decode_one_token(model, logits.argmax(dim=-1), state)
    done()
    took = [round(end - start, 3) for start, end in pairwise(times)]
    seconds = dict(zip(("decoder_s", "prompt_s", "token_s"), took, strict=True), total_s=round(sum(took), 3))
    print(json.dumps({"kind": args.kind, "scheme": args.scheme, "fused": decoder is not None} | seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
