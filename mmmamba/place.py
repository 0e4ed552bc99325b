"""Where and how wide a model runs unless someone says otherwise; one place for the command line and the page."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it: on CUDA, and on x86 processors with AVX-512 BF16 or AMX, where a token
    takes about half the time of float32. Elsewhere float32: emulated bfloat16 is slower than that."""
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if device.type == "cpu" and _cpu_multiplies_bf16() else torch.float32


def _cpu_multiplies_bf16() -> bool:
    # No public name yet in torch 2.11 to 2.14; a torch without these answers False.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
