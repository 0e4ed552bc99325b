"""Layout of the page and wiring of its events; what they do is in `handlers` and `panel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from app import endpoints, panel, views
from app.chat import Metrics
from app.engine import Engine
from app.handlers import Handlers, box_open
from app.keeping import Keeping
from app.likes import Likes
from app.openai_api import OpenAIAPI
from app.options import Options
from app.precision import offered
from app.sides import known_models, sides_of
from app.theme import CSS_PATH, theme
from app.video import EXTENSIONS

EXAMPLES_DIR = Path(__file__).with_name("examples")
# (file in EXAMPLES_DIR or none, question): what the small model can really do.
EXAMPLES: tuple[tuple[str, str], ...] = (
    ("shapes.png", "How many circles are there?"),
    ("scene.png", "Are there more triangles than stars?"),
    ("chart.png", "What is the value of East?"),
    ("sign.png", "What does the sign say?"),
    ("umbrella.png", "What does this icon show?"),
    ("flag.png", "Which flag is this?"),
    ("pyramid.jpg", "What is in the picture?"),
    ("sunflower.jpg", "What is this?"),
    ("", "What is the capital of France?"),
)
COMPARED = (("chart.png", "What is the title of the chart?"), ("shapes.png", "How many circles are there?"))
INTRO = (
    "Ask about a picture. mmMamba reads images and words into a memory of constant size: "
    "the conversation grows, the memory and the time for each word do not."
)
HELLO = (
    '<div class="hello"><b>Upload or paste a picture and ask about it,</b><br>or begin with one of the examples.</div>'
)
ON_LOAD = Path(__file__).with_name("page.js").read_text("utf-8")
EARLIER = Path(__file__).with_name("earlier.js").read_text("utf-8")
EARLIER_HTML = """<section id="earlier" aria-labelledby="earlier-title" hidden>
<div><h2 id="earlier-title">Earlier conversations</h2><button type="button" id="earlier-clear">Delete all</button></div>
<ul></ul>
<p>Kept in this browser only: the newest 50, at most 50 MB.</p>
</section><p id="earlier-said" role="status"></p>"""
KEPT_JS = "(record) => window.mmmamba.chats.keep(record)"
OPENED_JS = "(how) => window.mmmamba.chats.opened(how)"
WANTED_JS = "() => window.mmmamba.chats.wanted()"
LEFT_JS = "() => window.mmmamba.chats.leave()"
ANSWERED = """() => {
    document.querySelector("#box textarea")?.focus({ preventScroll: true });
    window.mmmamba.settled();
}"""
DOWNLOAD = "() => setTimeout(() => document.querySelector('#download')?.click(), 300)"
LATEX: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
MAX_FILE_SIZE = "64mb"  # saved conversations; images are held to 20 MB by mmmamba.image
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True)
class PageOptions:
    """What the page offers. `teacher` None is the known one of the model, "" leaves the comparison out; `switch` lets
    visitors load other models for everybody; `contexts` keeps states of grown contexts for later starts, `likes` thumbs
    up and down (None: there are none)."""

    teacher: str | None = None
    switch: bool = True
    contexts: Path | None = None
    likes: Path | None = None


def build(engine: Engine, page: PageOptions | None = None) -> gr.Blocks:
    """The page over `engine`, not yet launched. Loads no model: that starts when a tab is opened."""
    page = page or PageOptions()
    options = Options(engine.limits)
    handlers = Handlers(engine, options, None if page.likes is None else Likes(page.likes))
    sides = sides_of(engine.model, page.teacher)
    engine.models.together = sides.names
    with gr.Blocks(title="mmMamba", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as demo:
        with gr.Row(elem_id="head"):
            gr.Markdown(f"# mmMamba\n{INTRO}", elem_id="intro")
            status = gr.HTML(handlers.status(), elem_id="model")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Chat", id="chat"), gr.Row(elem_id="main"):
                inputs = _chat(demo, handlers, page, status)
            compare = panel.Panel(engine, sides, options, page.contexts)
            if len(sides.names) > 1:
                with gr.Tab("Compare with the teacher", id="compare", elem_id="compare-tab"):
                    panel.layout(demo, compare, inputs, COMPARED, EXAMPLES_DIR)
        for block in list(demo.blocks.values()):
            # Gradio deletes what is a day old, its copies of the pictures on buttons too; these are for every visitor.
            if isinstance(block, gr.Button) and block.icon:
                block.keep_in_cache.add(block.icon["path"])
        demo.unload(handlers.forget)
        demo.unload(compare.forget)
        endpoints.layout(endpoints.Endpoints(engine, sides, compare.states), engine.limits)
        timer = gr.Timer(0.5)
        timer.tick(handlers.tick, None, [status, timer], queue=False, **PRIVATE)
    demo.queue(max_size=64, default_concurrency_limit=24)
    return demo


def _chat(demo: gr.Blocks, handlers: Handlers, page: PageOptions, status: gr.HTML) -> list[Any]:
    """The tab of the chat; returns the components of the options."""
    limits, keeping = handlers.engine.limits, Keeping(handlers)
    with gr.Column(scale=5, min_width=320, elem_id="talk"):
        # How a conversation travels between the server and earlier.js. Not inside an accordion: what is folded away is
        # not there for the browser, and would keep nothing.
        record = gr.Textbox(visible="hidden", elem_id="record")
        branch = gr.Dropdown([], label="Branch", elem_id="branch", visible=False, interactive=True)
        chat = gr.Chatbot(
            elem_id="chat",
            label="Conversation",
            show_label=False,
            height=None,  # style.css has it
            buttons=["copy"],
            allow_file_downloads=False,
            editable="user",
            latex_delimiters=LATEX,
            placeholder=HELLO,
        )
        meter = gr.HTML(views.meter(Metrics(), None), elem_id="meter")
        notice = gr.HTML("", elem_id="notice")
        box = gr.MultimodalTextbox(
            elem_id="box",
            label="Your message",
            show_label=False,
            placeholder="Ask about a picture …",
            sources=["upload"],
            file_types=["image", *EXTENSIONS],
            file_count="multiple",
            max_lines=8,
            max_plain_text_length=limits.max_text_chars,
        )
    with gr.Column(scale=2, min_width=280, elem_id="side"):
        clear = gr.Button("New chat", elem_id="clear")
        gr.HTML(EARLIER_HTML, elem_id="earlier-list")
        reopen = gr.Button(visible="hidden", elem_id="earlier-go")
        with gr.Row(elem_id="examples"):
            examples = [
                gr.Button(
                    question, icon=EXAMPLES_DIR / name if name else None, elem_id=f"example-{elem_id}", min_width=110
                )
                for elem_id, (name, question) in zip(_example_ids(), EXAMPLES, strict=True)
            ]
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            inputs = handlers.options.layout()
            frames = gr.Slider(
                1, limits.max_images, min(4, limits.max_images), step=1, label="Frames of a video", buttons=[]
            )
        with gr.Accordion("Camera", open=False, elem_id="camera"):
            camera = gr.Image(type="filepath", sources=["webcam"], label="Camera", height=220)
            use = gr.Button("Put it into the message", elem_id="camera-use")
        with gr.Accordion("Save and open", open=False, elem_id="keep"):
            keep = _keeping(keeping, [box, chat, meter, notice, branch], inputs, record)
        if page.switch:
            with gr.Accordion("Model", open=False, elem_id="switch"):
                _switching(handlers, status, notice)
    shown = [box, chat, meter, notice, branch]
    # Each of these opens the box itself, whatever happens. Their order is kept by the engine, not by Gradio's queue.
    answers = [
        box.submit(handlers.ask, [box, frames, *inputs], shown, trigger_mode=panel.SENT, **PRIVATE),
        chat.retry(handlers.retry, inputs, shown, **PRIVATE),
        chat.edit(handlers.edit, inputs, shown, **PRIVATE),
    ]
    for button, (name, question) in zip(examples, EXAMPLES, strict=True):
        files = [str(EXAMPLES_DIR / name)] if name else []
        answers.append(button.click(handlers.example(question, files), inputs, shown, **PRIVATE))
    for answer in answers:
        answer.success(None, js=ANSWERED, **PRIVATE)
        _remember(answer.success, keeping, [keep, *inputs], record)
    box.stop(handlers.stop, queue=False, **PRIVATE)
    for event in (clear.click, chat.clear):
        event(handlers.clear, None, shown, queue=False, **PRIVATE).success(None, js=LEFT_JS, **PRIVATE)
    reopen.click(keeping.reopen, record, [*shown, *inputs, record], js=WANTED_JS, **PRIVATE).success(
        None, record, js=OPENED_JS, **PRIVATE
    ).success(None, js=ANSWERED, **PRIVATE)
    back = [
        chat.undo(handlers.undo, None, shown, queue=False, **PRIVATE),
        branch.input(handlers.pick, branch, shown, queue=False, **PRIVATE),
    ]
    for event in back:
        _remember(event.success, keeping, [keep, *inputs], record)
    if page.likes is not None:
        chat.like(handlers.like, None, notice, queue=False, **PRIVATE)
    use.click(_add_picture, [camera, box], box, queue=False, **PRIVATE)
    demo.load(None, js=ON_LOAD, **PRIVATE)
    demo.load(
        handlers.opened, record, [status, chat, meter, notice, branch, record], js=EARLIER, queue=False, **PRIVATE
    ).success(None, record, js=OPENED_JS, **PRIVATE)
    return inputs


def _remember(event: Callable[..., Any], keeping: Keeping, inputs: list[Any], record: gr.Textbox) -> None:
    """After `event`, have the browser keep the conversation as it is now."""
    event(keeping.remember, inputs, record, queue=False, **PRIVATE).success(None, record, js=KEPT_JS, **PRIVATE)


def _example_ids() -> list[str]:
    """`shapes`, `shapes-2`, ...: the picture's name, numbered where it comes again; `words` without a picture."""
    stems = [Path(name).stem or "words" for name, _ in EXAMPLES]
    return [stem if not (n := stems[:i].count(stem)) else f"{stem}-{n + 1}" for i, stem in enumerate(stems)]


