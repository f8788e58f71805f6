"""The page holds every section, escapes what it shows, and points nowhere outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from regraft.report import OperatorRow, Report
from regraft.report.budget import BudgetReport
from regraft.report.curve import curve_svg
from regraft.report.html import operator_totals, render, short_line
from regraft.report.roofline import points, roofline_svg
from tests.regraft.report.sample import sample

VOID = {"wbr", "meta", "link", "input", "rect", "line"}
SECTIONS = ["sites", "budget", "time", "roofline", "fired", "refused", "drift", "phases", "events", "environment"]


class Balance(HTMLParser):
    """Checks that elements close in order, and gathers what they point to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A void element opens nothing."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("report", [sample(), sample(measured=False), Report()], ids=["full", "unmeasured", "empty"])
def test_the_page_is_well_formed_and_complete(report: Report) -> None:
    page = render(report)
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    expected = [section for section in SECTIONS if section != "budget" or report.budget is not None]
    assert re.findall(r'<section id="(\w+)"', page) == expected
    assert all(link.startswith("#") or link == "data:," for link in parser.links)
    assert "@import" not in page and "url(" not in page


def test_text_of_the_model_is_escaped() -> None:
    page = render(sample())
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<b>bold" not in page and "tiny &amp; &lt;b&gt;bold&lt;/b&gt;" in page


def test_the_curve_of_a_budget_has_a_point_for_every_composition_that_holds_a_number() -> None:
    budget = sample().budget
    assert budget is not None
    plot = str(curve_svg(budget))
    assert plot.count("<circle") == 4 and "limit 0.001" in plot  # one of five lost beyond all bounds
    assert plot.count("<polyline") == 2
    assert curve_svg(BudgetReport("kl", 0.1)) is None


def test_a_name_in_the_plot_is_escaped() -> None:
    report = sample()
    report.operators_before = [OperatorRow("n", "<i>", flops=1.0, bytes=1.0, predicted_seconds=1.0)]
    assert "&lt;i&gt;" in str(roofline_svg(report))


def test_rows_name_rules_reasons_lines_and_drift() -> None:
    page = render(sample())
    for text in (
        "fuse-rms-norm",
        "softmax runs over dimension -2",
        "…/llama/modeling_llama.py:204 in forward",
        "rolled back",
        "4.0e-07",
        "input 0 has shape [2, 64]",
        "2.13.0",
        "1.39x",
    ):
        assert text in page


def test_operator_totals_join_calls_and_scale_to_the_longest() -> None:
    totals = {total.operator: total for total in operator_totals(sample())}
    assert totals["softmax"].before == 1.1e-3 and totals["softmax"].after == 1.0e-3
    assert totals["linear"].share_before == 100 and totals["linear"].calls_after == 0


def test_equal_work_is_one_point_at_its_rate() -> None:
    rows = [
        OperatorRow("a", "mm", flops=8.0, bytes=2.0, measured_seconds=4.0),
        OperatorRow("b", "mm", flops=8.0, bytes=2.0, measured_seconds=4.0),
        OperatorRow("v", "reshape"),
    ]
    (point,) = points(rows, "before")
    assert (point.calls, point.intensity, point.rate, point.seconds) == (2, 4.0, 2.0, 8.0)


def test_no_plot_without_rates_or_operators() -> None:
    assert roofline_svg(Report()) is None
    report = sample()
    report.operators_before, report.operators_after = [], []
    assert roofline_svg(report) is None


@pytest.mark.parametrize(
    ("line", "short"),
    [
        ("/a/b/c/model.py:3 in forward", "…/c/model.py:3 in forward"),
        ("model.py:3 in forward", "model.py:3 in forward"),
        ("", ""),
    ],
)
def test_long_paths_are_shown_short(line: str, short: str) -> None:
    assert short_line(line) == short
