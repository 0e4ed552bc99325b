"""What the machine can do and holds: its name, memory bandwidth, peak memory."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

BANDWIDTH_BYTES = 2**29  # far beyond any cache
_STATUS, _CLEAR_REFS, _CPUINFO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/cpuinfo")


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


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_s(fn: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        fn()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def memory_bandwidth(device: torch.device, *, num_bytes: int = BANDWIDTH_BYTES, repeats: int = 7) -> float:
    """Bytes a second that reading or copying a large tensor reaches, the greater of the two.

    Decoding mostly reads, and on some machines reading alone is faster than copying.
    """
    x = torch.ones(num_bytes // 4, device=device)
    y = torch.empty_like(x)
    copied = 2 * x.nbytes / best_s(lambda: y.copy_(x), device, repeats)
    read = x.nbytes / best_s(x.sum, device, repeats)
    return max(copied, read)


def reset_peak_memory(device: torch.device) -> None:
    """Start `peak_memory_bytes` anew. Off Linux the CPU's peak cannot be reset: it is that of the process's life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")  # sets the high-water mark of resident memory to what is resident now


def peak_memory_bytes(device: torch.device) -> int:
    """On a GPU what torch had allocated at most, on a CPU the process's resident memory at most, Python included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file() and (found := re.search(r"^VmHWM:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
