"""Experts along a dim of the tensors as models spell them, and what only looks like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, einsum, nn

from regraft.ir.rule import Example

_TOKENS, _EXPERTS, _TOP_K, _HIDDEN, _INNER = 5, 3, 2, 8, 6
Function = Callable[["Block", Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Three experts; ``function(block, x, logits)`` is the block behind its router."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.router = nn.Linear(_HIDDEN, _EXPERTS)
        self.gate = nn.Parameter(torch.randn(_EXPERTS, _INNER, _HIDDEN))
        self.up = nn.Parameter(torch.randn(_EXPERTS, _INNER, _HIDDEN))
        self.down = nn.Parameter(torch.randn(_EXPERTS, _HIDDEN, _INNER))
        self.packed = nn.Parameter(torch.randn(_EXPERTS, _HIDDEN, 2 * _INNER))
        self.packed_bias = nn.Parameter(torch.randn(_EXPERTS, 2 * _INNER))
        self.down_bias = nn.Parameter(torch.randn(_EXPERTS, _HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., 8]``."""
        return self.function(self, x, self.router(x))

    def expert(self, number: int, x: Tensor) -> Tensor:
        """One expert on all tokens."""
        inner = F.silu(F.linear(x, self.gate[number])) * F.linear(x, self.up[number])
        return F.linear(inner, self.down[number])

    def all_experts(self, x: Tensor) -> Tensor:
        """``[tokens, experts, 8]``."""
        inner = F.silu(einsum("th,eih->tei", x, self.gate)) * einsum("th,eih->tei", x, self.up)
        return einsum("tei,ehi->teh", inner, self.down)


def example(name: str, function: Function, reason: str = "", shape: tuple[int, ...] = (_TOKENS, _HIDDEN)) -> Example:
    """A block that computes ``function``."""

    def make() -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        torch.manual_seed(0)
        return Block(function).eval(), (torch.randn(shape),)

    return Example(name, make, reason)


