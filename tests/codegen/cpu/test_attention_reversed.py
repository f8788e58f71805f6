"""Reversed attention, lowered: log-sum-exps and the weights that they normalise are one kernel where these are the same
scores turned, and two elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from regraft.codegen.cpu import attention_reversed
from regraft.codegen.cpu.lower import lower
from regraft.ir import ops
from regraft.ir.verify import relative_l2
from tests.codegen.cpu.support import needs_native
from tests.support import captured

pytestmark = needs_native
BATCH, HEADS, LENGTH, KEYS = 2, 3, 70, 40


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


OPERANDS = (
    draw(BATCH, HEADS, LENGTH, 8),
    draw(BATCH, HEADS, KEYS, 8, seed=1),
    draw(BATCH, HEADS, LENGTH, 16, seed=2),
    draw(BATCH, HEADS, LENGTH, 1, seed=3),
)


def reverse(query: Tensor, key: Tensor, value: Tensor, scale: float = 0.3, softcap: float = 0.0) -> Tensor:
    """As the rewrite leaves it."""
    lse = ops.attention_lse(query, key, [], scale=0.3, softcap=softcap)
    shift = lse.neg().unsqueeze(2)
    result: Tensor = ops.attention_mapped(
        key, query, value, [], shift, None, scale=scale, weight="exp", softcap=softcap
    )
    return result


def lowered(function: Callable[..., Tensor], *args: Tensor) -> tuple[Tensor, str]:
    """The result of a function that is lowered, and the text of the graph."""
    executable = lower(captured(function, args))
    return executable(*args)[0], str(executable.module.graph)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_each_score_is_made_once(softcap: float) -> None:
    query, key, value, _ = OPERANDS
    found, text = lowered(lambda q, k, v: reverse(q, k, v, softcap=softcap), query, key, value)
    scores = query.double() @ key.double().mT * 0.3
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    assert relative_l2(found, scores.softmax(-1).mT @ value.double()) < 2e-6
    assert "reversed_native" in text and "lse_native" not in text and "attend_native" not in text


def test_what_whole_rows_of_values_are_multiplied_with_goes_along() -> None:
    def gated(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        return reverse(query, key, gate * (value * gate[:, :1].sigmoid()))

    found, text = lowered(gated, *OPERANDS)
    query, key, value, gate = (tensor.double() for tensor in OPERANDS)
    wanted = (query @ key.mT * 0.3).softmax(-1).mT @ (value * gate * gate[:, :1].sigmoid())
    assert relative_l2(found, wanted) < 2e-6
    assert "reversed_native" in text


def _other_scale(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return reverse(query, key, value, scale=0.4)


def _shift_of_other_scores(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    lse = ops.attention_lse(query * 2, key, [], scale=0.3)
    result: Tensor = ops.attention_mapped(key, query, value, [], lse.neg().unsqueeze(2), None, scale=0.3, weight="exp")
    return result


def _masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    lse = ops.attention_lse(query, key, [], scale=0.3, mask="band(None,30)")
    result: Tensor = ops.attention_mapped(key, query, value, [], lse.neg().unsqueeze(2), None, scale=0.3, weight="exp")
    return result


@pytest.mark.parametrize("function", [_other_scale, _shift_of_other_scores, _masked])
def test_weights_that_are_no_softmax_of_these_scores_keep_their_own_passes(function: Callable[..., Tensor]) -> None:
    found, text = lowered(function, *OPERANDS[:3])
    assert relative_l2(found, function(*(tensor.double() for tensor in OPERANDS[:3]))) < 2e-6
    assert "reversed_native" not in text and "lse_native" in text


def test_few_heads_for_many_threads_are_not_worked_on_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_reversed.torch, "get_num_threads", lambda: 2)
    _, text = lowered(lambda q, k, v: reverse(q, k, v), *OPERANDS[:3])
    assert "reversed_native" in text
    monkeypatch.setattr(attention_reversed.torch, "get_num_threads", lambda: 16)  # ten would wait for six heads
    _, text = lowered(lambda q, k, v: reverse(q, k, v), *OPERANDS[:3])
    assert "reversed_native" not in text