def _keeping(keeping: Keeping, shown: list[Any], inputs: list[Any], record: gr.Textbox) -> gr.Checkbox:
    """Files of the conversation, and what the browser keeps of it."""
    notice = shown[3]
    how = gr.Radio(
        [("JSON", "json"), ("Markdown", "markdown"), ("With its memory", "state")],
        value="json",
        label="Save as",
        info="With its memory: goes on at once, on any machine with this model",
        elem_id="save-how",
    )
    save = gr.Button("Save the conversation", elem_id="save")
    download = gr.DownloadButton("Download", elem_id="download")
    opened = gr.UploadButton("Open a saved conversation", file_types=[".json", ".mmmamba"], elem_id="open")
    keep = gr.Checkbox(True, label="Keep it in this browser", info="For a reload, and for later", elem_id="remember")
    save.click(keeping.save, [how, *inputs], [download, notice], **PRIVATE).success(None, js=DOWNLOAD, **PRIVATE)
    load = opened.upload(keeping.open, opened, [*shown, *inputs, record], **PRIVATE)
    _remember(load.success(None, record, js=OPENED_JS, **PRIVATE).success, keeping, [keep, *inputs], record)
    _remember(keep.input, keeping, [keep, *inputs], record)
    return keep


def _switching(handlers: Handlers, status: gr.HTML, notice: gr.HTML) -> None:
    """Another model or precision, for everybody on this server."""
    models = handlers.engine.models
    model = gr.Dropdown(
        known_models(),
        value="nano-linear" if models.model == "nano" else models.model,
        allow_custom_value=True,
        label="Model",
        info="Bundled name, directory or hub id",
        elem_id="switch-model",
    )
    precision = gr.Dropdown(
        offered(models.device),
        value=models.precision,
        label="Precision",
        info="Of the weights; auto: 4 bits where that loses nothing",
        elem_id="switch-precision",
    )
    need = gr.HTML("", elem_id="switch-need")
    load = gr.Button("Load", elem_id="switch-load")
    gr.on([model.input, precision.input], handlers.need, [model, precision], need, queue=False, **PRIVATE)
    load.click(handlers.need, [model, precision], need, queue=False, **PRIVATE).then(
        handlers.switch, [model, precision], [load, status, notice], **PRIVATE
    )


def _add_picture(picture: str | None, message: dict[str, Any] | None) -> Any:
    """The camera's picture beside what is in the message box already."""
    if not picture:
        return gr.skip()
    message = message or {}
    return box_open(message.get("text") or "", [*(message.get("files") or []), picture])


def launch_options(engine: Engine, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Arguments of `launch` that belong to the page rather than to the machine it runs on. `keys` open OpenAI's routes;
    without any they are open."""
    return {
        "app_kwargs": {"routes": OpenAIAPI(engine, keys).routes()},
        "ssr_mode": False,  # its server in front would not know these routes
        "theme": theme(),
        "css_paths": [CSS_PATH],
        "footer_links": ["api"],
        "run_history": False,
        "max_file_size": MAX_FILE_SIZE,
        "allowed_paths": [str(EXAMPLES_DIR)],
    }
