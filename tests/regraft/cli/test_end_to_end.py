"""The commands over the real compiler: a model becomes an artifact, and each command tells what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from regraft.cli import toolbox
from regraft.cli.main import app
from tests.regraft.fixtures import Source


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every MODEL is the tiny one, and the processor is measured into a folder of the test's own."""
    monkeypatch.setattr(toolbox, "resolve", lambda text, inputs=None: Source())
    monkeypatch.setenv("REGRAFT_CACHE_DIR", str(tmp_path / "cache"))


def regraft(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """The tiny model, optimised."""
    out = tmp_path / "tiny.regraft"
    result = regraft("optimize", "tests:tiny", "-o", out)
    assert result.exit_code == 0, result.output
    return out


def test_an_artifact_runs_as_the_model_does(artifact: Path, tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    save_file({"0": x}, tmp_path / "x.safetensors")
    result = regraft("run", artifact, "--inputs", tmp_path / "x.safetensors", "-o", tmp_path / "y.safetensors")
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        expected = Source().model(x)["y"]
    torch.testing.assert_close(load_file(tmp_path / "y.safetensors")["y"], expected)


def test_a_device_that_is_not_here_or_not_for_the_artifact_is_named(artifact: Path, tmp_path: Path) -> None:
    save_file({"0": torch.ones(2, 4)}, tmp_path / "x.safetensors")
    given = ("run", artifact, "--inputs", tmp_path / "x.safetensors", "-o", tmp_path / "y.safetensors", "--device")
    result = regraft(*given, "cuda")
    assert result.exit_code == 2 and "the artifact was compiled for the CPU" in result.stderr
    assert not (tmp_path / "y.safetensors").exists() and regraft(*given, "cpu").exit_code == 0


def test_the_json_of_optimize_holds_predicted_time_and_drift(tmp_path: Path) -> None:
    result = regraft("optimize", "tests:tiny", "-o", tmp_path / "m.regraft", "--json")
    report = json.loads(result.stdout)["report"]
    assert report["predicted"]["before"] > 0 and report["predicted"]["after"] > 0
    assert 0 <= report["drift"]["end_to_end"] <= report["drift"]["tolerance"]
    assert "capture" in report["phases"] and "lowering" in report["phases"]


def test_a_model_is_profiled_before_and_after(tmp_path: Path) -> None:
    page, trace = tmp_path / "p.html", tmp_path / "t.json"
    result = regraft("profile", "tests:tiny", "--runs", "1", "--html", page, "--trace", trace, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["measured"]["before"] > 0 and data["measured"]["after"] > 0
    assert any(row["flops"] == 2 * 2 * 4 * 4 for row in data["operators"]["after"])  # the linear layer
    assert "Roofline" in page.read_text() and json.loads(trace.read_text())["traceEvents"]


def test_an_artifact_is_profiled_after_alone(artifact: Path) -> None:
    data = json.loads(regraft("profile", artifact, "--runs", "1", "--json").stdout)
    assert all(row["measured_seconds"] is None for row in data["operators"]["before"])
    assert any(row["measured_seconds"] for row in data["operators"]["after"])


def test_the_default_rules_are_explained_and_keep_the_tolerance() -> None:
    assert "fired" in regraft("explain", "tests:tiny").stdout
    result = regraft("bisect", "tests:tiny")
    assert result.exit_code == 0 and "stay within the tolerance" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["optimize", "tests:tiny", "-o", "{}/m", "--target", "abacus"], "abacus"),
        (["explain", "tests:tiny", "--target", "abacus"], "no rates are known for device 'abacus'"),
        (["profile", "{}/none.regraft"], "none.regraft"),
        (["run", "{}/none.regraft", "--inputs", "{}/x", "-o", "{}/y"], "none.regraft"),
    ],
)
def test_what_does_not_exist_is_wrong_usage(arguments: list[str], said: str, tmp_path: Path) -> None:
    save_file({"0": torch.ones(2, 4)}, tmp_path / "x")
    result = regraft(*(argument.format(tmp_path) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "m").exists() and not (tmp_path / "y").exists()


def test_inputs_of_another_name_are_refused_in_one_sentence(artifact: Path, tmp_path: Path) -> None:
    save_file({"z": torch.ones(2, 4)}, tmp_path / "x")
    result = regraft("run", artifact, "--inputs", tmp_path / "x", "-o", tmp_path / "y")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert not (tmp_path / "y").exists()


def test_a_factory_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real resolver
    monkeypatch.setenv("REGRAFT_CACHE_DIR", str(tmp_path / "cache"))
    result = regraft("optimize", "tests.regraft.fixtures:factory", "-o", tmp_path / "m.regraft")
    assert result.exit_code == 0, result.output
    broken = regraft("optimize", "tests.regraft.fixtures:broken_factory", "-o", tmp_path / "b.regraft")
    assert broken.exit_code == 2 and "no weights today" in broken.stderr and broken.stderr.count("\n") == 1
    assert not (tmp_path / "b.regraft").exists()
