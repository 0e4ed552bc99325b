"""Memory of the machine: what is free, how fast it is, and what a piece of work needed at most."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

BANDWIDTH_BYTES = 2**29  # far beyond any cache
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_memory_bytes(device: torch.device | str = "cpu") -> int | None:
    """What can still be allocated on a device; None where the system does not tell.

    In a container the least of what the machine has and what the container may use.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has set aside and nobody uses can be allocated again.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = []
    if _MEMINFO.is_file() and (line := re.search(r"^MemAvailable:\s*(\d+) kB", _MEMINFO.read_text(), re.MULTILINE)):
        found.append(int(line[1]) * 1024)
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            found.append(max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        pass  # no control group of the second version: nothing more is known
    return min(found) if found else None


def current_memory_bytes(device: torch.device) -> int:
    """What `peak_memory_bytes` would say if nothing more were taken from now on."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if _STATUS.is_file() and (found := re.search(r"^VmRSS:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    return peak_memory_bytes(device)


def reset_peak_memory(device: torch.device) -> None:
    """Start `peak_memory_bytes` anew. Off Linux the CPU's peak cannot be reset: it is that of the process's life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        # What was freed lies in the C library's lists, resident: new tensors would take it without being seen.
        return_freed_memory()
        _CLEAR_REFS.write_text("5")  # sets the high-water mark of resident memory to what is resident now


def return_freed_memory() -> None:
    """Give the system back what was freed, where the C library can (glibc): much is freed at once after a load."""
    with suppress(AttributeError, OSError, TypeError):  # another C library; Windows has none by that name
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory_bytes(device: torch.device) -> int:
    """On a GPU what torch had allocated at most, on a CPU the process's resident memory at most, Python included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file() and (found := re.search(r"^VmHWM:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def synchronize(device: torch.device) -> None:
    """Wait for what was started on a GPU, so that a clock can be read."""
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
