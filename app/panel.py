"""The tab that compares: one question to both models, and the context grown until one of them ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from app import panel_views as views
from app.compare import Compare
from app.engine import Engine, EngineError, Settings
from app.grow import CONTEXTS, Grow, Growth
from app.options import Options
from app.scratch import scratch_folder
from app.sides import Sides, kind_of
from app.views import note as quiet
from app.views import notice

log = logging.getLogger(__name__)

MIN_GAP_S = 0.12  # between two updates: each carries two charts
UNEXPECTED = "Something went wrong on the server. Try again."
TOO_FEW = "Choose two models or more to compare."
CHANGED = "Other models are compared now, so all of them begin a new conversation."
FOCUS = "() => document.querySelector('#compare-box textarea')?.focus({ preventScroll: true })"
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


class Panel:
    """Events of the tab, over one engine. A visitor's conversations are keyed by the browser's session."""

    def __init__(self, engine: Engine, sides: Sides, options: Options, states: Path | None) -> None:
        self.engine, self.sides, self.options = engine, sides, options
        self.states = states or scratch_folder("contexts")
        self._compares: dict[str, Compare] = {}
        self._grows: dict[str, Grow] = {}

    # Compare

    def ask(
        self, message: dict[str, Any] | None, shown: list[str], request: gr.Request, *options: Any
    ) -> Iterator[tuple[Any, ...]]:
        """(box, panel, notice) while the models in `shown` answer."""
        text, files = (message or {}).get("text") or "", list((message or {}).get("files") or [])
        yield from self._ask(text, files, shown, request, options)

    def example(self, question: str, files: list[str]) -> Callable[..., Iterator[tuple[Any, ...]]]:
        """What the button of an example does. Nothing that a browser sends names its file."""

        def ask(shown: list[str], request: gr.Request, *options: Any) -> Iterator[tuple[Any, ...]]:
            yield from self._ask(question, files, shown, request, options)

        return ask

    def _ask(
        self, text: str, files: list[str], shown_names: list[str], request: gr.Request, options: Sequence[Any]
    ) -> Iterator[tuple[Any, ...]]:
        if len(shown_names) < 2:
            yield gr.skip(), gr.skip(), notice(TOO_FEW)
            return
        compare, changed = self._compare(request, self.sides.called(shown_names))
        yield _box(False), gr.skip(), quiet(CHANGED) if changed else ""
        fault, shown, last = "", "", 0.0
        try:
            settings = Settings.from_dict(self.options.values(options))
            for view in compare.ask(text, files, settings):
                if not view.done and time.monotonic() - last < MIN_GAP_S:
                    continue
                last, html = time.monotonic(), views.panel(view)
                yield gr.skip(), gr.skip() if html == shown else html, gr.skip()
                shown = html
        except EngineError as error:
            fault = str(error)
        except Exception:
            log.exception("a comparison failed")
            fault = UNEXPECTED
        given_back = {"text": text, "files": files} if fault else {"text": "", "files": []}
        yield _box(True, given_back), gr.skip(), notice(fault) if fault else gr.skip()

    def stop(self, request: gr.Request) -> None:
        if (compare := self._compares.get(str(request.session_hash))) is not None:
            compare.stop()

    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        self.forget(request)
        return _box(True, {"text": "", "files": []}), views.EMPTY_PANEL, ""

    def forget(self, request: gr.Request) -> None:
        """The tab was closed, or a new comparison begins."""
        key = str(request.session_hash)
        if (compare := self._compares.pop(key, None)) is not None:
            compare.close()
        if (grow := self._grows.pop(key, None)) is not None:
            grow.stop()

    def _compare(self, request: gr.Request, names: tuple[str, ...]) -> tuple[Compare, bool]:
        """The visitor's comparison of these models, and whether one of others ends for it: a model that did not read
        the questions before would have another context."""
        key = str(request.session_hash)
        before = self._compares.get(key)
        if before is not None and before.names == names:
            return before, False
        if before is not None:
            before.close()
        compare = self._compares[key] = Compare(self.engine, names)
        return compare, before is not None and any(chat.turns for chat in before.chats.values())

    # Grow the context

    def grow(
        self, longest: int, minutes: float, picture: str | None, shown_names: list[str], request: gr.Request
    ) -> Iterator[tuple[Any, Any, Any, Any, Any]]:
        """(start, stop, growth, csv, png) while the context grows."""
        key = str(request.session_hash)
        if key in self._grows and not self._grows[key].growth.done:
            return
        grow = self._grows[key] = Grow(self.engine, self.sides.called(shown_names), self.states)
        hide = gr.DownloadButton(visible=False)
        yield gr.Button(interactive=False), gr.Button(interactive=True), gr.skip(), hide, hide
        shown, last, view = "", 0.0, Growth()
        try:
            for view in grow.run(int(longest), 60 * float(minutes), picture or None):
                if not view.done and time.monotonic() - last < MIN_GAP_S:
                    continue
                last, html = time.monotonic(), views.growth(view)
                yield gr.skip(), gr.skip(), gr.skip() if html == shown else html, gr.skip(), gr.skip()
                shown = html
        except EngineError as error:
            shown = notice(str(error))
        except Exception:
            log.exception("growing the context failed")
            shown = notice(UNEXPECTED)
        # The files take a moment more; the buttons should not wait for them.
        yield gr.Button(interactive=True), gr.Button(interactive=False), shown, gr.skip(), gr.skip()
        yield gr.skip(), gr.skip(), gr.skip(), *self._files(view)

    def stop_growing(self, request: gr.Request) -> None:
        if (grow := self._grows.get(str(request.session_hash))) is not None:
            grow.stop()

    def _files(self, view: Growth) -> tuple[Any, Any]:
        """The measured points as a table and as a picture, if there are any."""
        if not view.points:
            return gr.skip(), gr.skip()
        from mmmamba.chart import png
        from mmmamba.sweep import charts, to_csv

        folder = scratch_folder("growth")
        table, picture = folder / "context.csv", folder / "context.png"
        table.write_text(to_csv(view.points), encoding="utf-8")
        held = [views.named(name, precision) for name, precision in view.precisions.items()]
        info = self.engine.info
        note = "; ".join([*held, *([] if info is None else [info.device])])
        picture.write_bytes(png(charts(view.points, view.predictions), note))
        return gr.DownloadButton(value=str(table), visible=True), gr.DownloadButton(value=str(picture), visible=True)


def _box(open_: bool, value: dict[str, Any] | None = None) -> Any:
    changes: dict[str, Any] = {} if value is None else {"value": value}
    return gr.MultimodalTextbox(interactive=open_, submit_btn=open_, stop_btn=not open_, **changes)


def layout(panel: Panel, options: list[Any], examples: Sequence[tuple[str, str]], folder: Path) -> None:
    """The tab's components and their events. `examples`: (file in `folder`, question)."""
    limits = panel.engine.limits
    contexts, most = [c for c in CONTEXTS if c <= limits.max_context], max(0.5, limits.max_minutes)
    with gr.Row(elem_id="compare-ask"):
        box = gr.MultimodalTextbox(
            elem_id="compare-box",
            label="Question to the models",
            show_label=False,
            placeholder="Ask the models about a picture …",
            sources=["upload"],
            file_types=["image"],
            file_count="multiple",
            max_lines=4,
            max_plain_text_length=panel.engine.limits.max_text_chars,
            scale=5,
        )
        clear = gr.Button("Start over", elem_id="compare-clear", scale=1, min_width=120)
    with gr.Row(elem_id="compare-examples"):
        buttons = [
            gr.Button(question, icon=folder / name, elem_id=f"compare-{Path(name).stem}", size="sm", min_width=120)
            for name, question in examples
        ]
    names = panel.sides.names
    models = gr.CheckboxGroup(
        [(views.described(name, kind_of(name)), Path(name).name) for name in names],
        value=[Path(name).name for name in panel.sides.usual],
        label="Models",
        info="Those that answer, and whose context grows",
        visible=len(names) > 2,
        elem_id="compare-models",
    )
    fault = gr.HTML("", elem_id="compare-notice")
    out = gr.HTML(views.EMPTY_PANEL, elem_id="panel")
    with gr.Column(elem_id="grow"):
        gr.Markdown("## Grow the context")
        with gr.Row():
            longest = gr.Dropdown(
                [(f"{c:,} tokens", c) for c in contexts],
                value=contexts[min(1, len(contexts) - 1)],
                label="Up to",
                info="Longer takes longer to read",
                elem_id="grow-longest",
            )
            minutes = gr.Slider(
                0.5,
                most,
                min(3.0, most),
                step=0.5,
                label="Minutes of reading",
                info="At most, for each model",
                buttons=[],
            )
        with gr.Accordion("Repeat a picture instead of text alone", open=False):
            picture = gr.Image(
                type="filepath", sources=["upload"], label="Picture to repeat", height=160, elem_id="grow-picture"
            )
        with gr.Row():
            start = gr.Button("Grow the context", variant="primary", elem_id="grow-start")
            stop = gr.Button("Stop", interactive=False, elem_id="grow-stop")
            table = gr.DownloadButton("Table (CSV)", visible=False, elem_id="grow-csv")
            image = gr.DownloadButton("Picture (PNG)", visible=False, elem_id="grow-png")
        grown = gr.HTML(views.EMPTY_GROWTH, elem_id="growth")
    shown = [box, out, fault]
    answers = [box.submit(panel.ask, [box, models, *options], shown, **PRIVATE)]
    for button, (name, question) in zip(buttons, examples, strict=True):
        example = panel.example(question, [str(folder / name)])
        answers.append(button.click(example, [models, *options], shown, **PRIVATE))
    for answer in answers:
        answer.success(None, js=FOCUS, **PRIVATE)
    box.stop(panel.stop, queue=False, **PRIVATE)
    clear.click(panel.clear, None, shown, queue=False, **PRIVATE)
    start.click(panel.grow, [longest, minutes, picture, models], [start, stop, grown, table, image], **PRIVATE)
    stop.click(panel.stop_growing, queue=False, **PRIVATE)
