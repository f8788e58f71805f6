"""What an output may be off by: as coarse as the coarsest type that the model computes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regraft
from regraft.tolerance import BY_TYPE, tolerance
from tests.ir.graphs import numbers
from tests.support import captured

X = numbers(4, 8)


@pytest.mark.parametrize(
    ("function", "coarsest"),
    [
        pytest.param(lambda x: x.sin(), torch.float32, id="fp32"),
        pytest.param(lambda x: x.bfloat16().sin().float(), torch.bfloat16, id="computed in bf16, returned in fp32"),
        pytest.param(lambda x: x.half().float().sin(), torch.float32, id="rounded, but not computed in fp16"),
        pytest.param(lambda x: x.sin().half(), torch.float16, id="returned in fp16"),
    ],
)
def test_the_coarsest_type_decides(function: Callable[[Tensor], Tensor], coarsest: torch.dtype) -> None:
    assert tolerance(captured(function, (X,)), [function(X)]) == BY_TYPE[coarsest]


def test_weights_that_are_stored_in_bf16_make_no_model_of_fp32_coarser() -> None:
    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = (nn.Parameter(numbers(*size, dtype=torch.bfloat16)) for size in ((8, 8), (8, 1)))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, (self.weight * self.scale).float())

    assert tolerance(captured(Stored(), (X,)), [X]) == BY_TYPE[torch.float32]


def test_outputs_without_a_fraction_must_be_equal() -> None:
    assert tolerance(captured(lambda x: x.half().sin().argmax(-1), (X,)), [X.argmax(-1), None, 3]) == 0.0


class Decoder(nn.Module):
    """A trunk in bf16 whose logits are returned in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.head = nn.Linear(32, 50)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.trunk(x)).float()


def test_a_model_in_bf16_that_returns_fp32_is_compiled() -> None:
    torch.manual_seed(0)
    model = Decoder().bfloat16().eval()
    x = numbers(2, 16, 32, dtype=torch.bfloat16)
    compiled = regraft.compile(model, (x,))
    assert compiled.entries and not [event for event in compiled.report.events if "fallback" in str(event)]
    assert compiled.report.tolerance == BY_TYPE[torch.bfloat16]
    wanted = Decoder().double().eval()
    wanted.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        exact, own, given = wanted(x.double()), model(x).double(), compiled(x).double()
    assert (given - exact).norm() <= 2 * (own - exact).norm()


class Spectrum(nn.Module):
    """A layer whose result is returned as its Fourier transform."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(self.layer(x))


def test_a_model_with_complex_outputs_is_compiled() -> None:
    torch.manual_seed(0)
    model, x = Spectrum().eval(), torch.randn(4, 16)
    compiled = regraft.compile(model, (x,))
    assert compiled.entries and not compiled.report.events
    assert compiled.report.tolerance == BY_TYPE[torch.float32]
    torch.testing.assert_close(compiled(x), model(x))
