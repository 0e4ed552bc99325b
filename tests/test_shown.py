"""What visitors send is shown as they sent it, whatever it holds, and read by the model and saved as it came."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from app import views
from app.engine import Engine
from app.shown import as_seen, as_typed, typed
from app.ui import EXAMPLES_DIR, PageOptions, build, launch_options
from tests.fakes import FakeLoader

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BOX = "#box textarea"
HTML = (
    'Say <b>bold</b> <img src=x onerror="window.hacked = 1"> <h1>big</h1> &lt; &copy; ![p](https://example.org/p.png)'
)
CODE = """What does this do?
```html
<div class="a">
    <p>1 < 2 && 3 > 2 &amp; so on</p>
</div>
```"""
FORMATS = [("tiff", False), ("ppm", False), ("png", True), ("bmp", True), ("gif", True)]


@pytest.mark.parametrize("text", [HTML, CODE, "<!-- a -->", "a <= b && c", "</div", "<?php", "", "no <3 marks!"])
def test_a_mark_before_what_would_be_html_comes_off_again(text: str) -> None:
    assert typed(as_typed(text)) == text


def test_only_what_would_be_html_is_marked() -> None:
    for text in ("a < b && c > d", "I <3 you!", "AT&T, R & D", r"\\(x < y\\)", "**bold** `code`"):
        assert as_typed(text) == text
    content = views.user_message("  def f():\n      <b>", [])["content"]
    assert content == [{"type": "text", "text": "  def f():\n      <\u2060b>"}], "its indentation stays"


@pytest.mark.parametrize(("extension", "same"), FORMATS)
def test_a_picture_that_browsers_do_not_know_is_shown_as_a_copy(extension: str, same: bool, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{extension}"
    Image.new("RGB", (40, 30), "red").save(path)
    seen = as_seen(path)
    assert (seen == str(path)) is same
    with Image.open(seen) as shown:
        assert (shown.size, shown.convert("RGB").getpixel((1, 1))) == ((40, 30), (255, 0, 0))
        assert same or shown.format == "PNG"
    assert as_seen(path) == seen, "a copy of every message"
    if not same:
        shutil.rmtree(Path(seen).parent)
        assert Path(as_seen(path)).exists(), "its copy was a day old"


def test_a_name_tells_no_format_and_no_picture_stays_what_it_is(tmp_path: Path) -> None:
    named, letter = tmp_path / "picture.png", tmp_path / "letter.tiff"
    Image.new("L", (8, 8)).save(named, format="TIFF")
    letter.write_text("Dear Sir or Madam")
    assert as_seen(named) != str(named)
    assert as_seen(letter) == str(letter)
    assert as_seen("/gone.png") == "/gone.png"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Engine]]:
    engine = Engine("fake", loader=FakeLoader())
    blocks = build(engine, PageOptions(teacher=""))
    blocks.launch(prevent_thread_lock=True, quiet=True, **launch_options(engine))
    yield blocks.local_url, engine
    blocks.close(verbose=False)


@pytest.fixture
def page(browser: Browser, served: tuple[str, Engine]) -> Iterator[Page]:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(15_000)
    page.goto(served[0])
    page.wait_for_selector("#model .chip-ready")
    yield page
    context.close()


def ask(page: Page, text: str, answer: str) -> None:
    page.fill(BOX, text)
    page.press(BOX, "Enter")
    page.locator("#chat [data-testid=bot]").last.filter(has_text=answer).wait_for()
    page.wait_for_selector("#box button.submit-button")


def read(page: Page) -> str:
    """The words in the visitor's last bubble."""
    return typed(page.locator("#chat [data-testid=user]").last.inner_text().strip())


@pytest.mark.browser
def test_html_is_shown_copied_and_edited_as_it_was_typed(page: Page, served: tuple[str, Engine]) -> None:
    outside: list[str] = []
    page.on("request", lambda request: outside.append(request.url) if "example.org" in request.url else None)
    ask(page, HTML, "turn 1 images 0")
    for who in ("user", "bot"):  # the answer repeats it
        assert page.locator(f"#chat [data-testid={who}]").last.locator("b, img, h1").count() == 0
    assert read(page) == HTML.replace("![p](https://example.org/p.png)", "!p"), "a picture of Markdown is a link"
    assert page.evaluate("window.hacked") is None
    assert not outside
    ((_, chat),) = served[1].chats._open.items()
    assert chat.turns[0].text == HTML, "the model reads, and a file gets, what was typed"
    page.locator("#chat button[aria-label='Copy message']").first.click()
    page.wait_for_function("async text => await navigator.clipboard.readText() === text", arg=HTML)
    page.locator("#chat button[aria-label=Edit]").first.click()
    assert typed(page.input_value("#chat textarea.edit-textarea")) == HTML
    page.focus("#chat textarea.edit-textarea")
    page.keyboard.press("Control+End")
    page.keyboard.type(" again")
    page.click("#chat button[aria-label=Submit]")
    page.locator("#chat [data-testid=bot]").last.filter(has_text="again").wait_for()
    assert chat.turns[0].text == f"{HTML} again"


@pytest.mark.browser
def test_code_stays_readable_and_is_selected_as_it_was_typed(page: Page) -> None:
    ask(page, CODE, "turn 1 images 0")
    code = page.locator("#chat [data-testid=user] pre code")
    assert typed(code.inner_text()).strip() == CODE.partition("```html\n")[2].removesuffix("\n```")
    code.evaluate("e => getSelection().selectAllChildren(e)")
    page.keyboard.press("Control+c")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert '<div class="a">' in copied
    assert "\u2060" not in copied


@pytest.mark.browser
def test_a_tiff_is_seen(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "pyramid.tiff"
    with Image.open(EXAMPLES_DIR / "pyramid.jpg") as picture:
        picture.save(path)
    page.set_input_files("#box input[type=file]", str(path))
    page.wait_for_function("document.querySelector('#box img')?.naturalWidth > 0")  # a sign for it
    ask(page, "what is this", "turn 1 images 1")
    page.wait_for_function("document.querySelector('#chat [data-testid=user] img')?.naturalWidth > 0")
