"""What the machine can do and holds: its name, memory bandwidth, peak memory."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

from mmmamba.memory import BANDWIDTH_BYTES, best_s, memory_bandwidth, peak_memory_bytes, reset_peak_memory, synchronize

__all__ = [
    "BANDWIDTH_BYTES",
    "best_s",
    "device_name",
    "device_slug",
    "load_average",
    "memory_bandwidth",
    "peak_memory_bytes",
    "reset_peak_memory",
    "synchronize",
]
_CPUINFO = Path("/proc/cpuinfo")


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


def load_average() -> float | None:
    """Processes that wanted to run in the last minute, on average; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
