"""What each command prints, writes and exits with. The compiler behind them is a fake: see the end-to-end test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from regraft.cli import toolbox
from regraft.cli.main import app
from regraft.report import Event, Report
from tests.regraft.fixtures import RAISING, RIGHT, WRONG, Source
from tests.regraft.report.sample import sample


class Fast:
    """Stands for a compiled model."""

    def __init__(self, model: Any, report: Report) -> None:
        self.model, self.report, self.entries = model, report, ["entry"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.report.events.append(Event("fallback", "because"))
        return self.model(*args, **kwargs)

    def save(self, path: Path) -> None:
        Path(path).write_bytes(b"artifact")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Puts fakes in the toolbox; returns what they were called with, and "report" for what they report."""
    seen: dict[str, Any] = {"report": sample()}

    def compile_model(source: Any, **options: Any) -> Fast:
        seen["options"] = options
        return Fast(source.model, seen["report"])

    def resolve(text: str, inputs: Path | None = None) -> Source:
        seen["model"] = text
        return Source()

    monkeypatch.setattr(toolbox, "resolve", resolve)
    monkeypatch.setattr(toolbox, "compile_model", compile_model)
    monkeypatch.setattr(toolbox, "load", lambda path, device: Fast(Source().model, Report()))
    monkeypatch.setattr(toolbox, "on_device", lambda inputs, fast: inputs)
    monkeypatch.setattr(toolbox, "pipeline", lambda target: RIGHT)
    monkeypatch.setattr(toolbox, "profile", lambda *given: sample())
    return seen


