"""Programs with several sequences of tokens, and tokens that come from weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.passes.tokens.legality import examine, walks
from regraft.passes.tokens.reduce import ReduceTokens
from tests.passes.tokens.models import outputs, recognised, relative, values

WIDTH, HEADS, TOKENS, ALONE = 8, 2, 12, 2


class Block(nn.Module):
    """Attention and a layer of its own; ``turned``: queries and keys of all but the first tokens are rotated."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.projections, self.up = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.turned = turned

    def turn(self, x: Tensor) -> Tensor:
        """Places in pairs, so that equal tokens beside each other are turned alike."""
        places = torch.arange(TOKENS - ALONE, dtype=x.dtype) // 2
        rest = x[:, :, ALONE:]
        turned = torch.cat((-rest[..., 2:], rest[..., :2]), dim=-1)
        return torch.cat((x[:, :, :ALONE], rest * places.cos()[:, None] + turned * places.sin()[:, None]), dim=-2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.projections(x).reshape(*x.shape[:2], 3, HEADS, 4).permute(2, 0, 3, 1, 4)
        if self.turned:
            query, key = self.turn(query), self.turn(key)
        x = x + F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return x + self.up(x).relu()  # type: ignore[no-any-return]


class Towers(nn.Module):
    """Two encoders that meet in their means."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(Block(), Block()) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.first(x).mean(1) * self.second(y).mean(1)  # type: ignore[no-any-return]


class Stages(nn.Module):
    """A block, a convolution over the grid, a block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.mix(self.first(x).transpose(1, 2).reshape(-1, WIDTH, 3, 4))
        return self.second(grid.flatten(2).transpose(1, 2)).mean(1)  # type: ignore[no-any-return]


class Queries(nn.Module):
    """A decoder over queries that are weights."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.block, self.next = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        queries = self.block(self.queries.expand(x.shape[0], -1, -1))
        found = self.next(queries + F.scaled_dot_product_attention(queries, x, x))
        return found.mean(1)  # type: ignore[no-any-return]


class Registers(nn.Module):
    """A class token in front, then registers put in behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.registers = (nn.Parameter(torch.randn(1, n, WIDTH)) for n in (1, 2))
        self.places = nn.Parameter(torch.randn(1, TOKENS + 1, WIDTH))
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.first.expand(x.shape[0], -1, -1), x), dim=1) + self.places
        x = torch.cat((x[:, :1], self.registers.expand(x.shape[0], -1, -1), x[:, 1:]), dim=1)
        return self.block(x)[:, 0]  # type: ignore[no-any-return]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(make: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def twins(seed: int = 0) -> Tensor:
    """Tokens in equal pairs."""
    return numbers(2, TOKENS // 2, WIDTH, seed=seed).repeat_interleave(2, dim=1)


@pytest.mark.parametrize("schedule", [3, (0, 0, 3, 2), (3, 2, 0, 0)])
def test_each_sequence_of_tokens_is_reduced(schedule: int | tuple[int, ...]) -> None:
    program = recognised(seeded(Towers), (twins(), twins(1)))
    (before,) = outputs(program)
    session = Session(verify="off")
    numbers = (schedule,) * 4 if isinstance(schedule, int) else schedule
    made = ReduceTokens(schedule, "tome-stream").run(program, session)
    assert made == sum(number > 0 for number in numbers) and not session.log.refusals
    assert relative(outputs(program)[0], before) <= 1e-12


def test_what_lies_behind_a_barrier_is_a_sequence_of_its_own() -> None:
    program = recognised(seeded(Stages), (twins(),))
    assert [len(found.sites) for found in walks(program)] == [1, 1]
    session = Session(verify="off")
    assert ReduceTokens(2, "tome-stream").run(program, session) == 2 and not session.log.refusals


def test_the_first_tokens_may_be_cut_off_and_put_back() -> None:
    """What rotary embeddings of all but a class token do."""
    model = nn.Sequential(Block(turned=True), Block(turned=True)).double()
    program = recognised(model, (twins(),))
    found = examine(program)
    assert len(found.sites) == 2 and found.prefix == ALONE
    (before,) = outputs(program)
    assert ReduceTokens((3, 1), "tome-stream").run(program, Session(verify="off")) == 2
    assert relative(outputs(program)[0], before) <= 1e-12


class Rotated(Block):
    """All but the first tokens are turned by a table of angles, and every head is repeated as often as it is."""

    def turn(self, x: Tensor) -> Tensor:
        angles = torch.arange(TOKENS - ALONE, dtype=x.dtype)[:, None] / torch.tensor([1.0, 9.0], dtype=x.dtype)
        cos, sin = (torch.cat((part, part), dim=-1) for part in (angles.cos(), angles.sin()))
        rest = x[:, :, ALONE:]
        turned = rest * cos + torch.cat((-rest[..., 2:], rest[..., :2]), dim=-1) * sin
        return torch.cat((x[:, :, :ALONE], turned), dim=-2).repeat_interleave(1, dim=1)


def test_keys_are_compared_before_a_rotation_of_all_but_the_first_tokens() -> None:
    """Where a token stands is no content, also where a part of the keys is rotated."""
    block, x = Rotated(turned=True).double(), numbers(2, TOKENS, WIDTH)
    program = recognised(nn.Sequential(block, Rotated(turned=True).double()), (x,))
    assert ReduceTokens((3, 0), "tome").run(program, Session(verify="off")) == 1
    (plan,) = (node for node in program.graph.nodes if node.target is ops.plan_merge)
    with torch.no_grad():
        key = block.projections(x).reshape(2, TOKENS, 3, HEADS, 4)[:, :, 1].mean(2)
    assert relative(values(program)[plan.args[0]], key) <= 1e-12


def test_queries_that_are_weights_stay() -> None:
    program = recognised(seeded(Queries), (numbers(2, 5, WIDTH),))
    session, code = Session(verify="off"), str(program.graph)
    assert ReduceTokens(2).run(program, session) == 0 and str(program.graph) == code
    assert {entry.reason.partition(" (")[0] for entry in session.log.refusals} == {
        "the tokens come from weights, as the queries of a detector do"
    }


def test_registers_behind_a_class_token_are_protected() -> None:
    assert examine(recognised(seeded(Registers), (numbers(2, TOKENS, WIDTH),))).prefix == 3


class InFront(nn.Module):
    """An encoder of PyTorch's with the tokens in front of the samples, which is its default, and registers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.registers = nn.Parameter(torch.randn(ALONE, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.registers.expand(-1, x.shape[0], -1), x.transpose(0, 1)))
        return self.encoder(x).mean(0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["tome", "tome-stream", "prune-flow"])
def test_tokens_may_lie_in_front_of_the_samples(method: str) -> None:
    program = recognised(seeded(InFront), (twins(),))
    assert examine(program).prefix == ALONE
    (before,) = outputs(program)
    session = Session(verify="off")
    assert ReduceTokens((3, 2), method).run(program, session) == 2 and not session.log.refusals
    assert relative(outputs(program)[0], before) <= (1.0 if method.startswith("prune") else 1e-12)
