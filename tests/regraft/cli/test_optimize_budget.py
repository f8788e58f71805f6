"""``regraft optimize --budget``: the artifact of a model within its budget, and every way to be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import regraft
from regraft.cli.main import app
from tests.regraft.budget_cases import Classifier, batch, nothing_is_timed

MODEL = f"{__name__}:classifier"


def classifier() -> tuple[Any, tuple[Any, ...]]:
    """What ``package.module:factory`` names."""
    return Classifier().eval(), (batch(0),)


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_is_timed(monkeypatch)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with 66 samples in one file, eight batches in a folder, and one sample in a file."""
    samples = torch.cat([batch(seed) for seed in range(1, 9)])
    save_file({"0": torch.cat([samples, samples[:2]])}, tmp_path / "samples.safetensors")
    save_file({"0": samples[:1].contiguous()}, tmp_path / "one.safetensors")
    save_file({"x": samples}, tmp_path / "named.safetensors")
    (tmp_path / "batches").mkdir()
    for seed in range(1, 9):
        save_file({"0": batch(seed)}, tmp_path / "batches" / f"{seed}.safetensors")
    (tmp_path / "none").mkdir()
    return tmp_path


def optimize(root: Path, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["optimize", MODEL, "-o", str(root / "out.regraft"), *map(str, arguments)])


def test_samples_in_one_file_and_batches_in_a_folder_are_the_same_data(root: Path) -> None:
    told = []
    for data in ("samples.safetensors", "batches"):
        result = optimize(root, "--budget", "kl=0.02", "--calibration", root / data, "--json")
        assert result.exit_code == 0, result.output
        told.append(json.loads(result.stdout)["report"]["budget"])
    assert told[0]["decisions"][0]["site"] == "tokens" and 0 < told[0]["held_out"] <= 0.02
    assert told[0]["held_out"] == told[1]["held_out"]
    loaded = regraft.load(root / "out.regraft").report.budget
    assert loaded is not None and loaded.decisions[0].knob == told[1]["decisions"][0]["knob"]


def test_the_text_and_the_page_show_the_curve_and_the_decisions(root: Path) -> None:
    result = optimize(
        root, "--budget", "kl=0.02", "--calibration", root / "batches", "--html", root / "page.html", "--verify", "off"
    )
    assert result.exit_code == 0, result.output
    for part in ("Lossy rewrites", "Accuracy budget", "Loss and time", "chosen", "32 samples held out"):
        assert part in result.stdout
    assert 'id="budget"' in (root / "page.html").read_text(encoding="utf-8")


def test_a_budget_of_zero_writes_the_exact_model_without_data(root: Path) -> None:
    result = optimize(root, "--budget", "kl=0")
    assert result.exit_code == 0 and "a budget of 0 leaves the exact model" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("--budget", "kl"), 2, "it has no limit; give a metric and its limit, as kl=0.01"),
        (("--budget", "kl=few"), 2, "'few' is not a number"),
        (("--budget", "kl=-1"), 2, "the limit -1.0 was given"),
        (("--budget", "bleu=1"), 2, "the metric 'bleu' is not known"),
        (("--budget", "kl=0.1"), 2, "give --calibration"),
        (("--calibration", "batches"), 2, "give the budget with --budget"),
        (("--budget", "kl=0.1", "--calibration", "missing"), 2, "cannot be read"),
        (("--budget", "kl=0.1", "--calibration", "none"), 2, "holds no safetensors file"),
        (("--budget", "kl=0.1", "--calibration", "one.safetensors"), 1, "the calibration holds no batch"),
        (("--budget", "kl=0.1", "--calibration", "named.safetensors"), 2, "holds the inputs x, and the model takes 0;"),
    ],
)
def test_what_is_wrong_gets_a_sentence_and_no_artifact(
    root: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, reason: str
) -> None:
    monkeypatch.chdir(root)
    result = optimize(root, *arguments)
    assert result.exit_code == code and reason in result.output.replace("\n", " ")
    assert not (root / "out.regraft").exists()
