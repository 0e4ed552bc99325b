"""Command line: `python -m mmmamba chat` answers about images in a terminal or a pipe, `batch` a file of questions,
`info` says what a model costs.

Answers go to stdout, everything else to stderr. Exit status: 0, 2 for what the user can mend (one sentence on stderr),
130 when Ctrl-C ended the run, 141 when the reader of stdout went away.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from mmmamba.batch import Batch
from mmmamba.checkpoint import load_model, read_config, resolve_checkpoint
from mmmamba.conversation import Conversation
from mmmamba.flags import Place, UsageError, place_arguments, place_of
from mmmamba.generate import SamplingParams, StreamEvent
from mmmamba.image import ImageError, load_image
from mmmamba.info import DTYPES, info_record, info_text, quantized_record, readable_bytes
from mmmamba.jsonl import Counts, answer_file, forget_errors, num_unanswered, read_questions

DEFAULT_MODEL = "nano-linear"
REPL_HELP = "/image PATH adds an image to the next question, /new starts over, /quit (or Ctrl-D) leaves"
EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 130, 141


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m mmmamba", description="Chat about images with a recurrent model.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{chat,batch,info}")

    chat = commands.add_parser(
        "chat",
        help="ask about images; without a question, a conversation",
        description="Answer a question, or hold a conversation: one question a line from the terminal or a pipe.",
        epilog=f"In a conversation: {REPL_HELP}.",
        argument_default=argparse.SUPPRESS,  # what is not given keeps the default of SamplingParams
    )
    chat.add_argument("question", nargs="?", default=None, help='what to ask; "-" reads all of stdin')
    _model_argument(chat, "--model")
    chat.add_argument("--image", action="append", default=[], metavar="FILE", help="to ask about; may be repeated")
    _answering_arguments(chat)
    chat.add_argument("--json", action="store_true", default=False, help="one JSON line an answer, nothing else")
    chat.set_defaults(run=run_chat)

    batch = commands.add_parser(
        "batch",
        help="answer a file of questions",
        description=(
            'Answer questions from a JSONL file, several at once. A line: {"question": ..., "image": FILE, "id": ...}; '
            'also "images", "system", "max_tiles", the sampling settings, and "extra", which comes back. An answer is '
            "written as soon as it is whole, so that a run that was broken off goes on where it was."
        ),
        argument_default=argparse.SUPPRESS,
    )
    batch.add_argument("questions", type=Path, metavar="IN.jsonl", help="questions; their images are relative to it")
    batch.add_argument("answers", type=Path, metavar="OUT.jsonl", help="answers; ids in it are not asked again")
    _model_argument(batch, "--model")
    _answering_arguments(batch)
    batch.add_argument("--batch-size", type=int, default=8, metavar="N", help="answered together (8)")
    batch.add_argument("--retry-errors", action="store_true", default=False, help="ask again what got an error")
    batch.set_defaults(run=run_batch)

    info = commands.add_parser(
        "info", help="layers, parameters and bytes of a model", description="What a model costs."
    )
    _model_argument(info, "model")
    info.add_argument("--context", type=int, default=8192, metavar="N", help="tokens for the teacher's cache (8192)")
    info.add_argument("--image-tokens", type=int, default=0, metavar="N", help="how many of them are image tokens (0)")
    info.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="of weights and caches (float32)")
    info.add_argument("--json", action="store_true", help="one JSON object")
    info.set_defaults(run=run_info)
    return parser


def _answering_arguments(parser: argparse.ArgumentParser) -> None:
    """What is asked how, and where."""
    parser.add_argument("--system", default=None, help="system prompt instead of the model's own")
    parser.add_argument("--max-tiles", type=int, default=None, metavar="N", help="tiles an image may be cut into")
    place_arguments(parser)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--greedy", action="store_true", help="always the likeliest token; ignores the seed")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    sampling.add_argument("--temperature", type=float, metavar="T")
    sampling.add_argument("--top-p", type=float, metavar="P")
    sampling.add_argument("--top-k", type=int, metavar="K", help="0 is off")
    sampling.add_argument("--min-p", type=float, metavar="P")
    sampling.add_argument("--repetition-penalty", type=float, metavar="R")
    sampling.add_argument("--max-new-tokens", type=int, metavar="N")


def _model_argument(parser: argparse.ArgumentParser, name: str) -> None:
    about = f"checkpoint directory, Hub id or bundled name (default: {DEFAULT_MODEL})"
    optional: dict[str, Any] = {} if name.startswith("-") else {"nargs": "?"}
    parser.add_argument(name, default=DEFAULT_MODEL, metavar="MODEL", help=about, **optional)
    parser.add_argument("--revision", default=None, help="revision of a model on the Hub")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    try:
        args = build_parser().parse_args(argv)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more on exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sentence = _plain_sentence(error)
        if sentence is None:
            raise
        print(f"mmmamba: {sentence}", file=sys.stderr)
        return EXIT_USER_ERROR


def _plain_sentence(error: Exception) -> str | None:
    """The error in one line, or None for one that is no user's fault."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "out of memory" in str(error)):
        return "out of memory; use a smaller model, --precision bfloat16, a lower --max-tiles or another --device"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return None if isinstance(error, RuntimeError) else " ".join(str(error).split())


