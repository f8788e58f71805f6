"""Matrix products: one operator for all, linear where the right side is a weight, and one way to repeat heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from regraft.ir.program import Program
from tests.ir.graphs import numbers
from tests.passes.canonicalize.support import canonical, form
from tests.support import captured, run

A, B = numbers(2, 3, 4), numbers(2, 4, 5, seed=1)
SQUARE = numbers(2, 3, 5, seed=2)
CLOSE = 1e-5


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a, b, c: torch.bmm(a, b), "matmul(x0, x1)"),
        (lambda a, b, c: a @ b, "matmul(x0, x1)"),
        (lambda a, b, c: torch.mm(a[0], b[0]), "select.int(x0, -3, 0); select.int(x1, -3, 0); matmul(0, 1)"),
        (lambda a, b, c: torch.baddbmm(c, a, b), "matmul(x0, x1); add.Tensor(0, x2)"),
        (lambda a, b, c: torch.baddbmm(c, a, b, beta=0), "matmul(x0, x1)"),
        (lambda a, b, c: torch.baddbmm(c, a, b, beta=0, alpha=0.5), "matmul(x0, x1); mul.Tensor(0, 0.5)"),
        (
            lambda a, b, c: torch.baddbmm(c, a, b, beta=2, alpha=0.5),
            "matmul(x0, x1); mul.Tensor(0, 0.5); mul.Tensor(x2, 2); add.Tensor(1, 2)",
        ),
        (
            lambda a, b, c: torch.addmm(c[0], a[0], b[0], beta=0.5),
            "select.int(x2, -3, 0); select.int(x0, -3, 0); select.int(x1, -3, 0); matmul(1, 2); "
            "mul.Tensor(0, 0.5); add.Tensor(3, 4)",
        ),
    ],
)
def test_products_are_matmul(function: Callable[..., Tensor], expected: str) -> None:
    assert canonical(function, A, B, SQUARE, tolerance=CLOSE) == expected


Q, K = numbers(2, 4, 3, 8), numbers(2, 4, 5, 8, seed=1)


@pytest.mark.parametrize(
    ("equation", "left", "right", "expected"),
    [
        ("bhqd,bhkd->bhqk", Q, K, "permute(x1, [0, 1, 3, 2]); matmul(x0, 0)"),
        ("bhqk,bhkd->bhqd", numbers(2, 4, 3, 5), K, "matmul(x0, x1)"),
        (
            "bqhd,bkhd->bhqk",
            numbers(2, 3, 4, 8),
            numbers(2, 5, 4, 8),
            "permute(x0, [0, 2, 1, 3]); permute(x1, [0, 2, 3, 1]); matmul(0, 1)",
        ),
        (
            "bhqk,bkhd->bqhd",
            numbers(2, 4, 3, 5),
            numbers(2, 5, 4, 8),
            "permute(x1, [0, 2, 1, 3]); matmul(x0, 0); permute(1, [0, 2, 1, 3])",
        ),
        (  # query heads in groups, one key head a group
            "bgrqd,bgkd->bgrqk",
            numbers(2, 2, 3, 5, 8),
            numbers(2, 2, 7, 8),
            "permute(x1, [0, 1, 3, 2]); unsqueeze(0, -3); matmul(x0, 1)",
        ),
        (  # queries of several heads, one key head for all: weights of scores stay scores
            "bhqk,bkd->bqhd",
            numbers(2, 4, 3, 5),
            numbers(2, 5, 8),
            "unsqueeze(x1, -3); matmul(x0, 0); permute(1, [0, 2, 1, 3])",
        ),
        ("...qd,...kd->...qk", Q, K, "permute(x1, [0, 1, 3, 2]); matmul(x0, 0)"),
        ("...ij,jk->...ik", numbers(2, 2, 3), numbers(3, 4), "unsqueeze(x1, -3); matmul(x0, 0)"),
        ("ij,jk->ik", numbers(2, 3), numbers(3, 4), "matmul(x0, x1)"),
        ("i j, k j -> i k", numbers(2, 3), numbers(4, 3), "permute(x1, [1, 0]); matmul(x0, 0)"),
    ],
)
def test_einsum_is_matmul(equation: str, left: Tensor, right: Tensor, expected: str) -> None:
    assert canonical(lambda a, b: torch.einsum(equation, a, b), left, right, tolerance=CLOSE) == expected


@pytest.mark.parametrize(
    ("equation", "operands"),
    [
        ("bij,bjk->bi", (A, B)),  # k is summed alone
        ("bij,bij->b", (A, A)),  # two indices are contracted
        ("...ij,...jk->ik", (A, B)),  # what the ellipsis stands for is summed
        ("bij->bji", (A,)),
    ],
)
def test_other_einsums_stay_and_keep_their_meaning(equation: str, operands: tuple[Tensor, ...]) -> None:
    text = canonical(lambda *xs: torch.einsum(equation, *xs), *operands, tolerance=CLOSE)
    assert "einsum" in text


class Product(nn.Module):
    """A product with a weight, in whatever way ``function`` writes it."""

    def __init__(self, function: Callable[..., Tensor], size: tuple[int, ...] = (4, 5)) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers(*size, seed=3))
        self.bias = nn.Parameter(numbers(5, seed=4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def linear_form(function: Callable[..., Tensor], size: tuple[int, ...] = (4, 5)) -> tuple[str, Program]:
    model = Product(function, size)
    program = captured(model, (A,))
    torch.testing.assert_close(run(program, (A,)), model(A).detach(), rtol=CLOSE, atol=CLOSE)
    return form(program), program


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GPT-2's linear layer, whose weight is [in, out]."""
    size = (*x.size()[:-1], weight.shape[1])
    return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(size)


