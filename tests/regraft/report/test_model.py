"""A report counts, totals, and goes to JSON and back."""

from __future__ import annotations

import copy
import json
import math
import typing
from pathlib import Path

import jsonschema
import pytest

from regraft.files import replacing
from regraft.ir.records import Log
from regraft.report import Event, Report, ReportError
from regraft.report.serialize import schema
from tests.regraft.report.sample import application, sample


def valid(report: Report) -> None:
    """Validate what a reader of the file would see."""
    text = json.dumps(report.to_json(), allow_nan=False)
    jsonschema.Draft202012Validator(schema()).validate(json.loads(text))


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("report", [sample(), sample(measured=False), Report()], ids=["full", "unmeasured", "empty"])
def test_reports_keep_the_schema_and_come_back_equal(report: Report) -> None:
    valid(report)
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_odd_numbers_survive_json() -> None:
    report = Report(end_to_end_drift=math.inf, log=Log(applications=[application(1, "r", "p", math.nan)]))
    valid(report)
    back = Report.from_json(report.to_json())
    assert back.end_to_end_drift == math.inf
    drift = back.applications[0].drift
    assert drift is not None and math.isnan(drift)


def test_a_report_from_before_budgets_is_read() -> None:
    old = {key: value for key, value in sample().to_json().items() if key != "budget"} | {"version": 1}
    back = Report.from_json(old)
    assert back.budget is None and back.recognized == sample().recognized


def test_a_kind_whose_sites_were_all_refused_counts_zero() -> None:
    assert sample().recognized == {"attention": 0, "rope": 0, "rms_norm": 3}


def test_drift_is_told_for_each_pass() -> None:
    recognize, fuse = sample().drift
    assert recognize.pass_name == "recognize" and recognize.maximum == 4e-7
    assert recognize.aggregated == pytest.approx(5e-7)  # 3-4-5
    assert (fuse.applications, fuse.measured, fuse.maximum, fuse.aggregated) == (1, 0, None, None)


def test_times_are_sums_over_operators() -> None:
    report = sample()
    assert report.predicted_seconds == pytest.approx((3.3e-3, 3.0e-3))
    assert report.measured_seconds == pytest.approx((4.102e-3, 2.95e-3))
    assert sample(measured=False).measured_seconds is None


@pytest.mark.parametrize(
    ("drift", "tolerance", "within"),
    [
        (None, 1e-5, True),
        (1e-6, None, True),
        (1e-6, 1e-5, True),
        (1e-4, 1e-5, False),
        (math.nan, 1e-5, False),
    ],
)
def test_tolerance_bounds_the_end_to_end_drift(drift: float | None, tolerance: float | None, within: bool) -> None:
    assert Report(end_to_end_drift=drift, tolerance=tolerance).within_tolerance is within


def test_events_are_recorded_in_order() -> None:
    report = Report()
    report.record("recapture", "new shape")
    assert report.events == [Event("recapture", "new shape")]


def test_json_of_another_version_is_refused() -> None:
    with pytest.raises(ReportError, match="has version 99, and this regraft reads versions 1 and 2"):
        Report.from_json(sample().to_json() | {"version": 99})


def test_json_of_something_else_is_refused() -> None:
    with pytest.raises(ReportError, match="not a report"):
        Report.from_json({"anything": 1})


def damaged(path: tuple[str | int, ...], value: object) -> dict[str, object]:
    """The sample's JSON with one value replaced, or removed when ``value`` is None."""
    data = copy.deepcopy(sample().to_json())
    inner: typing.Any = data
    for step in path[:-1]:
        inner = inner[step]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("applications",), None),
        (("applications", 0, "rule"), 7),
        (("applications", 0, "unknown"), "x"),
        (("statistics", "fuse-rope", "tried"), "many"),
        (("phases", "capture"), "soon"),
        (("operators", "before", 0, "provenance"), [1]),
        (("environment", "versions"), ["torch"]),
        (("drift",), None),
    ],
)
def test_damaged_json_is_refused(path: tuple[str | int, ...], value: object) -> None:
    with pytest.raises(ReportError, match="damaged"):
        Report.from_json(damaged(path, value))


def test_saved_json_is_the_report(tmp_path: Path) -> None:
    sample().save_json(tmp_path / "report.json")
    assert Report.from_json(json.loads((tmp_path / "report.json").read_text())) == sample()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
