"""Passes over the residual stream: Token Prepending and in-context vectors equal their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.ir.ops.steer import reference
from regraft.passes.attention.errors import AttentionError
from regraft.passes.attention.in_context import InContextVectors
from regraft.passes.attention.prepend import PrependToken
from tests.passes.attention.models import WIDTH, Model, X, after, output, recognised


def close(value: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("place", [0, 7])
def test_a_token_is_overwritten_by_the_last_in_front_of_layers(norm_first: bool, place: int) -> None:
    model = Model(norm_first=norm_first)
    program = recognised(model)
    session = after(program, PrependToken(place, 1, 3))

    def change(layer: int, where: str, value: Tensor) -> Tensor:
        if where != "entry" or layer == 0:
            return value
        value = value.clone()
        value[:, place] = value[:, -1]
        return value

    close(output(program), model(X, change))
    assert [item.exactness for item in session.log.applications] == ["lossy"]
    assert not torch.allclose(output(program), model(X)), "the pass changes what the model computes"


def turned(x: Tensor, vectors: Tensor, strength: float) -> Tensor:
    """Written from the formula, vector by vector."""
    unit = x / x.norm(dim=-1, keepdim=True)
    total = torch.zeros_like(x)
    for vector in vectors:
        cosine = F.cosine_similarity(x, -vector, dim=-1)[..., None]
        total = total + strength * (1 + cosine.clamp(min=0)) * vector / vector.norm()
    moved = unit + total / len(vectors)
    return moved / moved.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_feed_forward_outputs_are_turned_towards_vectors(norm_first: bool, count: int) -> None:
    model = Model(norm_first=norm_first)
    vectors = torch.randn(3, count, WIDTH, generator=torch.Generator().manual_seed(3))
    program = recognised(model)
    after(program, InContextVectors(vectors if count > 1 else vectors[:, 0], 0.3, only=(0, 2)))

    def change(layer: int, where: str, value: Tensor) -> Tensor:
        return turned(value, vectors[layer], 0.3) if where == "feed forward" and layer != 1 else value

    close(output(program), model(X, change))


def test_steering_keeps_lengths_and_types() -> None:
    x, vectors = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 8)
    out = reference(x, vectors, 0.5)
    assert out.dtype == torch.bfloat16  # the published code casts to half, whatever came in
    torch.testing.assert_close(out.float().norm(dim=-1), x.float().norm(dim=-1), rtol=2e-2, atol=2e-2)
    exact = torch.randn(2, 3, 8, dtype=torch.float64)
    close(reference(exact, vectors, 0.5), turned(exact, vectors.double(), 0.5))
    assert torch.equal(reference(torch.zeros(1, 8), vectors, 0.5), torch.zeros(1, 8))


def test_a_strength_of_zero_or_no_layers_change_nothing() -> None:
    program = recognised(Model())
    before = output(program)
    after(program, InContextVectors(torch.randn(3, WIDTH), 0.0), PrependToken(0, 2, 2))
    assert torch.equal(output(program), before)


def test_what_does_not_fit_the_model_is_told() -> None:
    program = recognised(Model())
    with pytest.raises(AttentionError, match="3 layers of width 32"):
        after(program, InContextVectors(torch.randn(2, WIDTH), 0.1))
    with pytest.raises(AttentionError, match="layers 0 to 4 were given"):
        after(program, PrependToken(0, 0, 4))
    with pytest.raises(AttentionError, match="before the last of 20 tokens"):
        after(program, PrependToken(19, 0, 1))


def test_a_program_without_a_residual_stream_is_refused() -> None:
    class Bare(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return (query @ key.mT).softmax(-1) @ value

    program = recognised(Bare(), *(torch.randn(2, 4, 6, 8) for _ in range(3)))
    session = after(program, PrependToken(0, 0, 1))
    assert [refusal.reason for refusal in session.log.refusals] == ["the query is no projection of the stream"]