def routed(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and ids of each token's experts."""
    weight, index = logits.softmax(-1).topk(_TOP_K)
    return weight / weight.sum(-1, keepdim=True), index


def table(logits: Tensor) -> Tensor:
    """The weights among zeros."""
    weight, index = routed(logits)
    return torch.zeros_like(logits).scatter(-1, index, weight)


def gathered(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """Each token's copy of its experts' weights (gpt-fast)."""
    weight, index = routed(logits)
    inner = F.silu(einsum("ti,taoi->tao", x, block.gate[index])) * einsum("ti,taoi->tao", x, block.up[index])
    return einsum("tai,ta->ti", einsum("tao,taio->tai", inner, block.down[index]), weight)


def gathered_with_biases(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """Gate and up interleaved and clamped, with biases (gpt-oss)."""
    weight, index = routed(logits)
    packed = einsum("bd,bked->bke", x, block.packed.mT[index]) + block.packed_bias[index]
    gate, up = packed[..., ::2].clamp(max=1.5), packed[..., 1::2].clamp(-1.5, 1.5)
    inner = gate * torch.sigmoid(1.7 * gate) * (up + 1)
    out = einsum("bke,bkde->bkd", inner, block.down[index]) + block.down_bias[index]
    return (out * weight[..., None]).sum(1)


def gathered_of_sequences(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """Tokens ``[batch, length]``, experts picked by a flattened index."""
    weight, index = routed(logits)
    flat, sizes = index.flatten(), index.shape
    first = block.packed.index_select(0, flat).view(*sizes, _HIDDEN, 2 * _INNER)
    gate, up = einsum("bld,blkde->blke", x, first).chunk(2, -1)
    down = block.down.index_select(0, flat).view(*sizes, _HIDDEN, _INNER)
    return (einsum("blke,blkde->blkd", F.gelu(gate) * up, down) * weight.unsqueeze(-1)).sum(2)


def all_by_einsum(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """Every expert for every token."""
    return einsum("teh,te->th", block.all_experts(x), table(logits))


def all_by_matmul(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """Copies of the tokens for each expert, batched products with biases, weights times outputs."""
    copies = x.repeat(_EXPERTS, 1).view(_EXPERTS, -1, _HIDDEN)
    gate, up = (torch.bmm(copies, block.packed) + block.packed_bias[:, None]).chunk(2, -1)
    out = torch.bmm(F.silu(gate) * up, block.down.mT) + block.down_bias[:, None]
    return (out * table(logits).t()[..., None]).sum(0)


def stacked(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """The outputs of experts one by one, stacked."""
    outputs = torch.stack([block.expert(number, x) for number in range(_EXPERTS)], -2)
    return (outputs * table(logits).unsqueeze(-1)).sum(-2)


def picked_outputs(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """Each token's outputs are gathered of all."""
    weight, index = routed(logits)
    outputs = block.all_experts(x).gather(1, index[..., None].expand(-1, -1, _HIDDEN))
    return (outputs * weight[..., None]).sum(1)


def side_by_side(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """All outputs in one row of features, picked by rows and columns."""
    weight, index = routed(logits)
    outputs = torch.cat([block.expert(number, x) for number in range(_EXPERTS)], -1)
    outputs = outputs.view(_TOKENS, _EXPERTS, _HIDDEN)[torch.arange(_TOKENS)[:, None], index]
    return (weight[:, None] @ outputs).squeeze(1)


def hidden_logits(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """A softmax of logits of which all but the largest are minus infinity."""
    largest, index = logits.topk(_TOP_K)
    weights = torch.full_like(logits, float("-inf")).scatter(-1, index, largest).softmax(-1)
    return einsum("te,teh->th", weights, block.all_experts(x))


def masked_logits(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """The same by a mask of ones."""
    mask = torch.zeros_like(logits).scatter(-1, logits.topk(_TOP_K).indices, 1.0)
    weights = logits.masked_fill(mask == 0, float("-inf")).softmax(-1)
    return einsum("te,teh->th", weights, block.all_experts(x))


def renormalised(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """All probabilities times a mask, brought to one again."""
    scores = logits.softmax(-1)
    scores = scores * torch.zeros_like(scores).scatter(-1, scores.topk(_TOP_K).indices, 1.0)
    scores = scores / scores.sum(-1, keepdim=True)
    return einsum("te,teh->th", scores, block.all_experts(x))


def best_alone(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """One expert a token, by argmax."""
    scores = logits.softmax(-1)
    return einsum("te,teh->th", scores * F.one_hot(scores.argmax(-1), _EXPERTS), block.all_experts(x))


def one_gathered(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """One expert a token, by its own matrices, weighted as the token is (Llama 4)."""
    score, index = logits.max(-1)
    x = x * torch.sigmoid(score)[:, None]
    inner = F.silu(einsum("ti,toi->to", x, block.gate[index])) * einsum("ti,toi->to", x, block.up[index])
    return einsum("to,tio->ti", inner, block.down[index])


def scaled_inputs(block: Block, x: Tensor, logits: Tensor, top_k: int = 1) -> Tensor:
    """Every expert of every token, the tokens scaled by zero where another was chosen (Llama 4)."""
    score, index = logits.topk(top_k)
    table = torch.sigmoid(torch.full_like(logits, float("-inf")).scatter(1, index, score))
    scaled = (x.repeat(_EXPERTS, 1) * table.t().reshape(-1, 1)).view(_EXPERTS, -1, _HIDDEN)
    gate, up = torch.bmm(scaled, block.packed).chunk(2, -1)
    return torch.bmm(F.silu(gate) * up, block.down.mT).sum(0)


def scaled_inputs_of_two(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """Two experts a token."""
    return scaled_inputs(block, x, logits, top_k=2)


def every_weight(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """No expert is left out."""
    return einsum("te,teh->th", logits.softmax(-1), block.all_experts(x))


def above_threshold(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """Ties choose more than two experts."""
    least = logits.topk(_TOP_K).values[:, -1:]
    return einsum("te,teh->th", torch.where(logits >= least, logits, 0.0), block.all_experts(x))


def chosen_by_experts(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """Two tokens for each expert: a token may have any number of experts."""
    weight, index = logits.topk(_TOP_K, dim=0)
    weights = torch.zeros_like(logits).scatter(0, index, weight)
    return einsum("te,teh->th", weights, block.all_experts(x))


def mixed_tokens(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """Soft MoE: experts run on mixtures of tokens."""
    mixed = logits.softmax(0).t() @ x
    inner = F.silu(einsum("eh,eih->ei", mixed, block.gate)) * einsum("eh,eih->ei", mixed, block.up)
    return logits.softmax(1) @ einsum("ei,ehi->eh", inner, block.down)


def other_ids(block: Block, x: Tensor, logits: Tensor) -> Tensor:
    """The last projection is of other experts than the first."""
    weight, index = routed(logits)
    inner = F.silu(einsum("ti,taoi->tao", x, block.gate[index])) * einsum("ti,taoi->tao", x, block.up[index])
    return einsum("tai,ta->ti", einsum("tao,taio->tai", inner, block.down[index.flip(-1)]), weight)


_SEQUENCES = (2, 3, _HIDDEN)

AXIS = (
    example("gathered", gathered),
    example("gathered, one token", gathered, shape=(1, _HIDDEN)),
    example("gathered with biases", gathered_with_biases),
    example("gathered, of sequences", gathered_of_sequences, shape=_SEQUENCES),
    example("all, by einsum", all_by_einsum),
    example("all, by matmul", all_by_matmul),
    example("stacked", stacked),
    example("stacked, of sequences", stacked, shape=_SEQUENCES),
    example("picked of all outputs", picked_outputs),
    example("side by side", side_by_side),
    example("hidden logits", hidden_logits),
    example("masked logits", masked_logits),
    example("renormalised", renormalised),
    example("the best alone", best_alone),
    example("one gathered", one_gathered),
    example("scaled inputs", scaled_inputs),
)

AXIS_NEAR_MISSES = (
    example("every expert has a weight", every_weight, reason="not zero for sure"),
    example("ties", above_threshold, reason="not zero for sure"),
    example("scaled inputs of two", scaled_inputs_of_two, reason="the inputs of several experts"),
    example("experts choose tokens", chosen_by_experts, reason="not zero for sure"),
    example("mixtures of tokens", mixed_tokens, reason="do not run on the tokens themselves"),
    example("other experts at the end", other_ids, reason="not of the same pairs"),
)