# chat


def run_chat(args: argparse.Namespace) -> int:
    """Answer one question, or every question that the terminal or the pipe brings."""
    for stdout in (sys.stdout, sys.stderr):
        if hasattr(stdout, "reconfigure"):
            stdout.reconfigure(errors="replace")  # a terminal without UTF-8 still gets the rest of the answer
    if args.question == "-":
        args.question = sys.stdin.read().strip()
    if args.question is not None and not args.question.strip():
        raise UsageError("the question is empty; ask something, or leave it out for a conversation")
    params = _sampling_params(args)
    _check_images(args.image)
    place = place_of(args)
    started = time.perf_counter()
    conversation = _load_conversation(args, place)
    load_ms = 1e3 * (time.perf_counter() - started)

    if args.question is not None:
        event = _answer(conversation, args.question, args.image, params, args, load_ms)
        return EXIT_INTERRUPTED if event.finish_reason == "cancel" else 0
    images = list(args.image)
    for line in _questions():
        command, _, rest = line.partition(" ")
        if command == "/quit":
            break
        if command == "/new":
            conversation.reset()
            images = []
            continue
        try:
            if command == "/image":
                _check_images([rest.strip()])
                images.append(rest.strip())
            elif command == "/help":
                print(REPL_HELP, file=sys.stderr)
            else:
                _answer(conversation, line, images, params, args, load_ms)
                images = []
        except (ValueError, OSError) as error:
            if isinstance(error, BrokenPipeError) or not sys.stdin.isatty():
                raise
            print(f"mmmamba: {_plain_sentence(error)}", file=sys.stderr)  # a person can try again
    return 0


