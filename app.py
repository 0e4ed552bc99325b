"""Start the chat page: `python app.py`, then open the address it prints. `python app.py --help` lists the options."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIMITS = (
    ("max-new-tokens", 1024, "longest answer that a visitor may ask for"),
    ("max-images", 8, "images in one message"),
    ("max-tiles", 12, "most tiles of one image that a visitor may ask for"),
    ("max-text-chars", 8000, "characters in one message"),
    ("max-waiting", 16, "messages that may wait for an answer"),
)
BUDGETS = (
    ("state-device-mib", "GPU memory for the states of all conversations; the oldest go to the computer's memory"),
    ("state-budget-mib", "memory for those states; the oldest go to disk"),
    ("state-disk-mib", "disk for those states; the oldest are let go and read again when asked for"),
)
EPILOG = "An environment variable sets the default of each of these: MMMAMBA_MAX_TILES that of --max-tiles, and so on."


def parser() -> argparse.ArgumentParser:
    """Flags. Host and port default to Gradio's own environment variables, which Spaces set."""
    p = argparse.ArgumentParser(prog="app.py", description="Chat about images with mmMamba.", epilog=EPILOG)

    def add(name: str, default: Any, help_text: str, **kwargs: Any) -> None:
        default = os.environ.get("MMMAMBA_" + name.upper().replace("-", "_"), default)
        shown = "" if default is None else f" (default: {default})"
        p.add_argument(f"--{name}", default=default, help=help_text + shown, **kwargs)

    add("model", "nano", "bundled name, checkpoint directory or hub id")
    add("device", "auto", '"cpu", "cuda", "cuda:1", ...; "auto" takes CUDA where it is there')
    add("dtype", "auto", "precision", choices=("auto", "float32", "bfloat16", "float16"))
    add("host", os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), "address to listen on; 0.0.0.0 for all")
    add("port", os.environ.get("GRADIO_SERVER_PORT"), "port; without it, the first free one from 7860", type=int)
    for name, default, help_text in LIMITS:
        add(name, default, help_text, type=int)
    for name, help_text in BUDGETS:
        add(name, None, f"{help_text}; without it a quarter of what is free", type=int)
    add("teacher", None, "model to compare with; without it the known teacher of --model, if there is one")
    add("contexts", None, "folder that keeps grown contexts, so that a later start need not read them again")
    p.add_argument("--no-teacher", action="store_true", help="leave the comparison out")
    p.add_argument("--no-switch", action="store_true", help="visitors may not load other models")
    p.add_argument("--open", action="store_true", help="open the page in a browser, where there is a screen")
    p.add_argument("--share", action="store_true", help="open a public gradio.live tunnel to this machine")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    p = parser()
    args = p.parse_args(argv)
    for name, least in [(name, 1) for name, _, _ in LIMITS] + [(name, 0) for name, _ in BUDGETS]:
        value = getattr(args, name.replace("-", "_"))
        if value is not None and value < least:
            p.error(f"--{name} is {value}; use {least} or more")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads of torch leave the cores to the page
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    from app.chat import ChatStore
    from app.engine import Engine, Limits
    from app.states import Budget, StateStore
    from app.ui import PageOptions, build, launch_options

    budgets = [getattr(args, name.replace("-", "_")) for name, _ in BUDGETS]
    states = StateStore(Budget(*(None if mib is None else mib << 20 for mib in budgets)))
    engine = Engine(
        args.model,
        args.device,
        args.dtype,
        limits=Limits(args.max_text_chars, args.max_images, args.max_tiles, args.max_new_tokens),
        chats=ChatStore(states=states),
        max_waiting=args.max_waiting,
    )
    # Without a screen `webbrowser` would start a text browser in this terminal.
    screen = sys.platform in ("darwin", "win32") or any(os.environ.get(v) for v in ("DISPLAY", "WAYLAND_DISPLAY"))
    # Loading a model is for the one whose machine this is: a page that others can reach does not offer it.
    page = PageOptions(
        teacher="" if args.no_teacher else args.teacher,
        switch=args.host in ("127.0.0.1", "localhost", "::1") and not (args.no_switch or args.share),
        contexts=Path(args.contexts) if args.contexts else None,
    )
    build(engine, page).launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        inbrowser=args.open and screen,
        **launch_options(engine),
    )


if __name__ == "__main__":
    main()
