"""A budget for a model with symbolic sizes: lossy code serves the sizes that its loss was measured for, no others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regraft
from regraft import Budget, InputError
from regraft.ir.driver import Session
from regraft.ir.nodes import tensor_value
from regraft.ir.program import Program
from regraft.passes.base import Pass
from regraft.passes.budget.candidate import Candidate
from regraft.rehearsal import Rehearsal

AUTO = torch.export.Dim.AUTO
WIDTH = 8


@dataclass(frozen=True)
class Shrink(Pass):
    """Makes the first output a little smaller."""

    def run(self, program: Program, session: Session) -> int:
        (out,) = program.graph.find_nodes(op="output")
        node = out.args[0][0]
        with program.graph.inserting_after(node):
            smaller = program.graph.call_function(torch.ops.aten.mul.Tensor, (node, 0.99))
        smaller.meta["val"] = tensor_value(node)
        out.replace_input_with(node, smaller)
        return 1


def offer(program: Program, target: str) -> Iterator[Candidate]:
    yield Candidate("output", "smaller", Shrink(), family="shrink")


@pytest.fixture(autouse=True)
def only_shrinking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.budget.OFFERS", (offer,))
    monkeypatch.setattr(Rehearsal, "ratio", lambda self, composition, thorough=False: 0.5 if composition else 1.0)
    monkeypatch.setattr(Rehearsal, "ratios_of", lambda self, executable, thorough=True: [0.5] * 9)


class Mean(nn.Module):
    """A linear layer for each token of ``[samples, tokens, width]``, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).mean(1)  # type: ignore[no-any-return]


def batch(tokens: int, samples: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(samples, tokens, WIDTH, generator=torch.Generator().manual_seed(100 * seed + tokens))


def spent(tokens: int = 6, lengths: tuple[int, ...] = (5, 6, 9, 7), dynamic: Any = None) -> tuple[Any, nn.Module]:
    model = Mean().eval()
    symbolic = {"x": {0: AUTO, 1: AUTO}} if dynamic is None else dynamic
    budget = Budget("relative_l2", 0.05, seconds=5)
    batches = [batch(n, seed=seed) for seed in range(2) for n in lengths]
    return regraft.compile(model, batch(tokens), dynamic=symbolic, budget=budget, calibration=batches), model


def is_exact(fast: Any, model: nn.Module, x: Tensor) -> bool:
    return torch.allclose(fast(x), model(x), rtol=1e-5, atol=1e-6)


def test_sizes_between_those_of_the_calibration_are_served_by_lossy_code_and_others_exactly() -> None:
    fast, model = spent()
    assert fast.report.budget.spent
    said = "the loss was measured for sizes 5 to 9 in dim 1 of x; others get exact code"
    assert fast.report.budget.covers == said
    assert [(event.kind, event.reason) for event in fast.report.events] == [("budget", said)]
    for tokens, lossy in ((5, True), (6, True), (8, True), (9, True), (4, False), (10, False), (40, False)):
        assert is_exact(fast, model, batch(tokens)) is not lossy
    assert len(fast.report.events) == 1  # nothing was compiled again


def test_the_number_of_samples_is_free() -> None:
    fast, model = spent()
    assert not is_exact(fast, model, batch(6, samples=3))
    fixed, model = spent(lengths=(6,), dynamic={"x": {0: AUTO}})
    assert fixed.report.budget.spent and not fixed.report.budget.covers
    assert not is_exact(fixed, model, batch(6, samples=3))


def test_an_artifact_holds_the_lossy_code_and_refuses_sizes_that_were_not_measured(tmp_path: Path) -> None:
    fast, _ = spent()
    fast.save(tmp_path / "model.regraft")
    loaded = regraft.load(tmp_path / "model.regraft")
    assert torch.equal(loaded(batch(9)), fast(batch(9)))
    with pytest.raises(InputError, match=r"no code for inputs float32\[8, 10, 8\]"):
        loaded(batch(10))


def test_a_calibration_without_the_size_of_the_example_is_refused() -> None:
    fast, model = spent(tokens=12)
    assert fast.report.budget.refused == (
        "the calibration has sizes from 5 to 9 in dim 1 of x, and the example inputs have 12; give batches of that "
        "size, too"
    )
    assert is_exact(fast, model, batch(7))
