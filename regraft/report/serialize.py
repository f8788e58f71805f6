"""A report as JSON and back. ``schema.json`` beside this file describes the form; a reader rejects other versions."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, TypeVar

from regraft.ir.records import Application, Log, Refusal, RuleStatistics
from regraft.report.budget import BudgetReport
from regraft.report.model import READ_VERSIONS, SCHEMA_VERSION, Environment, Event, OperatorRow, Report, ReportError

_NAME = "regraft.report"
_ODD_NUMBERS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
Record = TypeVar("Record")


def schema() -> dict[str, Any]:
    """The JSON schema of reports (draft 2020-12)."""
    text = files("regraft.report").joinpath("schema.json").read_text(encoding="utf-8")
    return typing.cast(dict[str, Any], json.loads(text))


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain data."""
    before, after = report.predicted_seconds
    measured = report.measured_seconds
    data = {
        "schema": _NAME,
        "version": SCHEMA_VERSION,
        "model": report.model,
        "target": report.target,
        "environment": dataclasses.asdict(report.environment),
        "recognized": report.recognized,
        "applications": [dataclasses.asdict(item) for item in report.applications],
        "refusals": [dataclasses.asdict(item) for item in report.refusals],
        "statistics": {rule: dataclasses.asdict(item) for rule, item in report.statistics.items()},
        "phases": dict(report.phases),
        "predicted": {"before": before, "after": after},
        "measured": {"before": measured[0], "after": measured[1]} if measured else None,
        "operators": {
            "before": [dataclasses.asdict(row) for row in report.operators_before],
            "after": [dataclasses.asdict(row) for row in report.operators_after],
        },
        "drift": {
            "passes": [dataclasses.asdict(row) for row in report.drift],
            "end_to_end": report.end_to_end_drift,
            "tolerance": report.tolerance,
        },
        "events": [dataclasses.asdict(event) for event in report.events],
        "budget": None if report.budget is None else dataclasses.asdict(report.budget),
    }
    return typing.cast(dict[str, Any], _encode(data))


def from_json(data: Mapping[str, Any]) -> Report:
    """The report that ``to_json`` made; raises ``ReportError`` for anything else."""
    if not isinstance(data, Mapping) or data.get("schema") != _NAME:
        raise ReportError(f"this JSON is not a report: its 'schema' is not {_NAME!r}; give what Report.to_json made")
    if data.get("version") not in READ_VERSIONS:
        raise ReportError(
            f"the report has version {data.get('version')!r}, and this regraft reads versions "
            f"{' and '.join(map(str, READ_VERSIONS))}; make it again, or install the regraft that wrote it"
        )
    try:
        return _read(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ReportError(f"the report is damaged ({type(error).__name__}: {said}); make it again") from error


def _read(data: Mapping[str, Any]) -> Report:
    log = Log(
        applications=[_record(Application, item) for item in data["applications"]],
        refusals=[_record(Refusal, item) for item in data["refusals"]],
        statistics={str(rule): _record(RuleStatistics, item) for rule, item in data["statistics"].items()},
    )
    report = Report(
        model=_checked(data["model"], str),
        target=_checked(data["target"], str),
        log=log,
        phases={str(name): _checked(seconds, float) for name, seconds in data["phases"].items()},
        operators_before=[_record(OperatorRow, item) for item in data["operators"]["before"]],
        operators_after=[_record(OperatorRow, item) for item in data["operators"]["after"]],
        end_to_end_drift=_checked(data["drift"]["end_to_end"], float | None),
        tolerance=_checked(data["drift"]["tolerance"], float | None),
        events=[_record(Event, item) for item in data["events"]],
        environment=_record(Environment, data["environment"]),
        budget=_record(BudgetReport, data["budget"]) if data.get("budget") is not None else None,
    )
    recognized = {str(kind): _checked(number, int) for kind, number in data["recognized"].items()}
    if recognized != report.recognized:  # sites that needed no rewrite are counted in the graph, which is not here
        log.sites = recognized
    return report


def _record(kind: type[Record], data: Mapping[str, Any]) -> Record:
    expected = typing.get_type_hints(kind)
    unknown = set(data) - set(expected)
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {min(unknown)!r}")
    return kind(**{name: _checked(value, expected[name]) for name, value in data.items()})


def _checked(value: Any, expected: Any) -> Any:
    """``value`` as the type that a field declares; raises ``TypeError`` when it is of another."""
    if isinstance(expected, types.UnionType):
        inner = next(option for option in typing.get_args(expected) if option is not types.NoneType)
        return None if value is None else _checked(value, inner)
    origin = typing.get_origin(expected)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_checked(item, typing.get_args(expected)[0]) for item in value)
    if origin is list and isinstance(value, list):
        return [_checked(item, typing.get_args(expected)[0]) for item in value]
    if dataclasses.is_dataclass(expected) and isinstance(expected, type) and isinstance(value, Mapping):
        return _record(expected, value)
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _checked(item, typing.get_args(expected)[1]) for key, item in value.items()}
    if expected is float:
        value = _ODD_NUMBERS.get(value, value) if isinstance(value, str) else value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif origin is None and type(value) is expected:
        return value
    raise TypeError(f"{value!r} is not of type {getattr(expected, '__name__', expected)}")


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    return value
