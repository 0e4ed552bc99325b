"""Products with packed weights and a decoding step in C for CPUs, built by the machine's own compiler on first use.

torch's kernels for one row of activations leave most of the memory bandwidth unused; `csrc/decode_cpu.c` says what is
done instead. Nothing depends on it: without a compiler, or with MMMAMBA_NATIVE=0, everything runs on torch alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mmmamba.packing import PackedSpec, PackedWeight

SOURCE = Path(__file__).parent / "csrc" / "decode_cpu.c"
INCLUDED = [SOURCE.with_name(name) for name in ("avx512.h", "numbers.h", "product.h", "team.h")]
FLAGS = ["-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-shared", "-fPIC", "-pthread"]
COMPILERS = ("cc", "gcc", "clang")
BUILD_TIMEOUT_S = 120
MAX_COLS = 2**15  # as in the source
MAX_GROUP = 1024  # sums of a group stay within 32 bits

log = logging.getLogger(__name__)


class Linear(ctypes.Structure):
    """`Linear` of the source. The tensors behind the addresses must outlive it."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "rows", "cols", "group")),
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "zeros")),
    )


_KINDS: dict[torch.dtype | int, int] = {torch.float32: 0, torch.bfloat16: 1, 4: 2, 8: 3}


@cache
def load_native() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none; says once which it is."""
    lib, reason = None, _refusal()
    if not reason:
        try:
            lib = ctypes.CDLL(str(build()))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: a user without a home
            reason = f"building it failed ({_first_line(error)})"
    if lib is None:
        log.info("CPU kernels: torch alone, since %s", reason)
        return None, reason
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    lib.mmmamba_step.argtypes = [pointer, pointer, pointer, pointer, integer, pointer, integer]
    lib.mmmamba_step.restype = integer
    lib.mmmamba_product.argtypes = [pointer, pointer, integer, pointer, integer]
    lib.mmmamba_product.restype = integer
    lib.mmmamba_unpack.argtypes = [pointer, pointer, integer]
    lib.mmmamba_unpack.restype = None
    log.info("CPU kernels: %s, built here", SOURCE.name)
    return lib, ""


def _refusal() -> str:
    if os.environ.get("MMMAMBA_NATIVE", "1") == "0":
        return "MMMAMBA_NATIVE=0 says so"
    if os.name != "posix":
        return "they need POSIX threads"
    if _compiler() is None:
        return f"there is no C compiler ({', '.join(COMPILERS)}; CC names another)"
    return ""


def _compiler() -> str | None:
    names = (os.environ.get("CC"), *COMPILERS)
    return next((found for name in names if name and (found := shutil.which(name))), None)


def build(*extra_flags: str) -> Path:
    """Compile the source unless that was done before for this machine; returns the library's path.

    Raises: OSError or subprocess.SubprocessError if it cannot be compiled or written, RuntimeError if there is no home.
    """
    compiler = _compiler()
    if compiler is None:
        raise OSError(f"no C compiler found; install one of {', '.join(COMPILERS)}")
    flags = (*FLAGS, *extra_flags)
    # A home may be shared by machines whose processors differ: what one was built for may not run on the other.
    sources = [path.read_text(encoding="utf-8") for path in (SOURCE, *INCLUDED)]
    key = "\n".join([*sources, compiler, *flags, _processor()])
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmmamba"
    library = directory / f"decode_cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as work:
            fresh = Path(work) / library.name
            command = [compiler, *flags, str(SOURCE), "-o", str(fresh), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
            if done.returncode:
                raise OSError(f"{compiler}: {_first_line(done.stderr or done.returncode)}")
            os.replace(fresh, library)  # two processes may build at once: each puts a whole file there
    if library.stat().st_uid != os.getuid():
        raise OSError(f"{library} belongs to another user; remove it, or name another XDG_CACHE_HOME")
    return library


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return f"{platform.machine()} {platform.processor()}"
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def refusal_of(weight: Tensor | PackedWeight) -> str:
    """Why a weight cannot be multiplied here, or nothing if it can."""
    if isinstance(weight, Tensor):
        dtype, cols = weight.dtype, weight.shape[-1]
        if dtype not in _KINDS or not weight.is_contiguous():
            return f"weights are {dtype}; float32 and bfloat16 in rows can be read"
        return "" if cols <= MAX_COLS else f"rows hold {cols} weights, more than {MAX_COLS}"
    return refusal_of_spec(weight.spec)


def refusal_of_spec(spec: PackedSpec) -> str:
    """As `refusal_of`, of a packed weight that is not there yet."""
    cols = spec.shape[-1]
    if spec.bits not in _KINDS:
        return f"weights have {spec.bits} bits; 4 and 8 can be read"
    if cols % 64 or cols > MAX_COLS:
        return f"rows hold {cols} weights; multiples of 64 up to {MAX_COLS} can be read"
    if spec.group_size != cols and (spec.group_size % 32 or spec.group_size > MAX_GROUP):
        return f"groups hold {spec.group_size} weights; multiples of 32 up to {MAX_GROUP}, or whole rows, can be read"
    return ""


def native_linear(weight: Tensor | PackedWeight) -> Linear:
    """The description of a weight (rows, cols) on the CPU that `refusal_of` has nothing against."""
    if isinstance(weight, Tensor):
        rows, cols = weight.shape
        return Linear(_KINDS[weight.dtype], rows, cols, cols, weight.data_ptr(), None, None)
    rows, cols = weight.spec.shape
    parts = (t.data_ptr() for t in (weight.qweight, weight.scales, weight.zeros))
    return Linear(_KINDS[weight.spec.bits], rows, cols, weight.spec.group_size, *parts)


def product(lib: ctypes.CDLL, weight: PackedWeight, x: Tensor) -> Tensor:
    """x (n, cols) times the weight (rows, cols) transposed, for few rows n: float32 (n, rows). x is rounded to 16 bits
    with a scale a group."""
    x = x.float().contiguous()
    y = torch.empty(len(x), weight.spec.shape[0])
    linear = native_linear(weight)
    if lib.mmmamba_product(ctypes.byref(linear), x.data_ptr(), len(x), y.data_ptr(), torch.get_num_threads()):
        raise MemoryError("no memory for the buffers of a product")
    return y


def unpack(lib: ctypes.CDLL, weight: PackedWeight) -> Tensor:
    """The weight in float32, as `PackedWeight.unpack` gives it."""
    out = torch.empty(weight.spec.shape)
    linear = native_linear(weight)
    lib.mmmamba_unpack(ctypes.byref(linear), out.data_ptr(), torch.get_num_threads())
    return out
