"""Convolutions in eval mode take a batch norm beside them and a depthwise residual, and only where that is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from regraft.passes.fuse.convolution import FoldNormIntoLast, FoldNormIntoNext, FoldResidualOfDepthwise
from tests.ir.graphs import numbers
from tests.support import apply, captured, run

RULES = (FoldNormIntoNext(), FoldNormIntoLast(), FoldResidualOfDepthwise())
X = numbers(2, 4, 6, 7)


class Layers(nn.Module):
    """A convolution and a norm that has seen data, used as ``function`` says."""

    def __init__(self, conv: nn.Conv2d, function: Callable[[Layers, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.before, self.behind = conv, nn.BatchNorm2d(4), nn.BatchNorm2d(conv.out_channels)
        for norm in (self.before, self.behind):
            for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def fired(conv: nn.Conv2d, function: Callable[[Layers, Tensor], Tensor]) -> list[str]:
    """The rules that fired, after checking the numbers."""
    model = Layers(conv, function).eval()
    program = captured(model, (X,))
    session = apply(program, RULES)
    assert not [refusal for refusal in session.log.refusals if refusal.kind == "rolled back"]
    torch.testing.assert_close(run(program, (X,)), model(X).detach(), rtol=1e-5, atol=1e-5)
    return [item.rule for item in session.log.applications]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_norms_on_both_sides_become_weights(groups: int, bias: bool) -> None:
    conv = nn.Conv2d(4, 8, 1, groups=groups, bias=bias)
    rules = fired(conv, lambda m, x: m.behind(m.conv(m.before(x))))
    assert sorted(rules) == ["fold-norm-into-last", "fold-norm-into-next"]


def test_a_norm_in_front_of_padding_stays() -> None:
    assert not fired(nn.Conv2d(4, 8, 3, padding=1), lambda m, x: m.conv(m.before(x)))
    assert fired(nn.Conv2d(4, 8, 3), lambda m, x: m.conv(m.before(x))) == ["fold-norm-into-next"]
    assert fired(nn.Conv2d(4, 8, 3, padding=1), lambda m, x: m.behind(m.conv(x))) == ["fold-norm-into-last"]


def test_what_is_read_elsewhere_stays() -> None:
    assert not fired(nn.Conv2d(4, 4, 1), lambda m, x: m.conv(y := m.before(x)) + y)


@pytest.mark.parametrize(
    ("conv", "folds"),
    [
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), True),
        (nn.Conv2d(4, 4, (3, 5), padding=(1, 2), groups=4, bias=False), True),
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4), True),
        (nn.Conv2d(4, 4, 3, padding=1), False),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), False),
        (nn.Conv2d(4, 4, 1), False),
    ],
)
def test_the_residual_of_a_depthwise_convolution_is_its_centre(conv: nn.Conv2d, folds: bool) -> None:
    rules = fired(conv, lambda m, x: x + m.conv(x))
    assert rules == (["fold-residual-of-depthwise"] if folds else [])
