"""The page in a real browser, offline: no errors, tables sort and filter, nothing overflows a narrow
screen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.regraft.report.sample import sample

CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian package: chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    with api.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(params=[1280, 400], ids=["wide", "narrow"])
def page(request: pytest.FixtureRequest, browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The sample report at one width; fails at the end when the console showed anything or a request left the
    file."""
    sample().save_html(tmp_path / "report.html")
    context = browser.new_context(viewport={"width": request.param, "height": 900}, offline=True)
    opened = context.new_page()
    faults: list[str] = []
    opened.on("console", lambda message: faults.append(message.text))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on(
        "request",
        lambda asked: None if asked.url.startswith(("file:", "data:")) else faults.append(asked.url),
    )
    opened.goto((tmp_path / "report.html").as_uri())
    yield opened
    context.close()
    assert faults == []


def shown(page: Any, table: str) -> list[str]:
    """First cells of the rows of a table that are visible."""
    return [text.strip() for text in page.locator(f"#{table} tbody tr:visible td:first-child").all_inner_texts()]


def test_nothing_overflows(page: Any) -> None:
    for details in page.locator("details").all():
        details.evaluate("element => { element.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_filter_leaves_rows_that_hold_every_word(page: Any) -> None:
    page.fill('input[data-for="refused-table"]', "SOFTMAX dimension")
    assert shown(page, "refused-table") == ["fuse-attention"]
    assert page.inner_text('output[data-count="refused-table"]') == "1 of 2"
    page.fill('input[data-for="refused-table"]', "site-packages")  # in the full path, which the title holds
    assert shown(page, "refused-table") == ["fuse-attention"]
    page.fill('input[data-for="refused-table"]', "")
    assert len(shown(page, "refused-table")) == 2


def test_a_heading_sorts_its_column_and_turns_the_order(page: Any) -> None:
    heading = page.locator("#totals th", has_text="Before").filter(has_not_text="Calls")
    if not heading.is_visible():
        return  # narrow screens show cards without headings
    heading.locator("button").click()
    assert shown(page, "totals")[:3] == ["linear", "softmax", "pow"]
    heading.locator("button").click()
    assert shown(page, "totals")[-1] == "linear"
    assert heading.get_attribute("aria-sort") == "ascending"


def test_both_colour_schemes_differ(page: Any) -> None:
    colours = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2


def test_user_text_is_no_markup(page: Any) -> None:
    assert page.locator("h1 b").count() == 0
    assert "<b>bold</b>" in page.inner_text("h1")


def test_words_are_not_broken_and_small_tables_stay_tables(page: Any) -> None:
    heights = page.eval_on_selector_all("#fired-table td.word", "cells => cells.map(cell => cell.clientHeight)")
    assert heights and max(heights) < 45  # one line
    assert page.locator("#sites thead").is_visible()
    names = page.eval_on_selector_all(
        "#time .bars .name", "names => names.map(name => [name.scrollWidth, name.clientWidth])"
    )
    assert names and all(needed <= given for needed, given in names)