def _questions() -> Iterator[str]:
    """Lines of stdin that are not blank; on a terminal with a prompt and line editing."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):  # it gives input() history and editing; not on every system
        import readline  # noqa: F401
    print(f"Ask away. {REPL_HELP}.", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        if line:
            yield line


def _answer(
    conversation: Conversation,
    question: str,
    images: Sequence[str],
    params: SamplingParams,
    args: argparse.Namespace,
    load_ms: float,
) -> StreamEvent:
    """Print the answer as it comes (or as one JSON line at its end); Ctrl-C ends it early."""
    cancel = threading.Event()
    event = None
    with _interrupt_sets(cancel):
        for event in conversation.ask(question, images, params, cancel=cancel):
            if not args.json and event.text:
                print(event.text, end="", flush=True)
    assert event is not None, "stream ends with an event that has a finish_reason"
    record = _answer_record(conversation, event, args.model, load_ms)
    if args.json:
        print(json.dumps(record, ensure_ascii=False), flush=True)
        return event
    print(flush=True)
    if sys.stderr.isatty():
        rate = "" if event.tok_per_sec is None else f", {event.tok_per_sec:.1f} tokens/s"
        first = "" if event.ttft_ms is None else f", first after {event.ttft_ms:,.0f} ms"
        state = f"state {readable_bytes(record['state_bytes'])} at {record['context_tokens']:,} tokens"
        print(f"[{event.num_tokens} tokens{rate}{first}; {state}]", file=sys.stderr)
    return event


def _answer_record(conversation: Conversation, event: StreamEvent, name: str, load_ms: float) -> dict[str, Any]:
    model, state = conversation.model, conversation.state
    return {
        "text": event.reply,
        "finish_reason": event.finish_reason,
        "num_tokens": event.num_tokens,
        "ttft_ms": event.ttft_ms,
        "elapsed_ms": event.elapsed_ms,
        "tok_per_sec": event.tok_per_sec,
        "load_ms": load_ms,
        "context_tokens": state.seqlen,
        "image_tokens": state.num_image_tokens,
        "text_tokens": state.num_text_tokens,
        "state_bytes": state.nbytes,
        "model": name,
        "kind": model.config.kind,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantize": model.scheme,
    }


@contextmanager
def _interrupt_sets(cancel: threading.Event) -> Iterator[None]:
    """Ctrl-C sets `cancel`; a second one interrupts as usual."""

    def handler(signum: int, frame: object) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _sampling_params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(**{f.name: getattr(args, f.name) for f in fields(SamplingParams) if hasattr(args, f.name)})


def _check_images(paths: Sequence[str]) -> None:
    """Refuse an unreadable image before the model is loaded."""
    for path in paths:
        try:
            load_image(path)
        except ImageError as error:
            raise UsageError(str(error) if path in str(error) else f"{path}: {error}") from error


def _load_conversation(args: argparse.Namespace, place: Place) -> Conversation:
    with _progress_bar() as progress:
        model = load_model(
            args.model,
            device=place.device,
            dtype=place.dtype,
            revision=args.revision,
            quantize=place.quantize,
            progress=progress,
        )
    return Conversation(model, system=args.system, max_tiles=args.max_tiles)


@contextmanager
def _progress_bar() -> Iterator[Callable[[float, str], None]]:
    """A bar on stderr, if that is a terminal, moved by calls of (fraction done, what is being read)."""
    layout = "loading {percentage:3.0f}%|{bar}| {elapsed}"
    with tqdm(total=1.0, bar_format=layout, leave=False, disable=None, file=sys.stderr) as bar:
        yield lambda fraction, what: bar.update(fraction - bar.n)


# batch


def run_batch(args: argparse.Namespace) -> int:
    """Answer what of a file of questions has no answer yet."""
    lines = read_questions(args.questions, _sampling_params(args), system=args.system, max_tiles=args.max_tiles)
    if args.retry_errors:
        forget_errors(args.answers)
    name = Path(args.model).name
    todo = num_unanswered(lines, args.answers, name)
    counts = Counts(0, 0, len(lines))
    if todo:
        conversation = _load_conversation(args, place_of(args))
        batch = Batch(conversation.model, conversation.tokenizer, size=args.batch_size, plain=_plain_sentence)
        with tqdm(total=todo, unit=" answers", disable=None, file=sys.stderr) as bar:
            counts = answer_file(batch, lines, args.answers, name, bar.update)
    told = f"{counts.answered} answered, {counts.errors} with an error, {counts.skipped} were there already"
    print(f"mmmamba: {told}; {args.answers}", file=sys.stderr)
    return 0


# info


def run_info(args: argparse.Namespace) -> int:
    """Print what a model costs, from its config and the headers of its files: no weights are read."""
    if args.context < 1 or not 0 <= args.image_tokens <= args.context:
        raise UsageError(
            f"--context {args.context} and --image-tokens {args.image_tokens} must satisfy "
            "context >= 1 and 0 <= image tokens <= context"
        )
    directory = resolve_checkpoint(args.model, revision=args.revision)
    config = read_config(directory)
    record = info_record(
        config,
        dtype=args.dtype,
        num_text_tokens=args.context - args.image_tokens,
        num_image_tokens=args.image_tokens,
    )
    record |= quantized_record(directory, tied=config.language.tie_word_embeddings)
    record = {"model": args.model, "directory": str(directory)} | record
    print(json.dumps(record, ensure_ascii=False) if args.json else info_text(record))
    return 0
