"""A compiled model while somebody records, transforms or exports what it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import regraft
from regraft.codegen.cpu import tuning
from regraft.errors import CaptureError, InputError


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval().requires_grad_(False)


def test_what_is_recorded_is_what_the_model_computes() -> None:
    model, x = _model(), torch.randn(3, 8)
    traced = torch.jit.trace(regraft.compile(model, (x,)), (x,), check_trace=False)
    assert torch.allclose(traced(2 * x), model(2 * x), atol=1e-6)


def test_transforms_of_functions_run_the_original() -> None:
    model, x = _model(), torch.randn(4, 3, 8)
    fast = regraft.compile(model, (x[0],))
    assert torch.allclose(torch.vmap(fast)(x), model(x), atol=1e-6)
    assert torch.func.jvp(fast, (x[0],), (x[0],))[1].shape == (3, 8)
    assert [event.kind for event in fast.report.events] == ["fallback"] and len(fast.entries) == 1


def test_tangents_are_those_of_the_model() -> None:
    model, x = _model(), torch.randn(3, 8)
    fast = regraft.compile(model, (x,))
    with forward_ad.dual_level():
        tangents = [forward_ad.unpack_dual(run(forward_ad.make_dual(x, x + 1))).tangent for run in (fast, model)]
    torch.testing.assert_close(*tangents)
    assert [event.kind for event in fast.report.events] == ["fallback"]


def test_a_mode_that_counts_operators_sees_them_where_there_is_an_original(tmp_path: Path) -> None:
    model, x = _model(), torch.randn(3, 8)
    fast = regraft.compile(model, (x,))
    fast.save(tmp_path / "model.regraft")
    with FlopCounterMode(display=False) as mode:
        fast(x)
    assert mode.get_total_flops() == 2 * 2 * 3 * 8 * 16
    with FlopCounterMode(display=False):
        assert torch.allclose(regraft.load(tmp_path / "model.regraft")(x), model(x), atol=1e-6)


def test_exporting_a_compiled_model_or_compiling_one_that_holds_it_says_what_to_give() -> None:
    x = torch.randn(3, 8)
    fast = regraft.compile(_model(), (x,))
    with pytest.raises(InputError, match="export the original"):
        torch.export.export(fast, (x,))
    with pytest.raises(CaptureError, match="a part of the model, 1, is compiled already"):
        regraft.compile(nn.Sequential(_model(), fast).eval(), (x,))


class Noisy(nn.Module):
    """Draws random numbers at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(48, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + torch.randn_like(x))  # type: ignore[no-any-return]


def test_compiling_draws_no_number_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "DECIDED", {})  # so that kernels are measured
    model = nn.Linear(40, 48).eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    regraft.compile(model, (torch.ones(5, 40),))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_draws_is_refused_also_where_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "DECIDED", {})
    for _ in range(2):  # the second finds its kernel known
        with torch.no_grad():
            fast = regraft.compile(Noisy().eval())
            fast(torch.ones(5, 48))
        assert not fast.entries and "draws random numbers" in fast.report.events[-1].reason
