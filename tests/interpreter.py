"""Triton's interpreter, for tests of kernels without a GPU: whether it is on, and how to make it bearable."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def require_triton() -> torch.device:
    """The device that kernels run on here; skips the module that asks where there is none."""
    pytest.importorskip("triton", reason="Triton does not import here")
    if INTERPRETED:
        _patch_once()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
    return torch.device("cuda")


def _patch_once() -> None:
    """The interpreter wraps all of triton.language anew at every call of a device function, which is most of its time.
    Once is enough. (These are its internals: where they are called otherwise, it is left as it is, and slow.)"""
    import triton.language as tl
    from triton.runtime import interpreter

    internals: Any = interpreter
    if all(hasattr(internals, name) for name in ("_patch_lang", "_LangPatchScope")):
        internals._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        # Triton 3.6 asks numpy for the whole number in an array of one dimension, which numpy 2.4 refuses.
        tl.core.tensor.__index__ = lambda self: int(self.handle.data.item())
        internals._patch_lang = lambda fn: internals._LangPatchScope()
