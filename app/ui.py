"""Layout of the page and wiring of its events; what they do is in `handlers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app import views
from app.chat import Metrics
from app.engine import Engine, Limits, Settings
from app.handlers import Handlers
from app.theme import CSS_PATH, theme

EXAMPLES_DIR = Path(__file__).with_name("examples")
# (file in EXAMPLES_DIR, question)
EXAMPLES = (
    ("shapes.png", "How many circles are there?"),
    ("scene.png", "Describe the picture."),
    ("pyramid.jpg", "What is in the picture?"),
    ("sunflower.jpg", "What is this?"),
)
INTRO = (
    "Ask about a picture. mmMamba reads images and words into a memory of constant size: "
    "the conversation grows, the memory and the time for each word do not."
)
HELLO = (
    '<div class="hello"><b>Upload or paste a picture and ask about it,</b><br>or begin with one of the examples.</div>'
)
# Names for screen readers where Gradio leaves them out: the message box, and pictures in the conversation.
NAME_PARTS = """() => {
    const name = () => {
        document.querySelector("#box textarea")?.setAttribute("aria-label", "Your message");
        for (const picture of document.querySelectorAll('#chat img[alt=""]'))
            picture.alt = decodeURIComponent(picture.src.split("/").pop());
    };
    name();
    new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
}"""
FOCUS = "() => document.querySelector('#box textarea')?.focus({ preventScroll: true })"
MAX_FILE_SIZE = "20mb"  # as mmmamba.image takes them
SLIDER: dict[str, Any] = {"buttons": []}


def build(engine: Engine) -> gr.Blocks:
    """The page over `engine`, not yet launched. Loads no model: that starts when a tab is opened."""
    handlers = Handlers(engine)
    with gr.Blocks(title="mmMamba", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as demo:
        with gr.Row(elem_id="head"):
            gr.Markdown(f"# mmMamba\n{INTRO}", elem_id="intro")
            status = gr.HTML(handlers.status(), elem_id="model")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=5, min_width=320, elem_id="talk"):
                chat = gr.Chatbot(
                    elem_id="chat",
                    label="Conversation",
                    show_label=False,
                    height=None,  # style.css has it
                    buttons=["copy"],
                    allow_file_downloads=False,
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
                    file_types=["image"],
                    file_count="multiple",
                    max_lines=8,
                    max_plain_text_length=engine.limits.max_text_chars,
                )
            with gr.Column(scale=2, min_width=280, elem_id="side"):
                clear = gr.Button("New chat", elem_id="clear")
                with gr.Row(elem_id="examples"):
                    examples = [
                        gr.Button(
                            question, icon=EXAMPLES_DIR / name, elem_id=f"example-{Path(name).stem}", min_width=110
                        )
                        for name, question in EXAMPLES
                    ]
                with gr.Accordion("Settings", open=True, elem_id="settings"):
                    options = _options(engine.limits)
        page = [box, chat, meter, notice]
        _wire(demo, handlers, page, options, examples, clear, status)
        _endpoint(handlers, engine.limits)
    demo.queue(max_size=64, default_concurrency_limit=24)
    return demo


def _wire(
    demo: gr.Blocks,
    handlers: Handlers,
    page: list[Any],
    options: list[Any],
    examples: list[gr.Button],
    clear: gr.Button,
    status: gr.HTML,
) -> None:
    box, chat, meter, _ = page
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    # Each of these opens the box itself, whatever happens. Their order is kept by the engine, not by Gradio's queue.
    answers = [
        box.submit(handlers.ask, [box, *options], page, **private),
        chat.retry(handlers.retry, options, page, **private),
    ]
    for button, (name, question) in zip(examples, EXAMPLES, strict=True):
        ask = handlers.example(question, [str(EXAMPLES_DIR / name)])
        answers.append(button.click(ask, options, page, **private))
    for answer in answers:
        answer.success(None, js=FOCUS, **private)
    box.stop(handlers.stop, queue=False, **private)
    clear.click(handlers.clear, None, page, queue=False, **private)
    chat.clear(handlers.clear, None, page, queue=False, **private)
    timer = gr.Timer(0.5)
    timer.tick(handlers.tick, None, [status, timer], queue=False, **private)
    demo.load(handlers.opened, None, [status, meter], queue=False, js=NAME_PARTS, **private)
    demo.unload(handlers.forget)


def _options(limits: Limits) -> list[Any]:
    """Inputs for how to answer, in the order of the handlers' parameters."""
    default = Settings()
    return [
        gr.Slider(0, 2, default.temperature, step=0.05, label="Temperature", info="Higher is more varied", **SLIDER),
        gr.Slider(0.05, 1, default.top_p, step=0.05, label="Top-p", info="Likeliest words up to this sum", **SLIDER),
        gr.Slider(
            1,
            limits.max_new_tokens,
            min(default.max_new_tokens, limits.max_new_tokens),
            step=1,
            label="Max new tokens",
            info="Longest answer",
            **SLIDER,
        ),
        gr.Slider(
            0,
            limits.max_tiles,
            default.max_tiles,
            step=1,
            label="Max tiles",
            info="Pieces of a picture; 0: as trained",
            **SLIDER,
        ),
        gr.Checkbox(default.greedy, label="Greedy", info="Always the likeliest word"),
    ]


def _endpoint(handlers: Handlers, limits: Limits) -> None:
    """`/chat` for scripts. Components of its own: they check the files' types and the numbers' ranges on the server."""
    default = Settings()
    hidden: dict[str, Any] = {"visible": False}
    inputs = [
        gr.MultimodalTextbox(label="message", file_types=["image"], file_count="multiple", **hidden),
        gr.Textbox("", label="session_id", **hidden),
        gr.Slider(0, 2, default.temperature, label="temperature", **hidden),
        gr.Slider(0.01, 1, default.top_p, label="top_p", **hidden),
        gr.Slider(
            1,
            limits.max_new_tokens,
            min(default.max_new_tokens, limits.max_new_tokens),
            label="max_new_tokens",
            **hidden,
        ),
        gr.Slider(0, limits.max_tiles, default.max_tiles, label="max_tiles", **hidden),
        gr.Checkbox(default.greedy, label="greedy", **hidden),
        gr.Number(None, label="seed", **hidden),
    ]
    answer = gr.JSON(label="answer", **hidden)
    gr.Button(**hidden).click(handlers.chat, inputs, answer, api_name="chat", api_visibility="public")


def launch_options() -> dict[str, Any]:
    """Arguments of `launch` that belong to the page rather than to the machine it runs on."""
    return {
        "theme": theme(),
        "css_paths": [CSS_PATH],
        "footer_links": ["api"],
        "run_history": False,
        "max_file_size": MAX_FILE_SIZE,
        "allowed_paths": [str(EXAMPLES_DIR)],
    }