def test_product_with_a_weight_is_linear_of_its_transpose() -> None:
    text, program = linear_form(lambda x, w, b: x @ w)
    assert text == "linear(x0, w0)"
    assert program.weights.derived["weight.T"].op == "permute"


def test_product_with_a_transposed_weight_is_linear() -> None:
    text, program = linear_form(lambda x, w, b: x @ w.t(), (5, 4))
    assert text == "linear(x0, w0)" and not program.weights.derived


def test_added_bias_joins_the_layer() -> None:
    assert linear_form(lambda x, w, b: b + x @ w.T, (5, 4))[0] == "linear(x0, w0, w1)"


def test_conv1d_is_linear_and_keeps_the_shape_of_its_input() -> None:
    text, program = linear_form(conv1d)
    weights = [program.weight_name(node) for node in program.weight_placeholders()]
    assert text in ("linear(x0, w0, w1)", "linear(x0, w1, w0)") and sorted(weights) == ["bias", "weight.T"]  # type: ignore[type-var]


def test_heads_are_joined_in_front_of_a_layer_and_leading_dims_stay() -> None:
    """As PyTorch's own multi-head attention ends."""

    def joined(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 2)).transpose(1, 2)
        return (heads.reshape(4, 6) @ weight.T).view(2, 2, 5)

    assert linear_form(joined, (5, 6))[0] == (
        "reshape(x0, [2, 3, 2, 2]); permute(0, [0, 2, 1, 3]); reshape(1, [2, 2, 6]); linear(2, w0)"
    )


def test_bias_of_a_product_that_is_read_twice_stays_apart() -> None:
    def both(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        product = x @ w.T
        return (product + b) * product

    assert linear_form(both, (5, 4))[0] == "linear(x0, w0); add.Tensor(0, w1); mul.Tensor(1, 0)"


HEADS = numbers(2, 3, 5, 4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, :, None].expand(2, 3, 2, 5, 4).reshape(2, 6, 5, 4),
        lambda x: x.unsqueeze(2).repeat(1, 1, 2, 1, 1).view(2, 6, 5, 4),
        lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2),
        lambda x: x.repeat_interleave(2, 1),
        lambda x: x.repeat_interleave(2, dim=-3),
    ],
)
def test_repeated_heads(function: Callable[[Tensor], Tensor]) -> None:
    assert canonical(function, HEADS) == "repeat_interleave.self_int(x0, 2, -3)"


def test_tiled_heads_are_not_repeated_heads() -> None:
    text = canonical(lambda x: x[:, None].expand(2, 2, 3, 5, 4).reshape(2, 6, 5, 4), HEADS)
    assert "repeat_interleave" not in text


def test_transposed_product_is_a_product() -> None:
    """Scores that are computed with the keys first."""
    text = canonical(lambda q, k: (k @ q.mT).mT.sin(), Q, K, tolerance=CLOSE)
    assert text == "permute(x1, [0, 1, 3, 2]); matmul(x0, 0); sin(1)"
    used = canonical(lambda q, k: ((p := k @ q.mT).mT, p), Q, K, tolerance=CLOSE)
    assert used == "permute(x0, [0, 1, 3, 2]); matmul(x1, 0); permute(1, [0, 1, 3, 2])"
