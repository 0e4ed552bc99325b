"""Record the comparison as a moving picture for the documentation, as it runs, with a real model in headless Chromium.

    python docs/record.py [--model nano] [--device cpu] [--out docs/compare.gif]

Five questions to both models, and their context grown to 4,096 tokens; time in the picture is time as it was, waits for
loading left out.
"""

from __future__ import annotations

import argparse
import io
import itertools
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from screenshots import ROOT, open_page, server

WIDTH, HEIGHT = 1000, 1160
SHOWN_WIDTH = 720
GAP_S = 0.25  # between two pictures
COLOURS = 224
QUESTIONS = (
    "#compare-chart",
    "How many bars are there?",
    "What is the value of East?",
    "Which has the smallest value?",
)
SETTLE_MS = 400  # what fades in at the end has done so
LOOK_S, END_S = 1.0, 4.0  # to look at an answer, and at the end


Frames = list[tuple[float, Image.Image]]


def watch(page: Page, busy: Callable[[], bool]) -> Frames:
    """(seconds, picture) until it is over; the last picture shows the end."""
    frames: Frames = []
    going = True
    while going:
        going = not frames or busy()  # looked at first
        page.wait_for_timeout(0 if going else SETTLE_MS)
        frames.append((time.perf_counter(), Image.open(io.BytesIO(page.screenshot()))))
        page.wait_for_timeout(1000 * GAP_S)
    return frames


def ask(page: Page, question: str) -> Frames:
    """While both models answer, from the click on."""
    if question.startswith("#"):
        page.click(question)
    else:
        page.fill("#compare-box textarea", question)
        page.press("#compare-box textarea", "Enter")
    return watch(page, lambda: page.locator("#compare-box .stop-button").count() > 0)


def grow(page: Page) -> Frames:
    """While the context grows to 4,096 tokens."""

    def growing() -> bool:
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")  # its charts come below
        return not page.locator("#growth:has-text('Done.')").count()

    page.click("#grow-start")
    return watch(page, growing)


def save(frames: Frames, path: Path) -> None:
    """As a GIF of one palette; equal pictures in a row are one that stays."""
    height = round(SHOWN_WIDTH * HEIGHT / WIDTH)
    small = [image.convert("RGB").resize((SHOWN_WIDTH, height), Image.Resampling.LANCZOS) for _, image in frames]
    # One palette, of pictures from all along: the last alone may lack a colour.
    some = small[:: max(1, len(small) // 8)]
    strip = Image.new("RGB", (SHOWN_WIDTH, height * len(some)))
    for i, image in enumerate(some):
        strip.paste(image, (0, height * i))
    palette = strip.quantize(COLOURS)
    pictures = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in small]
    times = [seconds for seconds, _ in frames]
    durations = [round(1000 * (after - before)) for before, after in itertools.pairwise(times)]
    durations.append(round(1000 * END_S))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True)


def main() -> None:
    p = argparse.ArgumentParser(description="Record the comparison as a moving picture.")
    p.add_argument("--model", default="nano")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", type=Path, default=ROOT / "docs" / "compare.gif")
    args = p.parse_args()
    flags = ["--model", args.model, "--device", args.device, "--max-new-tokens", "64"]
    with server(flags) as url, sync_playwright() as playwright:
        chromium = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        warm, _ = open_page(browser, url, "light", WIDTH, HEIGHT)
        warm.click("#compare-tab-button")
        ask(warm, QUESTIONS[0])  # loads the teacher too
        warm.close()
        page, _ = open_page(browser, url, "light", WIDTH, HEIGHT)
        page.click("#compare-tab-button")
        page.wait_for_timeout(500)
        frames: Frames = []
        for show in (*(partial(ask, page, question) for question in QUESTIONS), partial(grow, page)):
            shift = time.perf_counter() - (frames[-1][0] + LOOK_S) if frames else 0.0
            frames += [(seconds - shift, image) for seconds, image in show()]
        browser.close()
    save(frames, args.out)
    lasted = frames[-1][0] - frames[0][0]
    print(f"{args.out}: {len(frames)} pictures, {lasted:.0f} s, {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
