"""Drive the page in headless Chromium with a real model, take its pictures, and time what a person waits for.

    python docs/screenshots.py [--model nano] [--device cpu] [--out docs]

Writes page.png (light), page-dark.png, page-phone.png (390 px wide), and of the comparison with a grown context
compare.png, compare-dark.png, compare-phone.png. Prints one JSON line: milliseconds from starting `app.py` to its first
answer over HTTP (`start_ms`), from opening the address to a box that can be typed in (`open_ms`), and of several
answers from the first computed token to the first visible one (`first_token_lag_ms`, the way from the Enter key to the
server included), from a click on stop to an open box (`stop_ms`), and the same while a long message is read
(`stop_reading_ms`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[1]
BOX, SEND, STOP = "#box textarea", "#box .submit-button", "#box .stop-button"
PICTURES = (("page", "light", 1280, 860), ("page-dark", "dark", 1280, 860), ("page-phone", "light", 390, 844))
TIMEOUT_MS = 300_000  # a large model on a CPU takes its time
STOPWATCH = """() => {
    window.opened = undefined;
    const clicked = () => { window.clicked = performance.now(); };
    document.querySelector("#box .stop-button").addEventListener("click", clicked);
    new MutationObserver((_, self) => {
        if (!document.querySelector("#box .submit-button")) return;
        window.opened = performance.now();
        self.disconnect();
    }).observe(document.body, { childList: true, subtree: true, attributes: true });
}"""
# True once the last answer holds words of the model rather than of the page.
ANSWERING = """(count) => {
    const texts = [...document.querySelectorAll("#chat [data-testid=bot]")].map((e) => e.innerText.trim());
    return texts.length === count && texts.at(-1) && !/^(Reading|Waiting|Loading)\\b.*…$/.test(texts.at(-1));
}"""


def open_page(browser: Browser, url: str, theme: str, width: int, height: int) -> tuple[Page, float]:
    page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=1)
    page.set_default_timeout(TIMEOUT_MS)
    started = time.perf_counter()
    page.goto(f"{url}?__theme={theme}")
    page.wait_for_selector(BOX)
    opened_ms = 1000 * (time.perf_counter() - started)
    page.wait_for_selector("#model .chip-ready")
    return page, opened_ms


def talk(page: Page) -> None:
    """An example and one more question about it, to their ends, with the picture still in view."""
    for i, what in enumerate(("#example-shapes", "What colour is the square?")):
        if what.startswith("#"):
            page.click(what)
        else:
            ask(page, what)
        page.wait_for_function(ANSWERING, arg=i + 1)
        page.wait_for_selector(SEND)
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)


def compare(page: Page) -> None:
    """Two questions to both models, and a context of 4,096 tokens."""
    page.click("#compare-tab-button")
    page.click("#compare-chart")
    page.wait_for_selector("#compare-box .stop-button")
    page.wait_for_selector("#compare-box .submit-button")
    page.fill("#compare-box textarea", "How many bars are there?")
    page.press("#compare-box textarea", "Enter")
    page.wait_for_selector("#compare-box .stop-button")
    page.wait_for_selector("#compare-box .submit-button")
    page.click("#grow-start")
    page.wait_for_selector("#growth:has-text('Done.')")
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)


def time_it(page: Page, times: int = 5) -> dict[str, list[int]]:
    """Milliseconds of `times` long answers, each stopped at its first visible words, and of as many long messages that
    are stopped while they are read."""
    found: dict[str, list[int]] = {"first_token_lag_ms": [], "stop_ms": [], "stop_reading_ms": []}
    for _ in range(times):
        started = ask(page, "Tell me a long story about a sailor and the sea.")
        page.wait_for_function(ANSWERING, arg=1, polling="raf")
        visible_ms = 1000 * (time.perf_counter() - started)
        computed_ms = 1000 * float(page.inner_text(".meter .cell-first b").removesuffix(" s"))
        found["first_token_lag_ms"].append(round(visible_ms - computed_ms))
        found["stop_ms"].append(stop(page))
        shown = page.locator("#chat [data-testid=bot]").last.inner_text()
        ask(page, "Go on.")
        page.wait_for_function(ANSWERING, arg=2)
        page.wait_for_selector(SEND)
        kept = page.locator("#chat [data-testid=bot]").first.inner_text()
        assert kept == shown, f"the stopped answer changed from {shown!r} to {kept!r}"
        new_chat(page)
        ask(page, "Say it in other words. " * 330)
        page.locator("#chat [data-testid=bot]").filter(has_text="Reading").wait_for()
        found["stop_reading_ms"].append(stop(page))
        new_chat(page)
    return found


def ask(page: Page, text: str) -> float:
    """Send a message; the moment at which the Enter key was pressed."""
    page.fill(BOX, text)
    started = time.perf_counter()
    page.press(BOX, "Enter")
    return started


def stop(page: Page) -> int:
    """Milliseconds from a click on stop to a box that is open."""
    # By the page's own clock: Playwright looks for what it waits for every half second only.
    page.evaluate(STOPWATCH)
    page.click(STOP)
    page.wait_for_function("window.opened !== undefined")
    return round(page.evaluate("window.opened - window.clicked"))


def new_chat(page: Page) -> None:
    page.click("#clear")
    page.wait_for_function("document.querySelectorAll('#chat [data-testid=bot]').length === 0")
    page.wait_for_timeout(1500)  # a piece of reading that was under way has ended by then


@contextmanager
def server(flags: list[str]) -> Iterator[str]:
    """`python app.py` in a process of its own, as people run it; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    process = subprocess.Popen([sys.executable, "app.py", "--port", str(port), *flags], cwd=ROOT)
    try:
        while True:
            try:
                urllib.request.urlopen(url).close()
                break
            except urllib.error.URLError:
                if process.poll() is not None:
                    raise SystemExit("app.py ended") from None
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def main() -> None:
    p = argparse.ArgumentParser(description="Take the pictures of the page for the documentation.")
    p.add_argument("--model", default="nano")
    p.add_argument("--device", default="cpu")
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--no-pictures", action="store_true", help="only time it")
    p.add_argument("--no-compare", action="store_true", help="leave the comparison out; it takes minutes on a CPU")
    p.add_argument("--out", type=Path, default=ROOT / "docs")
    args = p.parse_args()
    flags = ["--model", args.model, "--device", args.device, "--max-new-tokens", str(args.max_new_tokens)]
    started = time.perf_counter()
    with server(flags) as url, sync_playwright() as playwright:
        start_ms = 1000 * (time.perf_counter() - started)
        chromium = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page, opened_ms = open_page(browser, url, "light", 1280, 860)
        figures: dict[str, object] = {"start_ms": round(start_ms), "open_ms": round(opened_ms)}
        figures |= time_it(page)
        page.close()
        for name, theme, width, height in () if args.no_pictures else PICTURES:
            page, _ = open_page(browser, url, theme, width, height)
            talk(page)
            page.screenshot(path=args.out / f"{name}.png", full_page=width < 500)
            if not args.no_compare:
                compare(page)
                page.screenshot(path=args.out / f"{name.replace('page', 'compare')}.png", full_page=True)
            page.close()
        browser.close()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
