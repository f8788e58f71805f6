"""``regraft permute``: what it writes, prints and exits with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from regraft.cli.main import app
from tests.regraft.test_permute import GOOD, plan_of, write


def permute(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["permute", *map(str, arguments)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a checkpoint ``in`` and a plan ``plan.json``."""
    write(tmp_path / "in")
    plan_of(*GOOD).save(tmp_path / "plan.json")
    return tmp_path


def test_it_writes_and_says_what(root: Path) -> None:
    result = permute(root / "in", "--plan", root / "plan.json", "-o", root / "out")
    assert result.exit_code == 0 and result.stderr == ""
    assert f"wrote {root / 'out'}" in result.stdout and "8 experts moved in 2 layers of 4" in result.stdout
    assert "expert layers 3, beyond the model's own" in result.stdout
    assert (root / "out" / "a.safetensors").is_file()


def test_json(root: Path) -> None:
    result = permute(root / "in", "--plan", root / "plan.json", "-o", root / "out", "--json")
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert shown["layers"] == [0, 2] and shown["experts_moved"] == 8 and shown["untouched_layers"] == [3]


def fault(root: Path, result: Result, code: int, part: str) -> None:
    """One sentence, and nothing new on disk."""
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("regraft: ") and result.stderr.count("\n") == 1 and part in result.stderr
    assert "Traceback" not in result.stderr and sorted(path.name for path in root.iterdir()) == ["in", "plan.json"]


def test_refused(root: Path) -> None:
    plan_of((0, 1, 2, 3, 0, 1), (0, 1, 2, 3, 0, 1)).save(root / "plan.json")
    fault(root, permute(root / "in", "--plan", root / "plan.json", "-o", root / "out"), 1, "copies of expert 0")


@pytest.mark.parametrize(
    ("checkpoint", "plan", "output", "part"),
    [
        ("none", "plan.json", "out", "there is no folder"),
        ("in", "none.json", "out", "'none.json' cannot be read"),
        ("in", "in/config.json", "out", "expected regraft.plan"),
        ("in", "plan.json", "in", "exists already"),
        ("in", "plan.json", "plan.json", "exists already"),
        ("in", "plan.json", "no/out", "does not exist; create it first"),
    ],
)
def test_wrong_usage(root: Path, checkpoint: str, plan: str, output: str, part: str) -> None:
    fault(root, permute(root / checkpoint, "--plan", root / plan, "-o", root / output), 2, part)


def test_a_truncated_shard(root: Path) -> None:
    path = root / "in" / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    fault(root, permute(root / "in", "--plan", root / "plan.json", "-o", root / "out"), 2, "header promises")
