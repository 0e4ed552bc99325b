"""SmolLM2-135M in llama.cpp, beside which this project's CPU step is timed; needs the package `llama-cpp-python`."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba import cost


def fault(path: Path) -> str:
    """Why a GGUF file cannot be timed here, or nothing if it can."""
    if not path.is_file():
        return f"--gguf {path} is not a file"
    if find_spec("llama_cpp") is None:
        return '--gguf needs the package llama-cpp-python: "pip install llama-cpp-python", which compiles it'
    return ""


class LlamaCppSide:
    """`decode.Side` of a GGUF file of SmolLM2-135M, one conversation."""

    # Keys and values of 30 layers, 3 heads of 64, in float16.
    KV_BYTES = 2 * 30 * 3 * 64 * 2
    grows = True

    def __init__(self, path: Path, max_context: int, piece_size: int) -> None:
        from llama_cpp import Llama  # the package, not this module

        threads = torch.get_num_threads()
        self.model: Any = Llama(
            str(path), n_ctx=max_context, n_batch=piece_size, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.name, self.weights = f"llama.cpp {path.stem}", "checkpoint"
        size = path.stat().st_size
        self.weight_bytes = cost.WeightCount(size, size)  # the table is the head too

    def read(self, ids: Tensor) -> None:
        self.model.eval(ids[0].tolist())

    def step(self, token: Tensor) -> Tensor:
        from llama_cpp import llama_get_logits_ith

        self.model.eval(token.tolist())
        logits = llama_get_logits_ith(self.model.ctx, -1)
        row = torch.frombuffer(
            (ctypes.c_float * self.model.n_vocab()).from_address(ctypes.addressof(logits.contents)), dtype=torch.float32
        )
        return row.argmax()[None]

    def cache_bytes(self) -> int:
        return int(self.model.n_tokens) * self.KV_BYTES

    def traffic_bytes(self) -> int:
        return self.cache_bytes()
