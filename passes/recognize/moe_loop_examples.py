"""Loops over experts as models spell them, and what only looks like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.ir.rule import Example

_TOKENS, _EXPERTS, _TOP_K, _HIDDEN, _INNER = 5, 3, 2, 8, 6
Combine = Callable[[Tensor, Tensor, Tensor, Callable[[int, Tensor], Tensor]], Any]


class Block(nn.Module):
    """A router and three gated experts; ``combine(x, index, weight, expert)`` is the loop over them."""

    def __init__(self, combine: Combine, stacked: bool = False, bias: bool = False, odd: bool = False) -> None:
        super().__init__()
        self.combine, self.stacked, self.odd = combine, stacked, odd
        self.router = nn.Linear(_HIDDEN, _EXPERTS, bias=False)
        sizes = ((_HIDDEN, _INNER), (_HIDDEN, _INNER), (_INNER, _HIDDEN))
        self.experts = nn.ModuleList(
            nn.ModuleList(nn.Linear(*size, bias=bias) for size in sizes) for _ in range(_EXPERTS)
        )
        self.first = nn.Parameter(torch.randn(_EXPERTS, _HIDDEN, 2 * _INNER))
        self.down = nn.Parameter(torch.randn(_EXPERTS, _INNER, _HIDDEN))

    def forward(self, x: Tensor) -> Any:
        """``x [5, 8]``."""
        weight, index = torch.topk(self.router(x).softmax(-1), _TOP_K)
        return self.combine(x, index, weight, self.expert)

    def expert(self, number: int, x: Tensor) -> Tensor:
        """One expert on some rows."""
        if self.stacked:
            gate, up = (x @ self.first[number]).chunk(2, dim=-1)
            return (F.silu(gate) * up) @ self.down[number]
        layers: Any = self.experts[number]
        gate, up = layers[0](x), layers[1](x)
        activated = F.relu(gate) if self.odd and number == 1 else F.silu(gate)
        return cast(Tensor, layers[2](activated * up))


def example(name: str, combine: Combine, reason: str = "", **options: bool) -> Example:
    """A block that combines its experts by ``combine``."""

    def make() -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        torch.manual_seed(0)
        return Block(combine, **options).eval(), (torch.randn(_TOKENS, _HIDDEN),)

    return Example(name, make, reason)


def all_tokens(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """Every expert on every token, weighted by zero where it was not chosen."""
    out = torch.zeros_like(x)
    for number in range(_EXPERTS):
        out = out + expert(number, x) * (weight * (index == number)).sum(-1, keepdim=True)
    return out


def masked(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """The weights by ``where``."""
    out = torch.zeros_like(x)
    for number in range(_EXPERTS):
        out += torch.where(index == number, weight, 0.0).sum(-1).unsqueeze(-1) * expert(number, x)
    return out


def one_hot(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """The weights of all experts in a table."""
    table = (F.one_hot(index, _EXPERTS) * weight.unsqueeze(-1)).sum(1)
    return cast(Tensor, sum(expert(number, x) * table[:, number, None] for number in range(_EXPERTS)))


def scattered(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """The table by ``scatter``."""
    table = torch.zeros(_TOKENS, _EXPERTS).scatter(1, index, weight)
    return cast(Tensor, sum(expert(number, x) * table[:, number : number + 1] for number in range(_EXPERTS)))


def found(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """Every expert on the tokens that chose it."""
    out = torch.zeros_like(x)
    for number in range(_EXPERTS):
        token, slot = torch.where(index == number)
        out.index_add_(0, token, expert(number, x[token]) * weight[token, slot, None])
    return out


def found_in_mask(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """The tokens from a permuted one-hot mask."""
    out, mask = torch.zeros_like(x), F.one_hot(index, _EXPERTS).permute(2, 1, 0)
    for number in range(_EXPERTS):
        slot, token = torch.where(mask[number])
        rows = x[None, token].reshape(-1, _HIDDEN)
        out.index_add_(0, token, expert(number, rows) * weight[token, slot, None])
    return out


def assigned(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """Added by assignment, onto the tokens themselves."""
    out = x.clone()
    for number in range(_EXPERTS):
        token, slot = torch.where(index == number)
        out[token] += expert(number, x[token]) * weight[token, slot, None]
    return out


def of_sequences(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """Tokens and the router's table with a dim for the batch."""
    table = torch.zeros(_TOKENS, _EXPERTS).scatter(1, index, weight).view(1, _TOKENS, _EXPERTS)
    x = x.view(1, _TOKENS, _HIDDEN)
    return cast(Tensor, sum(expert(number, x) * table[..., number, None] for number in range(_EXPERTS)))


