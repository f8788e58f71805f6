"""The abstract walk agrees with the numbers: what it says of a result is what permuting the scores does to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.passes.experts.expert_axis import SAME, Along, Effect, Grouped, Numbers, expanded, permuted, reshaped
from regraft.passes.experts.operands import Operands
from regraft.passes.experts.permutation import Permutation
from regraft.passes.experts.walk import Walk
from regraft.passes.refused import Refused
from tests.passes.experts.models import random_order
from tests.support import captured

TOKENS, EXPERTS, GROUPS = 5, 12, 3
SIZE = EXPERTS // GROUPS


def acted(effect: Effect, value: Tensor, order: Permutation) -> Tensor:
    """What an effect says that a tensor becomes."""
    if isinstance(effect, Along):
        return value.index_select(effect.dim, torch.tensor(order.of_blocks(effect.parts).order))
    if isinstance(effect, Numbers):
        return torch.tensor(order.of_blocks(effect.parts).inverse)[value]
    if isinstance(effect, Grouped):
        flat = value.flatten(value.dim() + effect.dim, value.dim() + effect.dim + 1)
        dim = effect.dim + 1
        return flat.index_select(dim, torch.tensor(order.order)).view(value.shape)
    return value


def grouped(scores: Tensor) -> Tensor:
    return scores.view(TOKENS, GROUPS, SIZE)


def group_scores(scores: Tensor) -> Tensor:
    return grouped(scores).topk(2, dim=-1)[0].sum(-1)


def group_mask(scores: Tensor) -> Tensor:
    chosen = group_scores(scores).topk(2, dim=-1)[1]
    return torch.zeros(TOKENS, GROUPS).scatter(1, chosen, 1.0)


def limited(scores: Tensor) -> Tensor:
    mask = group_mask(scores).unsqueeze(-1).expand(-1, GROUPS, SIZE).reshape(-1, EXPERTS)
    return scores.masked_fill(~mask.bool(), float("-inf"))


def in_groups(scores: Tensor) -> Tensor:
    return (grouped(scores) * group_mask(scores).unsqueeze(-1)).flatten(1)


ACCEPTED: dict[str, tuple[Callable[[Tensor], Any], Effect]] = {
    "softmax": (lambda s: s.softmax(-1), Along(-1, EXPERTS)),
    "norm": (lambda s: s / s.norm(dim=-1, keepdim=True), Along(-1, EXPERTS)),
    "shifted by the best": (lambda s: (s - s.amax(-1, keepdim=True)).exp(), Along(-1, EXPERTS)),
    "transposed": (lambda s: s.t() * 2, Along(-2, EXPERTS)),
    "moved to the front": (lambda s: s.t().unsqueeze(-1), Along(-3, EXPERTS)),
    "the best values": (lambda s: s.topk(3)[0], SAME),
    "the best experts": (lambda s: s.topk(3)[1], Numbers(EXPERTS)),
    "sorted": (lambda s: s.sort(-1, descending=True)[1][:, :3], Numbers(EXPERTS)),
    "argsort": (lambda s: s.argsort(-1, descending=True)[:, :2], Numbers(EXPERTS)),
    "argmax": (lambda s: s.argmax(-1), Numbers(EXPERTS)),
    "max": (lambda s: s.max(-1)[1], Numbers(EXPERTS)),
    "values of the best": (lambda s: s.gather(1, s.topk(3)[1]), SAME),
    "one hot": (lambda s: torch.nn.functional.one_hot(s.topk(2)[1], EXPERTS), Along(-1, EXPERTS)),
    "scattered": (lambda s: torch.zeros(TOKENS, EXPERTS).scatter(1, s.topk(2)[1], s.topk(2)[0]), Along(-1, EXPERTS)),
    "load": (lambda s: s.softmax(-1).mean(0), Along(-1, EXPERTS)),
    "groups": (grouped, Grouped(-2, GROUPS)),
    "softmax in groups": (lambda s: grouped(s).softmax(-1), Grouped(-2, GROUPS)),
    "scores of groups": (group_scores, Along(-1, GROUPS)),
    "best of each group": (lambda s: grouped(s).max(-1)[0], Along(-1, GROUPS)),
    "largest of each group": (lambda s: grouped(s).amax(-1), Along(-1, GROUPS)),
    "the best groups": (lambda s: group_scores(s).topk(2)[1], Numbers(GROUPS)),
    "mask of groups": (group_mask, Along(-1, GROUPS)),
    "limited to groups": (limited, Along(-1, EXPERTS)),
    "weighted in groups": (in_groups, Along(-1, EXPERTS)),
    "repeated": (lambda s: group_mask(s).repeat_interleave(SIZE, dim=1) * s, Along(-1, EXPERTS)),
    "best of the limited": (lambda s: limited(s).topk(3)[1], Numbers(EXPERTS)),
    "everything": (lambda s: s.sum(), SAME),
}  # fmt: skip

REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "cumulative": (lambda s: s.cumsum(-1), "not understood"),
    "flipped": (lambda s: s.flip(-1), "not understood"),
    "a part": (lambda s: s[:, :3], "by their place"),
    "one expert": (lambda s: s[:, 0], "by their place"),
    "three parts": (lambda s: s.view(TOKENS, 2, 2, 3), "cuts the axis"),
    "groups apart from experts": (lambda s: grouped(s).sum(1), "cuts the axis"),
    "softmax over groups": (lambda s: grouped(s).softmax(1), "cuts the axis"),
    "groups turned": (lambda s: grouped(s).transpose(1, 2).reshape(TOKENS, EXPERTS), "cuts the axis"),
    "places in groups": (lambda s: grouped(s).topk(1, dim=-1)[1] + 0.5, "places of experts inside"),
    "numbers compared": (lambda s: s.topk(2)[1] == 3, "numbers of experts"),
    "experts and groups": (lambda s: s[:, :, None] * group_scores(s)[:, None, :], "different axes"),
    "against the transposed": (lambda s: s[:, :, None] * s[:, None, :], "different axes"),
}


def walked(function: Callable[[Tensor], Any], order: Permutation) -> Effect:
    """The effect on the result of a function of scores ``[tokens, experts]``."""
    program = captured(function, (scores(),))
    walk = Walk(Operands(program), order)
    (given,) = program.user_inputs()
    walk.effects[given] = Along(-1, EXPERTS)
    for node in program.graph.nodes:
        if node.op == "call_function":
            walk.step(node)
    (result,) = program.output_node.all_input_nodes
    return walk.of(result)


def scores() -> Tensor:
    return torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ACCEPTED)
def test_it_says_what_happens(name: str, seed: int) -> None:
    function, expected = ACCEPTED[name]
    order = Permutation(random_order(EXPERTS, seed, GROUPS))
    effect = walked(function, order)
    assert effect == expected
    new = function(scores()[:, list(order.order)])
    assert torch.allclose(new, acted(effect, function(scores()), order))


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_order_matters_to_is_refused(name: str) -> None:
    function, reason = REFUSED[name]
    with pytest.raises(Refused, match=reason):
        walked(function, Permutation(random_order(EXPERTS, 0, GROUPS)))


@pytest.mark.parametrize("name", ["groups", "scores of groups", "limited to groups", "best of the limited"])
def test_groups_must_stay_whole(name: str) -> None:
    with pytest.raises(Refused, match="crosses router groups"):
        walked(ACCEPTED[name][0], Permutation(random_order(EXPERTS, 0)))


def test_shapes() -> None:
    assert reshaped(Along(-1, 6), ("T", 6), ("B", "S", 6), 6) == Along(-1, 6)
    assert reshaped(Along(-2, 6), (6, "T"), (2, 3, "T"), 6) is None  # what lies behind is symbolic
    assert reshaped(Grouped(-3, 2), (2, 3, 4), (6, 4), 6) == Along(-2, 6)
    assert reshaped(Along(-1, 2), (5, 2), (5, 2, 1), 6) == Along(-2, 2)
    assert reshaped(Along(-1, 6), (4, 6), (24,), 6) is None
    assert permuted(Grouped(-2, 2), [1, 2, 0]) == Grouped(-3, 2)
    assert permuted(Grouped(-2, 2), [1, 0, 2]) is None
    assert expanded(Along(-2, 2), (5, 2, 1), (5, 2, 3), 6) == Grouped(-2, 2)
    assert expanded(Along(-2, 2), (5, 2, 1), (5, 2, 4), 6) == Along(-2, 2)
