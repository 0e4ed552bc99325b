"""`csrc/cuda/step.cu` on a card: compiled on first use by NVRTC, which torch's CUDA builds bring along; launched so
that all blocks run at once.

Nothing depends on it: where NVRTC or `cuda-bindings` is missing, or a card is older than Hopper, a token is many
launches.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mmmamba.kernels.launch import multiprocessors

SOURCE = Path(__file__).parent / "csrc" / "cuda" / "step.cu"
HEADER = SOURCE.with_name("device.h")
ENTRY = b"decode_step"
MIN_CAPABILITY = (9, 0)  # copies that count the bytes they bring


class LaunchError(RuntimeError):
    """NVRTC or the driver refused; says what."""


def compile_step(capability: tuple[int, int], defines: Mapping[str, int]) -> bytes:
    """Machine code of the kernel, from the cache of an earlier process where it is there.

    Raises: ImportError without `cuda-bindings` or NVRTC, LaunchError if it does not compile.
    """
    from cuda.bindings import nvrtc

    arch = f"sm_{capability[0]}{capability[1]}"
    options = [f"--gpu-architecture={arch}a" if capability[0] >= 9 else f"--gpu-architecture={arch}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in defines.items()]
    source, header = SOURCE.read_bytes(), HEADER.read_bytes()
    _, *version = _checked(nvrtc.nvrtcVersion(), nvrtc)
    key = hashlib.sha256(b"\n".join([source, header, repr((options, version)).encode()])).hexdigest()[:16]
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmmamba"
    cached = directory / f"decode_step-{key}.cubin"
    if cached.is_file() and cached.stat().st_uid == os.getuid():
        return cached.read_bytes()
    _, program = _checked(nvrtc.nvrtcCreateProgram(source, b"step.cu", 1, [header], [b"device.h"]), nvrtc)
    status = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(status[0]):
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise LaunchError(f"NVRTC: {log.decode(errors='replace').strip()[:2000]}")
    _, size = _checked(nvrtc.nvrtcGetCUBINSize(program), nvrtc)
    code = b" " * size
    _checked(nvrtc.nvrtcGetCUBIN(program, code), nvrtc)
    with suppress(OSError):  # a home that cannot be written to
        directory.mkdir(parents=True, exist_ok=True)
        fresh = directory / f"{cached.name}.{os.getpid()}"
        fresh.write_bytes(code)
        os.replace(fresh, cached)  # several processes may do so at once: each puts a whole file there
    return code


class WholeStep:
    """The kernel on one card, ready to be launched.

    Args:
        step: what it is told; read at every launch, or once when a graph is captured.
        defines: constants of the source, `WARPS` (that compute) among them.
        shared_bytes: shared memory of a block.
    Raises: ImportError, LaunchError.
    """

    def __init__(
        self, step: ctypes.Structure, defines: Mapping[str, int], shared_bytes: int, device: torch.device
    ) -> None:
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            raise LaunchError(f"{torch.cuda.get_device_name(device)} has no copies that count the bytes they bring")
        from cuda.bindings import driver

        code = _code(capability, tuple(sorted(defines.items())))
        torch.cuda.current_stream(device)  # makes torch's context, which the driver then uses
        _, self._module = _checked(driver.cuModuleLoadData(code), driver)
        _, self._function = _checked(driver.cuModuleGetFunction(self._module, ENTRY), driver)
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self._function, limit, shared_bytes), driver)
        self._driver, self._device, self._step = driver, device, step
        self._arguments = (ctypes.c_void_p * 1)(ctypes.addressof(step))
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attribute.value.cooperative = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = multiprocessors(device), 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = 32 * (defines["WARPS"] + 1), 1, 1
        config.sharedMemBytes = shared_bytes
        config.attrs, config.numAttrs = [attribute], 1  # copied: the attribute is whole by now
        self._config = config

    def launch(self) -> None:
        """Launch on the current stream (which may be one that is being captured)."""
        self._config.hStream = torch.cuda.current_stream(self._device).cuda_stream
        _checked(
            self._driver.cuLaunchKernelEx(self._config, self._function, ctypes.addressof(self._arguments), 0),
            self._driver,
        )


@cache
def _code(capability: tuple[int, int], defines: tuple[tuple[str, int], ...]) -> bytes:
    """As `compile_step`, which takes seconds where its cache cannot be written to."""
    return compile_step(capability, dict(defines))


@cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block can have.

    Raises: ImportError, LaunchError.
    """
    from cuda.bindings import driver

    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    index = torch.cuda.current_device() if device.index is None else device.index
    _, limit = _checked(driver.cuDeviceGetAttribute(attribute, index), driver)
    return int(limit)


def _checked(result: tuple[Any, ...], module: object) -> tuple[Any, ...]:
    if int(result[0]):
        raise LaunchError(f"{getattr(module, '__name__', module)}: {result[0]!r}")
    return result