def hidden_logits(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """A table that is a softmax of logits, all but the chosen ones minus infinity."""
    table = torch.full((_TOKENS, _EXPERTS), float("-inf")).scatter(1, index, weight).softmax(-1)
    return cast(Tensor, sum(expert(number, x) * table[:, number, None] for number in range(_EXPERTS)))


def best_alone(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """One expert a token, on all tokens."""
    out = torch.zeros_like(x)
    for number in range(_EXPERTS):
        out = out + expert(number, x) * (weight[:, 0] * (index[:, 0] == number)).unsqueeze(-1)
    return out


def best_assigned(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """One expert a token: its rows are assigned by a mask, and weighted later."""
    out = torch.zeros_like(x)
    for number in range(_EXPERTS):
        mask = index[:, 0] == number
        out[mask] = expert(number, x[mask])
    return out * weight[:, :1]


def best_kept(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """One expert a token, its output where it was chosen."""
    out = torch.zeros_like(x)
    for number in range(_EXPERTS):
        out = out + torch.where((index[:, 0] == number)[:, None], expert(number, x), 0.0)
    return out


def any_place(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """Rows of tokens that have the expert at any place, weighted by a table's column."""
    out, table = torch.zeros_like(x), torch.zeros(_TOKENS, _EXPERTS).scatter(1, index, weight)
    for number in range(_EXPERTS):
        (rows,) = torch.where((index == number).any(-1))
        out[rows] += expert(number, x[rows]) * table[rows, number].unsqueeze(1)
    return out


def any_place_masked(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """The same by masks: how many rows there are is the size of what is read of the sum."""
    out, table = torch.zeros_like(x), torch.zeros(_TOKENS, _EXPERTS).scatter(1, index, weight)
    for number in range(_EXPERTS):
        rows = (index == number).any(-1)
        out[rows] += expert(number, x[rows]) * table[rows, number].unsqueeze(1)
    return out


def overwritten(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """Of a token's two experts the later one is left."""
    out = torch.zeros_like(x)
    for number in range(_EXPERTS):
        rows = (index == number).any(-1)
        out[rows] = expert(number, x[rows])
    return out


def over_tokens(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """What no expert is for stays a token."""
    out = x.clone()
    for number in range(_EXPERTS):
        mask = index[:, 0] == number
        out[mask] = expert(number, x[mask])
    return out


def by_places(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """A loop over the places of a token's experts, too."""
    out = torch.zeros_like(x)
    for place in range(_TOP_K):
        for number in range(_EXPERTS):
            mask = index[:, place] == number
            out[mask] += weight[mask, place : place + 1] * expert(number, x[mask])
    return out


def skipping(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """The first expert is left out."""
    out = torch.zeros_like(x)
    for number in range(1, _EXPERTS):
        out = out + expert(number, x) * (weight * (index == number)).sum(-1, keepdim=True)
    return out


def other_tokens(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """Experts run on tokens counted from the end."""
    out = torch.zeros_like(x)
    for number in range(_EXPERTS):
        token, slot = torch.where(index == number)
        out.index_add_(0, token, expert(number, x[_TOKENS - 1 - token]) * weight[token, slot, None])
    return out


def other_weights(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """Each expert has routing weights of its own."""
    out = torch.zeros_like(x)
    for number in range(_EXPERTS):
        out = out + expert(number, x) * ((weight + number) * (index == number)).sum(-1, keepdim=True)
    return out


def shifted(x: Tensor, index: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """Something is added to what each expert computes."""
    out = torch.zeros_like(x)
    shift = torch.linspace(-1.0, 1.0, _HIDDEN)
    for number in range(_EXPERTS):
        out = out + (expert(number, x) + shift) * (weight * (index == number)).sum(-1, keepdim=True)
    return out


LOOPS = (
    example("all tokens", all_tokens),
    example("all tokens, biases", all_tokens, bias=True),
    example("all tokens, stacked weights", all_tokens, stacked=True),
    example("masked by where", masked),
    example("one-hot table", one_hot),
    example("scattered table", scattered),
    example("tokens found", found),
    example("tokens found, stacked weights", found, stacked=True),
    example("tokens found in a mask", found_in_mask, bias=True),
    example("assigned", assigned),
    example("of sequences", of_sequences),
    example("hidden logits", hidden_logits),
    example("the best alone", best_alone),
    example("the best alone, assigned", best_assigned),
    example("the best alone, kept", best_kept),
    example("any place", any_place),
)

LOOPS_NEAR_MISSES = (
    example("an expert left out", skipping, reason="not one for each expert"),
    example("an expert of another function", all_tokens, odd=True, reason="compute different functions"),
    example("other tokens", other_tokens, reason="does not run on the tokens that chose it"),
    example("other weights", other_weights, reason="different routers"),
    example("by places", by_places, reason="not one for each expert"),
    example("any place, by masks", any_place_masked, reason="how many rows there are is known from what is read"),
    example("overwritten", overwritten, reason="overwrites what another one made"),
    example("over the tokens", over_tokens, reason="others keep what they were"),
    example("a second bias", shifted, bias=True, reason="adds two biases"),
)
