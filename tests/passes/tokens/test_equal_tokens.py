"""Tokens that are provably equal are computed once, and nothing changes; what tells them apart finds all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from regraft.codegen.cpu.lower import lower
from regraft.ir import ops
from regraft.ir.driver import Fuel, Session
from regraft.ir.program import Program
from regraft.passes.pipeline import default_pipeline
from regraft.passes.tokens.equal_tokens import MergeEqualTokens
from tests.passes.tokens.models import outputs, recognised, relative
from tests.passes.tokens.test_legality import HEAD, HEADS, TOKENS, WIDTH, Block, Encoder, numbers

#: ``[batch, 4, width]`` -> ``[batch, 12, width]``, and how many of these are distinct.
EMBED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "register tokens": (lambda x, token: torch.cat((x, token.expand(x.shape[0], 8, -1)), 1), 5),
    "in front": (lambda x, token: torch.cat((token.expand(x.shape[0], 8, -1), x), 1), 5),
    "padding": (lambda x, token: F.pad(x, (0, 0, 3, 5)), 5),
    "a prompt three times": (lambda x, token: x.repeat(1, 3, 1), 4),
    "upsampled": (lambda x, token: x.repeat_interleave(3, 1), 4),
    "twice, and another": (lambda x, token: torch.cat((x, x.sin(), x), 1), 8),
    "one for all": (lambda x, token: x[:, :1].expand(-1, 12, -1), 1),
}


class Embedded(nn.Module):
    """Tokens some of which are equal, blocks without positions, and a head."""

    def __init__(self, embed: str, head: str, kinds: list[tuple[bool, bool]]) -> None:
        super().__init__()
        self.encoder = Encoder(kinds, head)
        self.token, self.embed = nn.Parameter(torch.randn(1, 1, WIDTH)), EMBED[embed][0]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.encoder(self.embed(x, self.token))
        return found


def merged(program: Program) -> Session:
    session = Session(verify="off")
    MergeEqualTokens().run(program, session)
    return session


def lengths(program: Program) -> list[tuple[int, int]]:
    """Queries and keys of each attention."""
    calls = [node for node in program.graph.nodes if node.target is ops.attention]
    return [(call.args[0].meta["val"].shape[2], call.args[1].meta["val"].shape[2]) for call in calls]


kinds = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=3)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.sampled_from(sorted(EMBED)), st.sampled_from(sorted(HEAD)), kinds)
def test_equal_tokens_are_computed_once_whatever_reads_the_result(
    embed: str, head: str, shape: list[tuple[bool, bool]]
) -> None:
    model = Embedded(embed, head, shape).double()
    program = recognised(model, (numbers(2, 4, WIDTH),))
    session = merged(program)
    distinct = EMBED[embed][1]
    assert lengths(program) == [(distinct, distinct)] * len(shape), session.log.refusals
    for x in (program.example[0], numbers(2, 4, WIDTH, seed=5)):
        assert relative(outputs(program, x)[0], model(x).detach()) <= 1e-12
    (entry,) = session.log.applications
    assert entry.exactness == "reassociated" and entry.new_nodes == (f"{TOKENS - distinct} of {TOKENS} tokens",)


def test_whole_numbers_are_added_up_exactly() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedded = Embedded("padding", "every token", [(False, False)])

        def forward(self, x: Tensor) -> Tensor:
            return ((self.embedded(x) > 0).long() * (2**24 + 1)).sum(1)  # the number is none of fp32

    model = Counted().double()
    program = recognised(model, (numbers(2, 4, WIDTH),))
    merged(program)
    assert lengths(program) == [(5, 5)]
    assert torch.equal(outputs(program)[0], model(*program.example))


class Layers(nn.Module):
    """A class token, four numbers from the input, and one register token seven times; two layers of attention.

    ``told`` says what tells the registers apart: where positions, masks or tables come in.
    """

    def __init__(self, told: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.told = told
        self.token, self.first = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.layers = nn.ModuleList(Block(False, False) for _ in range(2))
        self.places = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.pairs = nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS))
        self.grouped = nn.Parameter(torch.randn(1, 1, WIDTH // HEADS).expand(1, TOKENS, -1).clone())
        self.kernel = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.register_buffer("slopes", torch.tensor([0.5, 0.25]).reshape(1, HEADS, 1, 1))

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        batch, told = x.shape[0], self.told
        x = torch.cat((self.first.expand(batch, -1, -1), x, self.token.expand(batch, 7, -1)), 1)
        if told == "positions":
            x = x + self.places
        if told == "noise":
            x = x + torch.rand(TOKENS, 1)
        if told == "some positions":
            x = x + F.pad(self.places[:, :8], (0, 0, 0, 4))
        for layer in self.layers:
            x = x + self.attend(layer, layer.first(x), there)
            if told == "positions between layers":
                x = x + self.places
            if told == "convolution":
                x = x + self.kernel(x.mT).mT
            x = x + layer.mlp(layer.second(x))
        return x.mean(1)

    def attend(self, layer: Block, x: Tensor, there: Tensor) -> Tensor:
        told, place = self.told, torch.arange(TOKENS)
        source = x + self.places if told == "positions of queries and keys" else x
        query, key = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in layer.projections(source)[..., : 2 * WIDTH].chunk(2, -1)
        )
        value = layer.projections(x)[..., 2 * WIDTH :].unflatten(-1, (HEADS, -1)).transpose(1, 2)
        if told == "rotation":
            angle = place.double()[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
            cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
            query, key = (part * cos + torch.cat((-part[..., 2:], part[..., :2]), -1) * sin for part in (query, key))
        scores = query @ key.mT / (WIDTH // HEADS) ** 0.5
        if told == "bias":
            scores = scores + self.pairs
        if told == "equal bias":
            scores = scores + self.pairs[:, :, :1, :1] * (place < 5)
        if told == "slopes":
            scores = scores + self.slopes * (place - place[:, None])
        if told == "large bias":
            scores = scores + F.pad((1.0 - there[:, :5].double()) * -1e4, (0, 7))[:, None, None]
        mask: Any = {
            "causal": lambda: place <= place[:, None],
            "window": lambda: (place - place[:, None]).abs() <= 3,
            "padding": lambda: there.bool()[:, None, None],
            "known padding": lambda: F.pad(there[:, :5].bool(), (0, 7), value=True)[:, None, None],
            "padded registers": lambda: F.pad(there[:, :5].bool(), (0, 7), value=False)[:, None, None],
            "filled": lambda: F.pad(there[:, :5].bool(), (0, 7), value=True)[:, None, None],
        }.get(told)
        if mask is not None:
            scores = scores.masked_fill(~mask(), -1e4 if told == "filled" else -torch.inf)
        return layer.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def layers(told: str) -> tuple[nn.Module, Program]:
    there = torch.ones(2, TOKENS, dtype=torch.long)
    there[1, 2:4] = 0
    model = Layers(told).double()
    return model, recognised(model, (numbers(2, 4, WIDTH), there))


DISTINCT = 6


@pytest.mark.parametrize("told", ["nothing", "equal bias", "known padding", "padded registers"])
def test_what_is_the_same_for_equal_tokens_is_read_once(told: str) -> None:
    model, program = layers(told)
    session = merged(program)
    assert lengths(program) == [(DISTINCT, DISTINCT)] * 2, session.log.refusals
    for inputs in (program.example, [numbers(2, 4, WIDTH, seed=2), torch.ones(2, TOKENS, dtype=torch.long)]):
        assert relative(outputs(program, *inputs)[0], model(*inputs).detach()) <= 1e-12


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("positions", "aten.add.Tensor tells tokens apart that were equal before it"),
        ("noise", "aten.add.Tensor tells tokens apart that were equal before it"),
        ("rotation", "equal tokens meet what is not known to be the same for them"),
        ("bias", "the bias of the attention tells equal tokens apart"),
        ("padding", "the mask of the attention tells equal tokens apart"),
        ("slopes", "the bias of the attention tells tokens apart by their places"),
        ("causal", "the mask of the attention tells equal tokens apart"),
        ("window", "the mask of the attention tells equal tokens apart"),
        ("filled", "hidden scores are numbers, which the size of a token is not added to"),
        ("large bias", "the bias of the attention is computed from inputs, and sizes may be lost in it"),
    ],
)
def test_what_tells_equal_tokens_apart_is_refused(told: str, reason: str) -> None:
    _, program = layers(told)
    code, count = str(program.graph), program.weight_count()
    session = merged(program)
    assert not session.log.applications and str(program.graph) == code and program.weight_count() == count
    assert reason in session.log.refusals[0].reason
    assert "test_equal_tokens.py" in session.log.refusals[0].user_line


@pytest.mark.parametrize("told", ["positions between layers", "convolution"])
def test_tokens_are_put_back_before_what_tells_them_apart(told: str) -> None:
    model, program = layers(told)
    merged(program)
    assert lengths(program) == [(DISTINCT, DISTINCT), (TOKENS, TOKENS)]
    assert relative(outputs(program)[0], model(*program.example).detach()) <= 1e-12


def test_only_the_tokens_that_are_equal_at_the_first_layer_are_merged() -> None:
    model, program = layers("some positions")
    merged(program)
    assert lengths(program) == [(9, 9)] * 2
    assert relative(outputs(program)[0], model(*program.example).detach()) <= 1e-12


def test_attention_with_the_tokens_in_front_is_merged() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(F.pad(x, (0, 0, 0, 3)))[:, : x.shape[1]]  # type: ignore[no-any-return]

    for batch in (2, 8):  # as many samples as tokens, too
        model = Padded().double()
        program = recognised(model, (numbers(batch, 5, WIDTH),))
        merged(program)
        assert lengths(program) == [(6, 6)] * 2
        assert relative(outputs(program)[0], model.eval()(*program.example).detach()) <= 1e-12


def test_the_memory_of_another_attention_counts_its_equal_keys() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Embedded("padding", "every token", [(False, False)])
            self.queries = nn.Parameter(numbers(1, 3, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            memory = self.encoder(x)
            split = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.queries, memory, memory))
            return F.scaled_dot_product_attention(*(part.expand(x.shape[0], -1, -1, -1) for part in split))

    model = Decoder().double()
    program = recognised(model, (numbers(2, 4, WIDTH),))
    merged(program)
    assert lengths(program) == [(5, 5), (3, 5)]
    assert relative(outputs(program)[0], model(*program.example).detach()) <= 1e-12


def test_each_of_two_sequences_is_merged() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = Embedded("padding", "mean", [(False, False)])
            self.other = Embedded("a prompt three times", "mean", [(True, False)] * 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            found: Tensor = self.one(x) * self.other(y)
            return found

    model = Towers().double()
    program = recognised(model, (numbers(2, 4, WIDTH), numbers(2, 4, WIDTH, seed=1)))
    session = merged(program)
    assert lengths(program) == [(5, 5), (4, 4), (4, 4)] and session.log.of("merge-equal-tokens").fired == 2
    assert relative(outputs(program)[0], model(*program.example).detach()) <= 1e-12


def test_any_number_of_samples() -> None:
    model = Embedded("register tokens", "first", [(False, False)] * 2).double()
    program = recognised(model, (numbers(2, 4, WIDTH),), dynamic=({0: torch.export.Dim.DYNAMIC},))
    merged(program)
    assert lengths(program) == [(5, 5)] * 2
    for batch in (1, 2, 7):
        x = numbers(batch, 4, WIDTH, seed=batch)
        assert relative(outputs(program, x)[0], model(x).detach()) <= 1e-12


def test_without_fuel_nothing_is_merged() -> None:
    program = recognised(Embedded("padding", "mean", [(False, False)]), (torch.randn(2, 4, WIDTH),))
    code = str(program.graph)
    assert MergeEqualTokens().run(program, Session(verify="off", fuel=Fuel(0))) == 0 and str(program.graph) == code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_program_is_lowered(dtype: torch.dtype) -> None:
    model = Embedded("register tokens", "every token", [(False, False)] * 2).to(dtype)
    x = torch.randn(2, 4, WIDTH).to(dtype)
    program = recognised(model, (x,))
    default_pipeline("cpu", tokens=(MergeEqualTokens(),)).run(program, Session(verify="off"))
    assert lengths(program) == [(5, 5)] * 2
    reference = copy.deepcopy(model).double()(x.double()).detach()
    assert relative(lower(program)(x)[0], reference) <= (1e-5 if dtype == torch.float32 else 2e-2)
