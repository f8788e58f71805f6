"""What looks like a site by its data flow, and leaves every pattern before its landmark, is in the report."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.ir.driver import Session
from regraft.ir.records import Refusal
from regraft.passes.pipeline import recognising
from regraft.passes.recognize.left import ReportLeftSites
from tests.ir.graphs import numbers
from tests.passes.recognize.attention_support import Module
from tests.support import captured

LENGTH, WIDTH = 6, 8
X = numbers(2, LENGTH, WIDTH, seed=1)
HEADS = tuple(numbers(2, 4, LENGTH, WIDTH, seed=seed) for seed in (1, 2, 3))
ANGLES = torch.arange(LENGTH)[:, None] * 0.5 ** torch.arange(WIDTH // 2)
ANGLES = torch.cat([ANGLES, ANGLES], -1)


def refusals(function: Callable[..., Tensor] | nn.Module, args: tuple[Tensor, ...]) -> list[Refusal]:
    """What no rule took or refused when ``function`` was recognised."""
    session = Session()
    recognising().run(captured(function, args), session)
    return [refusal for refusal in session.log.refusals if refusal.pass_name == ReportLeftSites().name]


def _renormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    kept = weights * (weights > 0.1)
    return kept / kept.sum(-1, keepdim=True) @ v


def _differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = (q @ k.mT).softmax(-1).chunk(2, 1)
    return (first - 0.3 * second) @ v[:, :2]


class _Talking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4, bias=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        return self.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


class _TalkingByConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.mix((q @ k.mT).softmax(-1)) @ v


ATTENTION = {
    "weights of a threshold, normed again": (_renormalised, "aten.mul.Tensor"),
    "one head's weights less another's": (_differential, "aten.sub.Tensor"),
    "weights that heads mix": (_Talking(), "aten.linear.default"),
    "weights that heads mix by a convolution": (_TalkingByConvolution(), "aten.conv2d.default"),
    "values summed element by element": (
        lambda q, k, v: ((q @ k.mT).softmax(-1)[..., None] * v[:, :, None]).sum(-2),
        "aten.mul.Tensor",
    ),
}


@pytest.mark.parametrize(("function", "call"), ATTENTION.values(), ids=ATTENTION)
def test_attention_out_of_the_pattern_is_reported(function: Callable[..., Tensor], call: str) -> None:
    (refusal,) = refusals(function, HEADS)
    assert (refusal.rule, refusal.recognizes) == ("recognize-attention", "attention")
    assert refusal.reason.startswith("between queries, keys and values stands") and call in refusal.reason
    assert "test_left.py" in refusal.user_line


def _weighed(normed: Callable[[Tensor], Tensor]) -> nn.Module:
    return Module(lambda m, x: normed(x) * m.weight, weight=numbers(WIDTH, seed=2))


NORMS = {
    "spread of what is not centered": (_weighed(lambda x: x / (x.std(-1, keepdim=True) + 1e-6)), "layer_norm"),
    "eps added to the root": (_weighed(lambda x: x / (x.norm(dim=-1, keepdim=True) * WIDTH**-0.5 + 1e-8)), "rms_norm"),
    "weight before the length": (
        Module(lambda m, x: m.weight * x * x.norm(dim=-1, keepdim=True).pow(-1), weight=numbers(WIDTH, seed=2)),
        "rms_norm",
    ),
}


@pytest.mark.parametrize(("module", "kind"), NORMS.values(), ids=NORMS)
def test_norm_out_of_the_pattern_is_reported(module: nn.Module, kind: str) -> None:
    (refusal,) = refusals(module, (X,))
    assert refusal.recognizes == kind
    assert "what divides is not the root of a mean of squares plus eps" in refusal.reason


MAPS: dict[str, Callable[..., Tensor]] = {
    "aten.silu.default": lambda q, k, v: F.silu(q @ k.mT) / LENGTH @ v,  # HSTU
    "relu_squared": lambda q, k, v: torch.relu(q @ k.mT).square() @ v,  # FLASH
}


@pytest.mark.parametrize(("call", "function"), MAPS.items(), ids=MAPS)
def test_attention_by_another_map_is_reported(call: str, function: Callable[..., Tensor]) -> None:
    (refusal,) = refusals(function, HEADS)
    assert refusal.recognizes == "attention_mapped"
    assert f"scores become weights by {call}" in refusal.reason


def _rolled(x: Tensor) -> Tensor:
    sign = torch.cat([-torch.ones(WIDTH // 2), torch.ones(WIDTH // 2)])
    return x * ANGLES.cos() + x.roll(WIDTH // 2, -1) * (ANGLES.sin() * sign)


def _by_matrices(x: Tensor) -> Tensor:
    angles = ANGLES[:, : WIDTH // 2]
    matrices = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2))
    pairs = x.reshape(*x.shape[:-1], -1, 1, 2)
    return (matrices[..., 0] * pairs[..., 0] + matrices[..., 1] * pairs[..., 1]).reshape(x.shape)


def _rolled_together(q: Tensor, k: Tensor) -> Tensor:
    cos, sin = ANGLES.cos(), ANGLES.sin()
    query = q * cos + q.flip(-1) * sin
    key = k * cos + k.flip(-1) * sin
    return query @ key.mT


def test_each_rotation_by_one_table_is_reported() -> None:
    found = refusals(_rolled_together, (X, numbers(2, LENGTH, WIDTH, seed=2)))
    assert [refusal.recognizes for refusal in found] == ["rope", "rope"]
    assert len({refusal.user_line for refusal in found}) == 2


@pytest.mark.parametrize("function", [_rolled, _by_matrices])
def test_rotation_out_of_the_pattern_is_reported(function: Callable[..., Tensor]) -> None:
    (refusal,) = refusals(function, (X,))
    assert refusal.recognizes == "rope"
    assert "cos and sin of one angle" in refusal.reason


SILENT = {
    "found": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, HEADS),
    "a softmax of no products": (lambda x: x.softmax(-1) @ x.mT, (X,)),
    "scores of labels": (lambda x, y: (x @ y.mT).softmax(-1), (X, X)),
    "scores summed up by a vector": (lambda x, y, v: F.linear((x @ y.mT).softmax(-1), v), (X, X, X[0, :, 0])),
    "a unit length": (lambda x: x / (x.norm(dim=-1, keepdim=True) + 1e-6), (X,)),
    "a number a row": (lambda x: x / (x.sum(-1, keepdim=True) + 1e-6), (X,)),
    "features of angles": (lambda x: torch.cat([(x * 3).cos(), (x * 3).sin()], -1), (X,)),
    "angles of features, joined": (lambda x: torch.cat([x * ANGLES.cos(), F.relu(x) * ANGLES.sin()], -1), (X,)),
}


@pytest.mark.parametrize(("function", "args"), SILENT.values(), ids=SILENT)
def test_what_is_no_such_site_is_not_reported(function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> None:
    assert refusals(function, args) == []
