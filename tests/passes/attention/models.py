"""Small transformers for the lossy passes, and what runs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.nodes import arguments
from regraft.ir.program import Program
from regraft.passes.attention.lossy import attentions
from regraft.passes.base import Pass
from regraft.passes.canonicalize.cleanup import DropDeadCode, MergeCommonSubexpressions
from regraft.passes.pipeline import RecognizeBlocks, RecognizeRowwise
from tests.support import captured

WIDTH, SIZE = 32, 8
#: Changes what a model computes inside: (layer, name of the place, value) -> value.
Change = Callable[[int, str, Tensor], Tensor]


def _same(layer: int, place: str, value: Tensor) -> Tensor:
    return value


class Block(nn.Module):
    """Attention and a feed-forward part, norms first or last; ``kv_heads`` may be fewer than heads."""

    def __init__(self, heads: int, kv_heads: int, norm_first: bool, causal: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.norm_first, self.causal = heads, kv_heads, norm_first, causal
        self.query, self.out = nn.Linear(WIDTH, heads * SIZE), nn.Linear(heads * SIZE, WIDTH)
        self.key, self.value = (nn.Linear(WIDTH, kv_heads * SIZE) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def attention(self, x: Tensor, number: int, change: Change) -> Tensor:
        batch, length = x.shape[:2]
        query, key, value = (
            layer(x).reshape(batch, length, -1, SIZE).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        groups = self.heads // self.kv_heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.mT / math.sqrt(SIZE)
        if self.causal:
            place = torch.arange(length)
            scores = scores.masked_fill(place > place[:, None], -math.inf)
        out = change(number, "scores", scores).softmax(-1) @ value
        return self.out(change(number, "heads", out).transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, number: int = 0, change: Change = _same) -> Tensor:
        x = change(number, "entry", x)
        if self.norm_first:
            x = x + self.attention(self.norms[0](x), number, change)
            return x + change(number, "feed forward", self.down(torch.relu(self.up(self.norms[1](x)))))
        x = self.norms[0](x + self.attention(x, number, change))
        out: Tensor = self.norms[1](x + change(number, "feed forward", self.down(torch.relu(self.up(x)))))
        return out


class Model(nn.Module):
    """Some blocks; with a ``change`` it is the formula of what a lossy pass does."""

    def __init__(
        self, layers: int = 3, heads: int = 4, kv_heads: int = 4, norm_first: bool = True, causal: bool = True
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(heads, kv_heads, norm_first, causal) for _ in range(layers))

    def forward(self, x: Tensor, change: Change = _same) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x, number, change)
        return x


X = torch.randn(2, 20, WIDTH, generator=torch.Generator().manual_seed(1))


def recognised(model: nn.Module, *args: Tensor, dynamic: Any = None) -> Program:
    """The program at the point where lossy passes run."""
    program = captured(model, args or (X,), dynamic=dynamic)
    for item in (RecognizeRowwise(), RecognizeBlocks(), MergeCommonSubexpressions(), DropDeadCode()):
        item.run(program, Session(verify="off"))
    assert attentions(program)
    return program


def after(program: Program, *passes: Pass) -> Session:
    """Run passes on a program."""
    session = Session()
    for item in passes:
        item.run(program, session)
    return session


def output(program: Program, *args: Tensor) -> Tensor:
    """The program's first output."""
    out: Tensor = program.callable()(*(args or program.example))[0]
    return out


def masks(program: Program) -> list[str]:
    """The masks of all attentions."""
    return [arguments(node)["mask"] for node in program.graph.nodes if node.target is ops.attention]
