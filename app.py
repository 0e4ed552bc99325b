"""Start the chat page: `python app.py`, then open the address it prints. `python app.py --help` lists the options."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.precision import PRECISIONS, SCHEMES, refusal
from app.scratch import use_own_uploads

LIMITS = (
    ("max-new-tokens", 1024, 1, "longest answer that a visitor may ask for"),
    ("max-images", 8, 1, "images in one message"),
    ("max-tiles", 12, 1, "most tiles of one image that a visitor may ask for"),
    ("max-text-chars", 8000, 1, "characters in one message"),
    ("max-context", 103_000, 1024, "tokens to which a visitor may grow the context"),
    ("max-minutes", 30, 1, "minutes of reading for which a visitor may grow it, for each model"),
    ("max-waiting", 16, 1, "messages that may wait for an answer"),
)
BUDGETS = (
    ("state-device-mib", "GPU memory for the states of all conversations; the oldest go to the computer's memory"),
    ("state-budget-mib", "memory for those states; the oldest go to disk"),
    ("state-disk-mib", "disk for those states; the oldest are let go and read again when asked for"),
)
SWITCHES = (
    ("no-teacher", "leave the comparison out"),
    ("no-switch", "visitors may not load other models"),
    ("open", "open the page in a browser, where there is a screen"),
    ("share", "open a public gradio.live tunnel to this machine"),
)
EPILOG = (
    "An environment variable sets the default of each of these: MMMAMBA_MAX_TILES=4 that of --max-tiles, "
    "MMMAMBA_NO_TEACHER=1 that of --no-teacher, and so on; Spaces use them. GRADIO_SERVER_NAME and GRADIO_SERVER_PORT "
    "serve for --host and --port too."
)
OLDER_NAMES = {"precision": ("quantize", "dtype")}  # of flags, and of variables that Spaces may have set
YES, NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def variable(name: str) -> str:
    """The environment variable that sets the default of --name."""
    return "MMMAMBA_" + name.upper().replace("-", "_")


def parser() -> argparse.ArgumentParser:
    """Flags. Host and port default to Gradio's own environment variables, which Spaces set."""
    p = argparse.ArgumentParser(prog="app.py", description="Chat about images with mmMamba.", epilog=EPILOG)

    def add(group: Any, name: str, default: Any, help_text: str, **kwargs: Any) -> None:
        names = (name, *OLDER_NAMES.get(name, ()))
        default = next((value for n in names if (value := os.environ.get(variable(n)))), default)
        shown = "" if default is None or name == "auth" else f" (default: {default})"
        group.add_argument(
            *(f"--{n}" for n in names), dest=name.replace("-", "_"), default=default, help=help_text + shown, **kwargs
        )

    model = p.add_argument_group("model")
    add(model, "model", "nano-linear", "bundled name, checkpoint directory or hub id", metavar="MODEL")
    add(model, "device", "auto", '"cpu", "cuda", "cuda:1", ...; "auto" takes CUDA where it is there', metavar="DEVICE")
    precision = (
        "how weights are held, of all models; auto: as they are stored where that loses nothing, else 16 or 32 bits"
    )
    add(model, "precision", "auto", precision, choices=PRECISIONS)
    teacher = "model to compare with, or several with commas; without it the known teacher of --model, if there is one"
    add(model, "teacher", None, teacher, metavar="MODEL")
    server = p.add_argument_group("server")
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    add(server, "host", host, "address to listen on; 0.0.0.0 for all", metavar="ADDRESS")
    port = os.environ.get("GRADIO_SERVER_PORT")
    add(server, "port", port, "port; without it, the first free one from 7860", type=int, metavar="N")
    auth = "ask for this name and password; also the key of /v1 (better in MMMAMBA_AUTH, where others do not see it)"
    add(server, "auth", None, auth, metavar="USER:PASSWORD")
    kept = "folder that keeps grown contexts, so that a later start need not read them again"
    add(server, "contexts", None, kept, metavar="FOLDER")
    likes = "keep thumbs up and down, with question and answer, in this file (JSONL); without it nothing is kept"
    add(server, "likes", None, likes, metavar="FILE")
    limits = p.add_argument_group("limits")
    for name, most, _, help_text in LIMITS:
        add(limits, name, most, help_text, type=int, metavar="N")
    for name, help_text in BUDGETS:
        add(limits, name, None, f"{help_text}; without it a quarter of what is free", type=int, metavar="MIB")
    switches = p.add_argument_group("switches")
    for name, help_text in SWITCHES:
        on = os.environ.get(variable(name), "").strip().lower()
        if on not in (*YES, *NO):
            p.error(f"{variable(name)} is {on!r}; use 1 or 0")
        about = argparse.BooleanOptionalAction if on in YES else "store_true"  # what a variable set can be unset
        switches.add_argument(f"--{name}", action=about, default=on in YES, help=help_text)
    return p


