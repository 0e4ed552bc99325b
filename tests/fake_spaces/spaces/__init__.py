"""As much of Hugging Face's package `spaces` as ZeroGPU's users see: a decorated generator runs in a forked process.

Written after spaces 0.51 (`zero/wrappers.py`): arguments and items are pickled through queues, an exception comes back
as a gradio error, and closing the generator ends the work at its next item. The request in whose name a GPU is lent is
found in gradio's context; calls without one are refused here, so that tests notice them.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

# Gradio tries to import this package while it is being imported itself, which the real one refuses too.
if "gradio" in sys.modules and not hasattr(sys.modules["gradio"], "Blocks"):
    raise ImportError

import gradio as gr
from gradio.context import LocalContext

_fork = multiprocessing.get_context("fork")
used = _fork.Value("i", 0)  # calls so far
MOST_CALLS = 1000


def gradio_auto_wrap(task: Any) -> Any:
    return task


def GPU(*, duration: int) -> Callable[[Callable[..., Iterator[Any]]], Callable[..., Iterator[Any]]]:
    def decorate(task: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        @wraps(task)
        def call(*args: Any) -> Iterator[Any]:
            if LocalContext.request.get(None) is None:
                raise gr.Error("<b>No request</b>: nobody's share can be charged.")
            if used.value >= MOST_CALLS:
                raise gr.Error(f'You have exceeded your <a href="/">GPU quota</a> ({duration}s requested).')
            used.value += 1
            arguments, items = _fork.SimpleQueue(), _fork.SimpleQueue()
            stop = _fork.Event()
            process = _fork.Process(target=_work, args=(task, arguments, items, stop), daemon=True)
            process.start()
            arguments.put(args)
            try:
                while True:
                    kind, value = items.get()
                    if kind == "end":
                        return
                    if kind == "error":
                        raise gr.Error(f"ZeroGPU worker error: {value}")
                    yield value
            finally:
                stop.set()
                process.join(10)

        return call

    return decorate


def _work(task: Callable[..., Iterator[Any]], arguments: Any, items: Any, stop: Any) -> None:
    try:
        for item in task(*arguments.get()):
            if stop.is_set():
                return
            items.put(("item", item))
        items.put(("end", None))
    except Exception as error:
        items.put(("error", type(error).__name__))
