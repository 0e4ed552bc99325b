"""What the machine can do and holds: its name, memory bandwidth, peak memory."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

import torch

from mmmamba.memory import BANDWIDTH_BYTES, best_s, memory_bandwidth, peak_memory_bytes, reset_peak_memory, synchronize

__all__ = [
    "BANDWIDTH_BYTES",
    "best_s",
    "device_name",
    "device_slug",
    "load_average",
    "measured",
    "memory_bandwidth",
    "peak_flops",
    "peak_memory_bytes",
    "reset_peak_memory",
    "synchronize",
]
_CPUINFO = Path("/proc/cpuinfo")
# Dense bf16 products on the data sheets, 1/s; the first name that the card's holds.
_DATA_SHEETS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if _CPUINFO.is_file() and (found := re.search(r"^model name\s*: (.+)$", _CPUINFO.read_text(), re.MULTILINE)):
        name = found[1].strip()
    return f"{name}, {torch.get_num_threads()} threads"


def device_slug(device: torch.device) -> str:
    """For file names: `cpu`, or the card's name in lower case with dashes."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations a second on the card's data sheet; None for cards that are not known here, and for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for known, rate in _DATA_SHEETS.items() if known in name), None)


def load_average() -> float | None:
    """Processes that wanted to run in the last minute, on average; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def measured(device: torch.device) -> tuple[float, float | None]:
    """Memory bandwidth in bytes/s and the load before that, both printed; a busy machine is warned of."""
    load = load_average()
    bandwidth = memory_bandwidth(device)
    print(f"{device_name(device)}; torch {torch.__version__}; memory bandwidth {bandwidth / 1e9:.1f} GB/s")
    if load is not None and load > 0.5:
        print(f"The machine is busy (load {load:.1f}): the times below are worth little.", file=sys.stderr)
    return bandwidth, load