def regraft(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fault(result: Result, code: int, *parts: str) -> None:
    """One sentence on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.startswith("regraft: ") and result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def test_optimize_writes_artifact_and_report(calls: dict[str, Any], tmp_path: Path) -> None:
    out, page = tmp_path / "m.regraft", tmp_path / "r.html"
    result = regraft("optimize", "tests:model", "-o", out, "--html", page, "--target", "cpu", "--verify", "final")
    assert result.exit_code == 0 and result.stderr == ""
    assert out.read_bytes() == b"artifact" and "<!doctype html>" in page.read_text()
    assert calls["options"] == {"target": "cpu", "dynamic": None, "verify": "final", "experts": None}
    assert "3 rewrites made" in result.stdout and f"wrote {out}" in result.stdout
    assert sorted(tmp_path.iterdir()) == [out, page]


def test_optimize_prints_json(calls: dict[str, Any], tmp_path: Path) -> None:
    result = regraft("optimize", "tests:model", "-o", tmp_path / "m.regraft", "--dynamic", "--json")
    data = json.loads(result.stdout)
    assert data["artifact"].endswith("m.regraft") and Report.from_json(data["report"]) == calls["report"]
    assert calls["options"]["dynamic"] is True


def test_optimize_out_of_tolerance_writes_no_artifact(calls: dict[str, Any], tmp_path: Path) -> None:
    calls["report"].end_to_end_drift = 0.5
    result = regraft("optimize", "tests:model", "-o", tmp_path / "m.regraft")
    fault(result, 1, "out of tolerance", "5.0e-01", "regraft bisect tests:model")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_was_not_compiled_is_refused_with_the_reason(
    calls: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = Fast(None, Report(events=[Event("fallback", "a pass failed")]))
    refused.entries = []
    monkeypatch.setattr(toolbox, "compile_model", lambda *given, **options: refused)
    fault(regraft("optimize", "tests:model", "-o", tmp_path / "m.regraft"), 1, "not compiled", "a pass failed")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("missing/m.regraft", "does not exist; create it first"),
        (".", "is a folder"),
        ("loop", "is a link that leads to itself"),
    ],
)
def test_an_output_that_cannot_be_is_found_out_first(
    output: str, said: str, calls: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    fault(regraft("optimize", "tests:model", "-o", tmp_path / output), 2, said)
    assert "model" not in calls


def test_a_save_that_fails_leaves_nothing(
    calls: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Fast, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Fast, "save", fail)
    fault(regraft("optimize", "tests:model", "-o", tmp_path / "m.regraft"), 1, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_an_unexpected_failure_is_one_sentence(
    calls: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Any, **options: Any) -> Any:
        raise ZeroDivisionError("division by zero\nand more")

    monkeypatch.setattr(toolbox, "compile_model", fail)
    result = regraft("optimize", "tests:model", "-o", tmp_path / "m.regraft")
    fault(result, 1, "unexpected ZeroDivisionError: division by zero", "REGRAFT_TRACEBACK=1")


def test_run_writes_outputs_by_name(calls: dict[str, Any], tmp_path: Path) -> None:
    save_file({"input": torch.ones(2, 4)}, tmp_path / "x.safetensors")
    result = regraft("run", "m.regraft", "--inputs", tmp_path / "x.safetensors", "-o", tmp_path / "y.safetensors")
    assert result.exit_code == 0, result.stderr
    with torch.no_grad():
        expected = Source().model(torch.ones(2, 4))["y"]
    assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], expected)
    assert "y [2, 4]" in result.stdout and "fallback: because" in result.stdout


def test_run_takes_positions(calls: dict[str, Any], tmp_path: Path) -> None:
    save_file({"0": torch.ones(2, 4)}, tmp_path / "x.safetensors")
    result = regraft("run", "m", "--inputs", tmp_path / "x.safetensors", "-o", tmp_path / "y", "--json")
    assert json.loads(result.stdout)["tensors"] == {"y": [2, 4]}


def test_run_tells_what_is_wrong_with_its_inputs(calls: dict[str, Any], tmp_path: Path) -> None:
    out, junk, gap = tmp_path / "y", tmp_path / "junk", tmp_path / "gap"
    fault(regraft("run", "m", "--inputs", tmp_path / "none", "-o", out), 2, "cannot be read")
    junk.write_bytes(b"junk")
    fault(regraft("run", "m", "--inputs", junk, "-o", out), 2, "cannot be read", "save_file")
    save_file({"0": torch.ones(1), "2": torch.ones(1)}, gap)
    fault(regraft("run", "m", "--inputs", gap, "-o", out), 2, "positions 0, 2", "without a gap")
    assert not out.exists()


def test_explain_shows_fired_and_refused_sites(calls: dict[str, Any]) -> None:
    result = regraft("explain", "tests:model")
    assert result.exit_code == 0, result.stderr
    for part in (
        "1 site fired",
        "clamp-relu x 1",
        "never-tanh x 1, requirement: tanh is wanted as it is",
        "fixtures.py:",
    ):
        assert part in result.stdout


def test_explain_one_rule(calls: dict[str, Any]) -> None:
    data = json.loads(regraft("explain", "tests:model", "--rule", "never-tanh", "--json").stdout)
    assert data["fired"] == [] and [item["rule"] for item in data["refused"]] == ["never-tanh"]


def test_explain_names_the_rules_when_one_is_unknown(calls: dict[str, Any]) -> None:
    result = regraft("explain", "tests:model", "--rule", "fuse-all")
    fault(result, 2, "no rule 'fuse-all'; the rules are: clamp-relu, never-tanh")


def test_profile_prints_operators_and_writes_page_and_trace(calls: dict[str, Any], tmp_path: Path) -> None:
    page, trace = tmp_path / "p.html", tmp_path / "t.json"
    result = regraft("profile", "tests:model", "--html", page, "--trace", trace)
    assert result.exit_code == 0, result.stderr
    assert "regraft.linear" in result.stdout and "1.70 ms" in result.stdout
    assert page.exists() and json.loads(trace.read_text())["traceEvents"]
    assert json.loads(regraft("profile", "tests:model", "--json").stdout)["schema"] == "regraft.report"
    fault(regraft("profile", "tests:model", "--runs", "0"), 2, "--runs is 0")


def test_bisect_finds_the_wrong_rule(calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolbox, "pipeline", lambda target: WRONG)
    result = regraft("bisect", "tests:model")
    assert result.exit_code == 1 and result.stderr == ""
    for part in ("rewrite 2 of 2 is the first", "sigmoid-is-tanh (pass wrong", "fixtures.py:", "0 before"):
        assert part in result.stdout


def test_bisect_finds_what_makes_a_pass_raise(calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolbox, "pipeline", lambda target: RAISING)
    result = regraft("bisect", "tests:model", "--json")
    first = json.loads(result.stdout)["first_bad"]
    assert result.exit_code == 1
    assert (first["application"]["rule"], first["error_after"]) == ("clamp-relu", "inf")
    assert first["failure"] == "KeyError: 'clamp'"


def test_bisect_is_content_with_right_rules(calls: dict[str, Any]) -> None:
    result = regraft("bisect", "tests:model", "--tolerance", "1e-6")
    assert result.exit_code == 0 and "all 1 rewrites together stay within" in result.stdout
    fault(regraft("bisect", "tests:model", "--tolerance", "-1"), 2, "a number from 0 up")


@pytest.mark.parametrize(
    "arguments", [["optimise"], ["optimize", "m"], ["run"], ["optimize", "m", "-o", "x", "--verify", "never"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = regraft(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
