"""What masks say of padding: tokens that are hidden from all never merge with others, whatever says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.ir.driver import Session
from regraft.passes.tokens.reduce import ReduceTokens
from tests.passes.tokens.models import outputs, recognised, relative
from tests.passes.tokens.test_legality import HEADS, TOKENS, WIDTH, Encoder, numbers, refusal


class Written(nn.Module):
    """A block whose attention is written out, with its mask from ``read`` of a padding mask, and hidden scores of
    ``fill``."""

    def __init__(self, read: Callable[[Tensor], Tensor], fill: float = -torch.inf) -> None:
        super().__init__()
        self.block, self.read, self.fill = Encoder([(False, False)], "every token").blocks[0], read, fill

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        shape = *x.shape[:2], 3, HEADS, WIDTH // HEADS
        query, key, value = self.block.projections(x).reshape(shape).permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(-1, -2)).masked_fill(~self.read(mask), self.fill)
        x = x + (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return (x + self.block.mlp(x))[:, 0]


@pytest.mark.parametrize("method", ["tome", "pitome", "evit", "grid", "prune-cls"])
@pytest.mark.parametrize(
    "read",
    [
        lambda it: ~it[:, None, None],
        lambda it: ~(it | it.roll(1, 0))[:, None, None],
        lambda it: (torch.arange(TOKENS) < 2) | ~it[:, None, None],  # the first tokens are always there
        lambda it: (torch.arange(TOKENS) < 7).expand(2, 1, 1, -1) | (it & ~it)[:, None, None],  # whatever the input is
    ],
)
def test_what_a_mask_says_of_padding_is_heard_however_it_is_said(method: str, read: Callable[[Tensor], Tensor]) -> None:
    """True for padding, as nn.MultiheadAttention wants it, and two masks at once: words would merge with padding."""
    hidden = torch.arange(TOKENS) >= torch.tensor([[7], [7]])
    x, other = numbers(2, TOKENS, WIDTH), 50 * numbers(2, TOKENS, WIDTH, seed=1)
    program = recognised(Written(read).double(), (x, hidden))
    assert ReduceTokens(3, method).run(program, Session(verify="off")) == 1
    (found,) = outputs(program)
    (same,) = outputs(program, torch.where(hidden[..., None], other, x), hidden)
    assert relative(same, found) <= 1e-12


def test_masks_that_say_something_else_of_tokens_are_refused() -> None:
    """Padding that sees itself is no more hidden from everyone; a score of -5 keeps a weight."""
    given = numbers(2, TOKENS, WIDTH), torch.arange(TOKENS) < torch.tensor([[TOKENS], [7]])
    itself = Written(lambda there: there[:, None, None] | (torch.arange(12)[:, None] == torch.arange(12))).double()
    assert refusal(itself, given).startswith("the mask of the attention is a tensor that does not say which tokens are")
    weak = Written(lambda there: there[:, None, None], fill=-5.0).double()
    assert refusal(weak, given) == "hidden scores are -5, and keep a weight without the size of a token"


class Behind(nn.Module):
    """A layer in which each token sees its neighbours, and an attention with a mask behind it: from weights, or not."""

    def __init__(self, crossed: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Encoder([(False, False)] * 2, "every token").blocks)
        self.asked = nn.Parameter(torch.randn(1, 3, WIDTH)) if crossed else None

    def attend(self, block: nn.Module, query: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        weights = block.projections.weight.chunk(3)
        parts = [F.linear(source, weight) for source, weight in zip((query, x, x), weights, strict=True)]
        split = [part.reshape(*part.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2) for part in parts]
        return F.scaled_dot_product_attention(*split, attn_mask=mask).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        places = torch.arange(TOKENS)
        first, second = self.blocks
        x = x + self.attend(first, x, x, (places[:, None] - places).abs() <= 1)
        x = x + first.mlp(x)
        query = x if self.asked is None else self.asked.expand(x.shape[0], -1, -1)
        mask = told[:, None, None] if told.dtype == torch.bool else (told[:, :, None] == told[:, None])[:, None]
        return self.attend(second, query, x, mask)[:, 0]


@pytest.mark.parametrize("method", ["tome", "evit", "grid", "prune-cls"])
@pytest.mark.parametrize("crossed", [False, True])
def test_what_an_attention_behind_hides_does_not_merge_with_what_it_sees(method: str, crossed: bool) -> None:
    """A memory whose padding only the decoder is told of, and a first layer that is local."""
    there = torch.arange(TOKENS) < torch.tensor([[7], [TOKENS]])
    program = recognised(Behind(crossed).double(), (numbers(2, TOKENS, WIDTH), there))
    session = Session(verify="off")
    assert ReduceTokens((3,) if crossed else (3, 0), method).run(program, session) == 0
    (refused,) = session.log.refusals
    assert refused.reason.startswith("an attention behind hides tokens that this one sees")
    assert "test_padding.py" in refused.user_line


def test_documents_that_an_attention_behind_keeps_apart_do_not_merge() -> None:
    documents = (torch.arange(TOKENS) // 6).expand(2, -1).contiguous()
    said = refusal(Behind(False).double(), (numbers(2, TOKENS, WIDTH), documents))
    assert said == "the attention keeps documents apart, and tokens of two documents must not merge"
