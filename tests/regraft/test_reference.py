"""The original's output in parts of the batch: the same numbers in less memory, or the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regraft
from regraft import reference
from regraft.ir.capture import capture
from regraft.reference import Reference
from tests.support import AsModule, most_bytes


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_LARGE", 1 << 10)


def in_parts(model: nn.Module, *args: Any) -> tuple[list[Any] | None, Reference]:
    """The parts' output, and the reference that it comes from."""

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    made = Reference(run, args, {})
    return made.in_parts(capture(model.eval(), args)), made


def test_parts_are_the_whole_in_less_memory() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4096), nn.Tanh(), nn.Linear(4096, 3))
    found, made = in_parts(model, torch.randn(33, 4))
    assert found is not None
    torch.testing.assert_close(found[0], made())
    parts = most_bytes(lambda: made.in_parts(capture(model, made.args)))
    assert parts < most_bytes(made) / 4


def test_several_outputs_and_inputs_without_a_batch() -> None:
    def model(x: Tensor, row: Tensor) -> dict[str, Any]:
        return {"sum": x + row, "rows": x.sum(1), "kind": "any"}

    found, made = in_parts(AsModule(model), torch.randn(64, 40), torch.randn(40))
    assert found is not None
    for part, whole in zip(found, torch.utils._pytree.tree_leaves(made()), strict=True):
        assert torch.equal(part, whole) if isinstance(whole, Tensor) else part == whole


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (lambda x: x * 2, (2, 8)),  # small
        (lambda x: x.mean(), (64, 40)),  # one number
        (lambda x: x.t() * 2, (64, 40)),  # the batch comes last
        (lambda x: (x * 2, x.mean(0)), (64, 40)),
        (lambda x: x.reshape(32, 80) * 2, (64, 40)),
    ],
)
def test_what_has_no_batch_or_is_small_runs_whole(model: Callable[..., Any], size: tuple[int, ...]) -> None:
    found, _ = in_parts(AsModule(model), torch.randn(size))
    assert found is None


def test_sizes_that_are_symbolic_are_not_divided() -> None:
    x = torch.randn(64, 40)
    program = capture(nn.Tanh().eval(), (x,), dynamic=True)
    assert Reference(lambda args, kwargs: args[0].tanh(), (x,), {}).in_parts(program) is None


def test_a_model_that_keeps_a_state_runs_whole() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    found, _ = in_parts(Counting(), torch.randn(64, 40))
    assert found is None


def test_a_model_that_mixes_its_rows_is_compared_as_a_whole() -> None:
    model = AsModule(lambda x: x - x.mean(0)).eval()
    x = torch.randn(64, 40)
    fast = regraft.compile(model, (x,))
    assert fast.report.end_to_end_drift is not None
    assert fast.report.end_to_end_drift < 1e-5
    assert not fast.report.events
    torch.testing.assert_close(fast(x), model(x))
