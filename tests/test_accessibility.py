"""The page under axe-core: no finding that is serious or worse, in both themes and widths, empty and with answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from app.engine import Engine
from app.ui import PageOptions, build, launch_options
from tests.fakes import FakeLoader

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    engine = Engine("fake", loader=FakeLoader())
    page = PageOptions(teacher="fake-hybrid,fake-teacher", likes=tmp_path_factory.mktemp("likes") / "likes.jsonl")
    blocks = build(engine, page)
    blocks.launch(prevent_thread_lock=True, quiet=True, **launch_options(engine))
    yield blocks.local_url
    blocks.close(verbose=False)


def findings(page: Page) -> list[str]:
    """What axe finds serious or critical: rule, element, and what to do."""
    results: dict[str, Any] = page.evaluate("() => axe.run(document, { resultTypes: ['violations'] })")
    assert len(results["passes"]) > 20, "axe has not looked at the page"
    return [
        f"{rule['id']} ({rule['impact']}): {node['html'][:200]} {node['failureSummary']}"
        for rule in results["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_serious_is_found(browser: Browser, url: str, theme: str, width: int) -> None:
    axe = Path(pytest.importorskip("axe_playwright_python").__file__).with_name("axe.min.js")
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(60_000)  # bounds a hang, also on a busy machine
    page.goto(f"{url}?__theme={theme}")
    page.wait_for_selector("#box textarea")
    page.add_script_tag(path=str(axe))
    found = {"empty": findings(page)}
    for _ in range(2):  # the first one becomes an earlier conversation
        page.click("#clear")
        page.wait_for_selector("#chat .hello")
        page.click("#example-shapes")
        page.wait_for_selector("#chat [data-testid=bot]:has-text('turn 1 images 1')")
        page.wait_for_selector("#box button.submit-button")
    page.wait_for_selector("#earlier .earlier-open")
    page.wait_for_selector("#box button.submit-button")
    page.fill("#box textarea", "[say] 88.")
    page.press("#box textarea", "Enter")
    page.locator("#chat [data-testid=bot]").nth(1).wait_for()
    page.wait_for_selector("#box button.submit-button")
    for part in ("settings", "camera", "keep", "switch"):
        page.click(f"#{part} > button")
    page.wait_for_selector("#switch-load")
    found["answered"] = findings(page)
    page.click("#compare-tab-button")
    page.click("#compare-shapes")
    page.wait_for_selector("#panel:has-text('The answers are equal.')")
    page.click("#grow-start")
    page.wait_for_selector("#growth .points tbody tr")
    page.click("#grow-stop")
    page.wait_for_selector("#growth:has-text('Stopped.')")
    page.wait_for_function(  # while it fades in, its contrast is that of a disabled one
        "(b => !b.disabled && getComputedStyle(b).opacity === '1')(document.querySelector('#grow-start'))"
    )
    found["compared"] = findings(page)
    page.close()
    assert {part: problems for part, problems in found.items() if problems} == {}
