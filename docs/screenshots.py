"""Drive the page in headless Chromium with a real model, take its pictures, and time what a person waits for.

    python docs/screenshots.py [--model nano] [--device cpu] [--out docs]

Writes page.png (light), page-dark.png and page-phone.png (390 px wide); prints one JSON line: milliseconds from
starting `app.py` to its first answer over HTTP (`start_ms`), from opening the address to a box that can be typed in
(`open_ms`), from the first computed token to the first visible one
(`first_token_lag_ms`, the way from the Enter key to the server included), and from a click on stop to an open box
(`stop_ms`).
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
TIMEOUT_MS = 300_000  # a large model on a CPU takes its time
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
    """An example and two more questions about it, to their ends."""
    for i, ask in enumerate(("#example-scene", "How many blue squares are there?", "Which shape is left of the star?")):
        if ask.startswith("#"):
            page.click(ask)
        else:
            page.fill(BOX, ask)
            page.press(BOX, "Enter")
        page.wait_for_function(ANSWERING, arg=i + 1)
        page.wait_for_selector(SEND)
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)


def time_it(page: Page) -> dict[str, float]:
    """A long answer, stopped at its first visible words."""
    page.fill(BOX, "Tell me a long story about a sailor and the sea.")
    started = time.perf_counter()
    page.press(BOX, "Enter")
    page.wait_for_function(ANSWERING, arg=1, polling="raf")
    visible_ms = 1000 * (time.perf_counter() - started)
    computed_ms = 1000 * float(page.inner_text(".meter .cell-first b").removesuffix(" s"))
    started = time.perf_counter()
    page.click(STOP)
    page.wait_for_selector(SEND)
    return {
        "first_token_lag_ms": round(visible_ms - computed_ms),
        "stop_ms": round(1000 * (time.perf_counter() - started)),
    }


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
    p.add_argument("--out", type=Path, default=ROOT / "docs")
    args = p.parse_args()
    flags = ["--model", args.model, "--device", args.device, "--max-new-tokens", str(args.max_new_tokens)]
    started = time.perf_counter()
    with server(flags) as url, sync_playwright() as playwright:
        start_ms = 1000 * (time.perf_counter() - started)
        chromium = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page, opened_ms = open_page(browser, url, "light", 1280, 860)
        figures = {"start_ms": round(start_ms), "open_ms": round(opened_ms)} | time_it(page)
        page.close()
        for name, theme, width, height in (
            ("page", "light", 1280, 860),
            ("page-dark", "dark", 1280, 860),
            ("page-phone", "light", 390, 844),
        ):
            page, _ = open_page(browser, url, theme, width, height)
            talk(page)
            page.screenshot(path=args.out / f"{name}.png", full_page=width < 500)
            page.close()
        browser.close()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
