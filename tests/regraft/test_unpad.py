"""compile(unpad=True): padded batches are computed packed where that is faster, and every call gets what it got."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regraft
from regraft.errors import OptionError
from regraft.unpad import Either, _crossing
from tests.passes.tokens.models import relative, texts, tiny
from tests.passes.tokens.test_reduce import MeanOfTokens


def pooled(length: int = 64) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A model and a batch of which a seventh is there."""
    return MeanOfTokens(tiny("bert")).eval(), texts((length, *[2] * 15), length)


def told(fast: Any) -> str:
    return str(next(event for event in fast.report.events if "unpad" in str(event)))


def test_a_batch_with_much_padding_runs_packed_and_others_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.unpad._seconds", lambda calls, inputs: {"padded": 2.0, "packed": 1.0})
    model, given = pooled()
    fast = regraft.compile(model, given, unpad=True)
    (entry,) = fast.entries
    assert isinstance(entry.executable, Either) and "run packed" in told(fast)
    assert fast.report.log.of("unpad").fired == 1
    ran: list[str] = []
    either = entry.executable
    entry.executable = Either(
        lambda *inputs: ran.append("padded") or either.padded(*inputs),
        lambda *inputs: ran.append("packed") or either.packed(*inputs),
        either.fill,
        0.9,
    )
    full = {**given, "attention_mask": torch.ones_like(given["attention_mask"])}
    for inputs in (given, full):
        with torch.no_grad():
            assert relative(fast(**inputs), model(**inputs)) <= 1e-5
    assert ran == ["packed", "padded"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"input_ids": texts()["input_ids"]}, "no attention has a padding mask"),
        (texts(), "every token is an output"),
    ],
)
def test_what_cannot_be_unpadded_runs_as_it_was_and_says_why(given: dict[str, Tensor], reason: str) -> None:
    model = tiny("bert")
    fast = regraft.compile(model, given, unpad=True)
    assert reason in told(fast)
    with torch.no_grad():
        assert relative(fast(**given).last_hidden_state, model(**given).last_hidden_state) <= 1e-5


def test_an_artifact_holds_the_padded_form(tmp_path: Path) -> None:
    model, given = pooled(16)
    fast = regraft.compile(model, given, unpad=True)
    fast.save(tmp_path / "model.regraft")
    loaded = regraft.load(tmp_path / "model.regraft")
    assert relative(loaded(**given), fast(**given)) <= 1e-5


def test_the_share_from_which_packing_does_not_pay_lies_where_the_lines_cross() -> None:
    assert _crossing(0.5, {"padded": 2.0, "packed": 1.0}, {"padded": 2.0, "packed": 3.0}) == 0.75
    assert _crossing(0.5, {"padded": 2.0, "packed": 1.0}, {"padded": 2.0, "packed": 1.9}) == 1.0


def test_unpadding_goes_with_no_other_plan() -> None:
    with pytest.raises(OptionError, match="unpad was given with"):
        regraft.compile(tiny("bert"), texts(), unpad=True, budget=regraft.Budget("kl", 0.1), calibration=[texts()] * 4)
