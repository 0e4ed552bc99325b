"""The tab that compares: one question to both models, and the context grown until one of them ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

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
from app.visits import Visits

log = logging.getLogger(__name__)

MIN_GAP_S = 0.12  # between two updates: each carries two charts
UNEXPECTED = "Something went wrong on the server. Try again."
TOO_FEW = "Choose two models or more to compare."
CHANGED = "Other models are compared now, so all of them begin a new conversation."
GOES_ON = "This is the comparison as it was. With the next question the models read it again, once."
LOST = (
    "What you see is kept, but the server no longer has this comparison: it was unused for long, or the server was "
    "started anew. With the next question all models begin a new one."
)
BEGUN_ANEW = (
    "The server no longer had this comparison: it was unused for long, or the server was started anew. So all models "
    "begin a new conversation."
)
# What the tab's own storage has: its name, and what was shown last.
STORED = """(tab, panel, growth) => {
    const random = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16)).join("-");
    const store = (name, value) => {
        try {
            if (value !== undefined) sessionStorage.setItem(name, JSON.stringify(value));
            return JSON.parse(sessionStorage.getItem(name));
        } catch {
            return null;
        }
    };
    tab = store("mmmamba-tab") ?? store("mmmamba-tab", random()) ?? "";
    return [tab, store("mmmamba-panel") ?? panel, store("mmmamba-growth") ?? growth];
}"""
STORE = """(panel, growth) => {
    window.mmmamba.store("mmmamba-panel", panel);
    window.mmmamba.store("mmmamba-growth", growth);
    window.mmmamba.settled();
}"""
# By default Gradio drops a message that comes before it was told the end of the last answer, a moment after the box has
# opened. This way it waits for that.
SENT: Literal["always_last"] = "always_last"
ANSWERED = """() => {
    document.querySelector("#compare-box textarea")?.focus({ preventScroll: true });
    window.mmmamba.ended();
}"""
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


class Panel:
    """Events of the tab, over one engine. A visitor's conversations are keyed by the browser's session."""

    def __init__(self, engine: Engine, sides: Sides, options: Options, states: Path | None) -> None:
        self.engine, self.sides, self.options = engine, sides, options
        self.states = states or scratch_folder("contexts")
        self.visits = Visits()

    # Compare

    def ask(
        self, message: dict[str, Any] | None, shown: list[str], request: gr.Request, *options: Any
    ) -> Iterator[tuple[Any, ...]]:
        """(box, panel, notice) while the models in `shown` answer."""
        text, files = (message or {}).get("text") or "", list((message or {}).get("files") or [])
        if text.strip() or files:
            yield from self._ask(text, files, shown, request, options)
        else:
            yield gr.skip(), gr.skip(), gr.skip()

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
        compare, note = self._compare(request, self.sides.called(shown_names))
        yield _box(False), gr.skip(), quiet(note)
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
        visit = self.visits.get(_session(request))
        if visit is not None and visit.compare is not None:
            visit.compare.stop()

    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        (self.visits.get(_session(request)) or self.visits.open(_session(request), "")).close()
        return _box(True, {"text": "", "files": []}), views.EMPTY_PANEL, ""

    def forget(self, request: gr.Request) -> None:
        """The tab was closed, or its connection broke."""
        self.visits.leave(_session(request))

    def opened(self, tab: str, panel: str, growth: str, request: gr.Request) -> tuple[Any, ...]:
        """(panel, notice, models, growth, csv, png) of a tab that was loaded, again perhaps: what it had. `panel` and
        `growth` are what its browser kept, shown if the server has nothing."""
        visit = self.visits.open(_session(request), tab or "")
        note, models, files = "", gr.skip(), (gr.skip(), gr.skip())
        if visit.compare is not None and (view := visit.compare.shown) is not None:
            panel, note = views.panel(view), quiet(GOES_ON)
            models = [Path(name).name for name in visit.compare.names]
        elif panel != views.EMPTY_PANEL:
            note = notice(LOST)
        if visit.grow is not None:
            growth, files = views.growth(visit.grow.growth), self._files(visit.grow.growth)
        return panel, note, models, growth, *files

    def _compare(self, request: gr.Request, names: tuple[str, ...]) -> tuple[Compare, str]:
        """The visitor's comparison of these models, and what is to be said of it. One of others ends for it: a model
        that did not read the questions before would have another context."""
        visit, note = self.visits.get(_session(request)), ""
        if visit is None:
            visit, note = self.visits.open(_session(request), ""), BEGUN_ANEW
        before = visit.compare
        if before is not None and before.names == names:
            return before, note
        if before is not None:
            note = CHANGED if any(chat.turns for chat in before.chats.values()) else note
            before.close()
        visit.compare = Compare(self.engine, names)
        return visit.compare, note

    # Grow the context

    def grow(
        self, longest: int, minutes: float, picture: str | None, shown_names: list[str], request: gr.Request
    ) -> Iterator[tuple[Any, Any, Any, Any, Any]]:
        """(start, stop, growth, csv, png) while the context grows."""
        visit = self.visits.get(_session(request)) or self.visits.open(_session(request), "")
        if visit.grow is not None and not visit.grow.growth.done:
            return
        grow = visit.grow = Grow(self.engine, self.sides.called(shown_names), self.states)
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
        visit = self.visits.get(_session(request))
        if visit is not None and visit.grow is not None:
            visit.grow.stop()

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


def _session(request: gr.Request) -> str:
    return str(request.session_hash)


def _box(open_: bool, value: dict[str, Any] | None = None) -> Any:
    changes: dict[str, Any] = {} if value is None else {"value": value}
    return gr.MultimodalTextbox(interactive=open_, submit_btn=open_, stop_btn=not open_, **changes)


def layout(
    demo: gr.Blocks, panel: Panel, options: list[Any], examples: Sequence[tuple[str, str]], folder: Path
) -> None:
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
    shown, kept = [box, out, fault], [out, grown]
    asked = [box.submit(panel.ask, [box, models, *options], shown, trigger_mode=SENT, **PRIVATE)]
    for button, (name, question) in zip(buttons, examples, strict=True):
        example = panel.example(question, [str(folder / name)])
        asked.append(button.click(example, [models, *options], shown, **PRIVATE))
    for answer in asked:
        answer.success(None, js=ANSWERED, **PRIVATE)
    box.stop(panel.stop, queue=False, **PRIVATE)
    asked.append(clear.click(panel.clear, None, shown, queue=False, **PRIVATE))
    asked.append(
        start.click(panel.grow, [longest, minutes, picture, models], [start, stop, grown, table, image], **PRIVATE)
    )
    stop.click(panel.stop_growing, queue=False, **PRIVATE)
    for event in asked:
        event.success(None, kept, None, js=STORE, **PRIVATE)
    tab = gr.Textbox(visible=False)
    load = [out, fault, models, grown, table, image]
    demo.load(panel.opened, [tab, *kept], load, js=STORED, queue=False, **PRIVATE)
