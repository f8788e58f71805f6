"""Unpadding: the tokens that are there get what they got, to rounding; whatever reads padding is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.passes.tokens.unpad import Unpad
from tests.passes.tokens.models import TEXT_KINDS, outputs, recognised, relative, texts, tiny
from tests.passes.tokens.test_reduce import MeanOfTokens


def unpadded(program: Program, zero_padding: bool = False) -> Session:
    session = Session(verify="off")
    Unpad(zero_padding).run(program, session)
    return session


def skip_where_refused(kind: str) -> None:
    """The fake kernel of a linear layer without bias wants sizes that it knows before torch 2.13."""
    if kind == "modernbert" and torch.__version__ < "2.13":
        pytest.skip("this torch cannot tell the shape of a linear layer of as many tokens as the data say")


def flat(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return given["input_ids"], given["attention_mask"]


MASKS = {
    "behind": texts((16, 10, 3))["attention_mask"],
    "in front": texts((16, 10, 3))["attention_mask"].flip(1),
    "in between": torch.tensor([[1] * 16, [1, 0, 1, 1] * 4, [0, 0, 1, 0] * 4]),
    "everywhere": torch.stack([torch.ones(16), torch.zeros(16), torch.ones(16)]).long(),
    "nowhere": torch.ones(3, 16).long(),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_a_mean_over_tokens_is_the_same_whatever_is_padded(kind: str, implementation: str) -> None:
    skip_where_refused(kind)
    given = texts((16, 10, 3))
    program = recognised(MeanOfTokens(tiny(kind, implementation)), given)
    before = program.copy()
    assert unpadded(program).log.of("unpad").fired == 1
    assert sum(node.target is ops.attention_packed for node in program.graph.nodes) == 3
    for name, mask in MASKS.items():
        args = given["input_ids"], mask
        assert relative(outputs(program, *args)[0], outputs(before, *args)[0]) <= 1e-5, name


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_tokens_read_by_place_are_computed_even_where_they_are_padding(kind: str) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny(kind)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            found: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
            return found

    given = texts((16, 10, 3))
    program = recognised(Pooled(), given)
    before = program.copy()
    assert unpadded(program).log.of("unpad").fired == 1
    for name, mask in MASKS.items():
        args = given["input_ids"], mask
        assert relative(outputs(program, *args)[0], outputs(before, *args)[0]) <= 1e-5, name


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_an_output_of_every_token_is_refused_or_zero_at_the_padding(kind: str) -> None:
    skip_where_refused(kind)
    given = texts((16, 10, 3))
    program = recognised(tiny(kind), given)
    code, before = str(program.graph), program.copy()
    session = unpadded(program)
    assert "holds for padding is read: every token is an output" in session.log.refusals[0].reason
    assert str(program.graph) == code
    assert unpadded(program, zero_padding=True).log.of("unpad").fired == 1
    new, old = outputs(program)[0], outputs(before)[0]
    there = given["attention_mask"] > 0
    assert relative(new[there], old[there]) <= 1e-5 and not new[~there].any()


def test_packed_tokens_are_as_many_as_there_are() -> None:
    given = texts((16, 10, 3))
    index, slots, offsets, present = ops.pack_tokens(given["attention_mask"])
    assert offsets.tolist() == [0, 16, 26, 29] and present.all() and index.shape == (1, 29)
    assert torch.equal(slots[0][index[0]], torch.arange(29)) and (slots >= 0).sum() == 29
    index, _, offsets, present = ops.pack_tokens(torch.tensor([[0, 0, 1], [0, 0, 0]]), 1, 0)
    assert index.tolist() == [[0, 2, 3, 4, 5]] and offsets.tolist() == [0, 2, 5]
    assert present.tolist() == [[False, True, False, False, False]]


class Block(nn.Module):
    """An attention with a padding mask, and what a test does with its tokens."""

    def __init__(self, read: str, fill: float = -torch.inf) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projections, self.read, self.fill = nn.Linear(8, 24), read, fill
        self.bias = nn.Parameter(torch.randn(1, 2, 6, 6))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.projections(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        hidden = (mask == 0)[:, None, None]
        scores = query @ key.transpose(-1, -2) / 2
        if self.read == "bias":
            scores = scores + self.bias
        if self.read == "earlier":
            hidden = hidden | torch.ones(6, 6, dtype=torch.bool).triu()
        if self.read == "added":
            scores, hidden = scores + hidden * self.fill, torch.zeros_like(hidden)
        weights = scores.masked_fill(hidden, self.fill).softmax(-1)
        y = x + (weights @ value).transpose(1, 2).flatten(2)
        y = self.projections(y)
        if self.read == "mean":
            return y.mean(1)
        if self.read == "windows":
            return y.reshape(y.shape[0], 2, 3, -1).amax(2) * mask[:, :2, None]
        if self.read == "filled":
            return y.masked_fill(mask[..., None] == 0, 0.0).sum(1)
        if self.read == "chosen":
            return torch.where(mask[..., None] > 0, y, torch.zeros_like(y)).sum(1)
        if self.read == "gated":
            y = y * (y * mask[..., None]).sum(1, keepdim=True)
        return (y * mask[..., None]).sum(1)


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        ("mean", "holds for padding is read: tokens are added up"),
        ("windows", "holds for padding is read: the tokens are laid out on a grid or in windows"),
        ("bias", "the attention has a bias, slopes or sinks, which are not packed"),
    ],
)
def test_what_reads_padding_is_refused(read: str, reason: str) -> None:
    args = torch.randn(2, 6, 8), torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    program = recognised(Block(read), args)
    code = str(program.graph)
    session = unpadded(program)
    assert reason in session.log.refusals[0].reason and str(program.graph) == code
    assert "test_unpad.py" in session.log.refusals[0].user_line


@pytest.mark.parametrize(
    ("read", "fill", "reason"),
    [
        ("masked", -5.0, "hidden scores are -5, so that padding keeps a weight"),
        ("added", -1e9, "numbers that are added to the scores may hide padding"),
        ("earlier", -1e9, "a token may see no key that is there, and hidden scores are numbers"),
    ],
)
def test_padding_that_has_a_weight_is_refused(read: str, fill: float, reason: str) -> None:
    args = torch.randn(2, 6, 8), torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    assert reason in unpadded(recognised(Block(read, fill), args)).log.refusals[0].reason


def test_a_program_without_padding_is_left_alone() -> None:
    given = texts()
    program = recognised(tiny("bert"), {"input_ids": given["input_ids"]})
    code = str(program.graph)
    assert Unpad().run(program, Session()) == 0 and str(program.graph) == code


def test_tokens_that_are_inputs_themselves_are_packed() -> None:
    args = torch.randn(2, 6, 8), torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    program = recognised(Block("masked"), args)
    before = program.copy()
    assert unpadded(program).log.of("unpad").fired == 1
    assert relative(outputs(program)[0], outputs(before)[0]) <= 1e-5


@pytest.mark.parametrize("read", ["filled", "gated"])
def test_what_is_zero_at_the_padding_and_what_belongs_to_a_sample_is_packed(read: str) -> None:
    """What belongs to a sample met the tokens of all samples, and each got that of the first."""
    args = torch.randn(3, 6, 8), torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6, [0, 1, 0, 1, 0, 0]])
    program = recognised(Block(read), args)
    before = program.copy()
    assert unpadded(program).log.of("unpad").fired == 1
    assert relative(outputs(program)[0], outputs(before)[0]) <= 1e-5


def test_a_mask_that_is_true_for_padding_is_understood() -> None:
    class Inverted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
            x = self.encoder(x, src_key_padding_mask=hidden).masked_fill(hidden[..., None], 0.0)
            return x.sum(1) / (~hidden).sum(1, keepdim=True)

    program = recognised(Inverted(), (torch.randn(3, 6, 8), torch.arange(6) >= torch.tensor([[6], [2], [4]])))
    before = program.copy()
    assert unpadded(program).log.of("unpad").fired == 1
    assert relative(outputs(program)[0], outputs(before)[0]) <= 1e-5


def test_attention_with_the_tokens_in_front_is_packed() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor, there: Tensor) -> Tensor:
            return (self.encoder(x, src_key_padding_mask=~there) * there[..., None]).sum(1)

    class InFront(Masked):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor, there: Tensor) -> Tensor:
            x = self.encoder(x.transpose(0, 1), src_key_padding_mask=~there).transpose(0, 1)
            return (x * there[..., None]).sum(1)

    for batch, make in itertools.product((2, 6), (Masked, InFront)):  # as many samples as tokens, too
        there = torch.arange(6) < torch.arange(1, batch + 1)[:, None]
        program = recognised(make(), (torch.randn(batch, 6, 8), there))
        before = program.copy()
        assert unpadded(program).log.of("unpad").fired == 1
        assert relative(outputs(program)[0], outputs(before)[0]) <= 1e-5
