"""``regraft optimize --experts``: artifacts with permuted experts, and of one rank of a sharded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from regraft.artifact import load
from regraft.cli.main import app
from regraft.ir.ops import moe, moe_dispatch
from regraft.solvers.placement.plan import Plan
from tests.passes.experts.models import HandWritten

MODEL = f"{__name__}:block"


def block() -> tuple[Any, tuple[Any, ...]]:
    """What ``package.module:factory`` names."""
    return HandWritten().eval(), (torch.ones(3, 10),)


def optimize(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["optimize", MODEL, *map(str, arguments)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the plans ``plain.json`` and ``replicas.json``, each for two ranks."""
    Plan.of_array(np.array([[3, 1, 5, 0, 2, 4]]), 6, 2).save(tmp_path / "plain.json")
    Plan.of_array(np.array([[3, 1, 5, 0, 0, 2, 4, 1]]), 6, 2).save(tmp_path / "replicas.json")
    return tmp_path


def calls(path: Path, target: Any) -> list[Any]:
    return [node for node in load(path).program.graph.nodes if node.target is target]


def test_each_rank_gets_an_artifact_of_its_own(root: Path) -> None:
    for rank in (0, 1):
        out = root / f"{rank}.regraft"
        result = optimize(
            "--experts", root / "replicas.json", "--rank", rank, "-o", out, "--split", "nearest", "--json"
        )
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["artifact"] == str(out)
        (sent,) = calls(out, moe_dispatch)
        assert (sent.kwargs["rank"], sent.kwargs["ranks"]) == (rank, 2)
        (local,) = calls(out, moe)
        assert local.kwargs["first"].meta["val"].shape[0] == 4


def test_without_a_rank_experts_are_permuted(root: Path) -> None:
    result = optimize("--experts", root / "plain.json", "-o", root / "out.regraft")
    assert result.exit_code == 0 and "permute-site" in result.stdout
    assert not calls(root / "out.regraft", moe_dispatch)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--experts", "replicas.json"), "can only be permuted"),
        (("--experts", "none.json", "--rank", "0"), "'none.json' cannot be read"),
        (("--experts", "plain.json", "--rank", "2"), "rank 2 was given for a plan of 2 ranks"),
        (("--experts", "plain.json", "--split", "nearest"), "give it with --rank"),
        (("--rank", "0"), "give the plan with --experts"),
        (("--experts", "plain.json", "--rank", "0", "--topology", "h100x8"), "a cluster of 8 ranks"),
        (("--experts", "plain.json", "--rank", "0", "--topology", "none"), "neither a file nor a preset"),
    ],
)
def test_what_does_not_fit_gets_one_sentence_and_no_file(
    arguments: tuple[str, ...], part: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    result = optimize(*arguments, "-o", "out.regraft")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("regraft: ") and result.stderr.count("\n") == 1 and part in result.stderr
    assert not Path("out.regraft").exists()