def read_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags and variables, checked. Ends the program with a sentence for what cannot be used."""
    p = parser()
    args = p.parse_args(argv)
    for name, least in [(name, least) for name, _, least, _ in LIMITS] + [(name, 0) for name, _ in BUDGETS]:
        value = getattr(args, name.replace("-", "_"))
        if value is not None and value < least:
            p.error(f"--{name} is {value}; use {least} or more")
    if args.precision not in PRECISIONS:
        p.error(f"--precision is {args.precision!r}; use one of {', '.join(PRECISIONS)}")
    if reason := refusal(args.precision, args.device):
        p.error(f"--precision {reason}")
    if args.auth is not None and not all(args.auth.partition(":")):
        p.error("--auth is no USER:PASSWORD; put a colon between the two")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = read_args(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    use_own_uploads()
    # What a container is stopped with ends the page as Ctrl-C does, so that its files go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads of torch leave the cores to the page
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    from app.backend import load_backend
    from app.chat import ChatStore
    from app.engine import Engine, Limits
    from app.sides import sides_of
    from app.states import Budget, StateStore
    from app.ui import PageOptions, build, launch_options
    from app.zero import ZeroGPU, on_zero_gpu

    budgets = [getattr(args, name.replace("-", "_")) for name, _ in BUDGETS]
    states = StateStore(Budget(*(None if mib is None else mib << 20 for mib in budgets)))
    # The package must be there before torch; models stay on the CPU and are moved by a worker of each call.
    zero = ZeroGPU() if on_zero_gpu() else None
    if zero and args.precision in SCHEMES:
        sys.exit(f"--precision {args.precision} does not go with ZeroGPU: its workers hold bfloat16; leave it out")
    engine = Engine(
        args.model,
        "cpu" if zero else args.device,
        "bfloat16" if zero and args.precision == "auto" else args.precision,
        limits=Limits(
            args.max_text_chars,
            args.max_images,
            args.max_tiles,
            args.max_new_tokens,
            args.max_context,
            args.max_minutes,
        ),
        chats=ChatStore(states=states),
        max_waiting=args.max_waiting,
        loader=zero.load if zero else load_backend,
    )
    # Without a screen `webbrowser` would start a text browser in this terminal.
    screen = sys.platform in ("darwin", "win32") or any(os.environ.get(v) for v in ("DISPLAY", "WAYLAND_DISPLAY"))
    # Loading a model is for the one whose machine this is: a page that others can reach does not offer it.
    mine = args.host in ("127.0.0.1", "localhost", "::1") and not args.share
    page = PageOptions(
        teacher="" if args.no_teacher else args.teacher,
        switch=mine and not args.no_switch and not zero,
        contexts=Path(args.contexts) if args.contexts else None,
        likes=Path(args.likes) if args.likes else None,
    )
    if zero:
        # Workers are forked from this process, with the models that are loaded by then: no others can be chosen.
        usual = sides_of(engine.model, page.teacher).usual
        page = replace(page, teacher=",".join(usual[1:]))
        for name in usual:
            engine.models.get(name)
    build(engine, page).launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        auth=tuple(args.auth.split(":", 1)) if args.auth else None,
        inbrowser=args.open and screen,
        **launch_options(engine, [args.auth] if args.auth else []),
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # while it starts; later Gradio takes it
        sys.exit(130)
