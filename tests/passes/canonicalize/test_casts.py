"""Casts and copies: what changes nothing is gone, what matters stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.passes.canonicalize.pipeline import canonicalize
from tests.ir.graphs import numbers
from tests.passes.canonicalize.support import canonical, form
from tests.support import captured, run

X = numbers(2, 3, 4)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.to(torch.bfloat16), "to.dtype(x0, torch.bfloat16)"),
        (lambda x: x.bfloat16(), "to.dtype(x0, torch.bfloat16)"),
        (lambda x: x.type(torch.bfloat16), "to.dtype(x0, torch.bfloat16)"),
        (lambda x: x.to(torch.bfloat16, copy=True), "to.dtype(x0, torch.bfloat16)"),
        (lambda x: x.to(x.new_zeros(1, dtype=torch.float64)), "to.dtype(x0, torch.float64)"),
        (lambda x: x.double().type_as(x), "to.dtype(x0, torch.float64); to.dtype(0, torch.float32)"),
        (lambda x: x.to(torch.float32).sin(), "sin(x0)"),
        (lambda x: x.to("cpu").sin(), "sin(x0)"),
        (lambda x: x.float().type_as(x).sin(), "sin(x0)"),
        (lambda x: x.sin().clone(), "sin(x0)"),
        (lambda x: x.transpose(0, 1).contiguous().sin(), "permute(x0, [1, 0, 2]); sin(0)"),
        (lambda x: x.sin().detach(), "sin(x0)"),
        (lambda x: torch.nn.functional.dropout(x.sin(), 0.5, False), "sin(x0)"),
    ],
)
def test_spelling(function: Callable[[Tensor], object], expected: str) -> None:
    assert canonical(function, X) == expected


def test_copy_that_made_a_view_legal_goes_because_views_are_reshapes() -> None:
    assert canonical(lambda x: x.transpose(1, 2).contiguous().view(2, 12), X) == (
        "permute(x0, [0, 2, 1]); reshape(0, [2, 12])"
    )


def test_returned_input_is_still_a_copy() -> None:
    program = captured(lambda x: x.clone(), (X,))
    result = run(program, (X,))
    assert torch.equal(result, X) and result.data_ptr() != X.data_ptr()


def test_copy_in_front_of_a_complex_view_stays() -> None:
    def pairs(x: Tensor) -> Tensor:
        return torch.view_as_complex(x.transpose(1, 2).contiguous().view(2, 4, 3)[..., :2].contiguous()).abs()

    assert "clone" in canonical(pairs, X) or "contiguous" in canonical(pairs, X)


class WithRegions(nn.Module):
    """Dropout, and a region without gradients: nothing of either may be left."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.sin()
        return self.dropout(y).to(torch.float32).cos()


def test_regions_dropout_and_assertions_are_gone() -> None:
    program = capture(WithRegions().eval(), (X,))
    canonicalize(program, Session())
    assert form(program) == "sin(x0); cos(0)"


def test_common_subexpressions_are_one_and_dead_code_is_gone() -> None:
    def repeated(x: Tensor) -> Tensor:
        x.exp()
        return (x.sin() + 1) * (x.sin() + 1.5) + (x.sin() + 1)

    assert canonical(repeated, X) == (
        "sin(x0); add.Tensor(0, 1); add.Tensor(0, 1.5); mul.Tensor(1, 2); add.Tensor(3, 1)"
    )


def test_random_numbers_are_drawn_twice() -> None:
    program = captured(lambda x: torch.rand_like(x) - torch.rand_like(x), (X,))
    assert form(program).count("rand_like") == 2


def test_weights_that_nothing_reads_are_dropped() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x)  # type: ignore[no-any-return]

    program = captured(Unused(), (X,))
    assert sorted(program.weights.originals) == ["used.bias", "used.weight"]


def model(x: Tensor) -> Tensor:
    q, k, v = x.view(x.shape[0], 3, 2, 2).transpose(1, 2).contiguous().repeat(1, 1, 1, 3).chunk(3, -1)
    weights = (2 * torch.einsum("bhqd,bhkd->bhqk", q, k)).float().softmax(3).to(q.dtype)
    return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).view(x.shape[0], 2, 3, 2).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dynamic", [None, ({0: torch.export.Dim("batch", min=2, max=64)},)])
def test_canonical_form_is_canonical(dynamic: object) -> None:
    program = captured(model, (X,), dynamic=(dynamic,) if dynamic else None)
    before = form(program)
    session = Session()
    canonicalize(program, session)
    assert form(program) == before and session.applied == 0


def test_attention_without_dropout_draws_nothing_and_goes_where_nothing_reads_it() -> None:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    heads = numbers(2, 3, 5, 8)
    assert canonical(lambda x: (sdpa(x, x, x), x * 2)[1], heads) == "mul.Tensor(x0, 2)"
    assert canonical(lambda x: sdpa(x, x, x) + sdpa(x, x, x), heads).count("scaled_dot_product_attention") == 1
