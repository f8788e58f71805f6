"""``regraft kernels``: what it writes, prints and exits with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import regraft
from regraft.cli.main import app
from tests.regraft.test_kernels import Attention, X


def kernels(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["kernels", *map(str, arguments)])


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    path = tmp_path / "model.regraft"
    regraft.compile(Attention().eval(), X, target="cuda:sm_90").save(path)
    return path


def test_sources_and_binaries(artifact: Path, tmp_path: Path) -> None:
    result = kernels(artifact, "--arch", "sm_90,gfx942", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    (name,) = shown["kernels"]
    assert sorted(path.name for path in (tmp_path / "out" / name).iterdir()) == [
        "gfx942.amdgcn", "gfx942.hsaco", "sm_90.cubin", "sm_90.ptx", "source.py",
    ]  # fmt: skip
    assert {row["arch"]: row["failure"] for row in shown["rows"]} == {"sm_90": None, "gfx942": None}
    assert all(row["registers"] > 0 and row["spilled"] == 0 for row in shown["rows"])
    assert (tmp_path / "out" / name / "sm_90.cubin").read_bytes()[:4] == b"\x7fELF"
    assert ".target sm_90a" in (tmp_path / "out" / name / "sm_90.ptx").read_text()
    listed = json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert listed["kernels"][0]["operands"] == ["query", "key", "value", "scale"]


def test_the_table(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty folder is as good as a new one
    result = kernels(artifact, "--arch", "sm_80", "-o", tmp_path / "out")
    assert result.exit_code == 0 and f"wrote {tmp_path / 'out'}" in result.stdout
    assert "registers" in result.stdout and "sm_80" in result.stdout


@pytest.mark.parametrize(
    ("name", "arch", "output", "code", "part"),
    [
        ("none.regraft", "sm_90", "out", 2, "there is no file"),
        ("model.regraft", "sm_90", "model.regraft", 2, "exists already"),
        ("model.regraft", "sm_90", "deep/out", 2, "does not exist"),
        ("model.regraft", "h100", "out", 2, "the architecture is 'h100'"),
        ("model.regraft", " , ", "out", 2, "names no architecture"),
        ("other.regraft", "sm_90", "out", 1, "is not a zip archive"),
        ("linear.regraft", "sm_90", "out", 1, "its graph holds no attention"),
        ("wide.regraft", "sm_90", "out", 1, "elements are torch.float64"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    artifact: Path, name: str, arch: str, output: str, code: int, part: str
) -> None:
    root = artifact.parent
    (root / "other.regraft").write_text("no zip")
    if name == "linear.regraft":
        regraft.compile(nn.Linear(4, 4).eval(), torch.ones(2, 4)).save(root / name)
    if name == "wide.regraft":
        regraft.compile(Attention(torch.float64).eval(), X.double(), target="cuda").save(root / name)
    before = sorted(path.name for path in root.iterdir())
    result = kernels(root / name, "--arch", arch, "-o", root / output)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("regraft: ") and result.stderr.count("\n") == 1 and part in result.stderr
    assert sorted(path.name for path in root.iterdir()) == before


def test_an_architecture_without_tiles_fails_by_row(artifact: Path, tmp_path: Path) -> None:
    result = kernels(artifact, "--arch", "sm_70,sm_90", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "1 of 2 builds failed" in result.stderr and "no tiles for 'sm_70'" in result.stderr


def test_interpreting_is_no_building(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = kernels(artifact, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "unset it" in result.stderr
