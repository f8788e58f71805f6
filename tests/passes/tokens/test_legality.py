"""What the walk along the token axis accepts is right for any program, and what it refuses says why and where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.passes.tokens.legality import Legality, examine
from regraft.passes.tokens.methods import METHODS
from regraft.passes.tokens.reduce import ReduceTokens
from regraft.passes.tokens.step import Duty, Kind
from tests.passes.tokens.models import outputs, recognised, relative, tiny, values

WIDTH, HEADS, TOKENS = 8, 2, 12
SCALES = torch.linspace(0.5, 2.0, 2 * WIDTH, dtype=torch.float64).reshape(2, WIDTH)


class Block(nn.Module):
    """A pre-norm or post-norm transformer block over ``[batch, tokens, width]``."""

    def __init__(self, post: bool, gated: bool) -> None:
        super().__init__()
        self.post, self.gated = post, gated
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.projections, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.gate = nn.Linear(WIDTH, 16)

    def attend(self, x: Tensor) -> Tensor:
        parts = self.projections(x).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def mlp(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.up(x))
        return self.down(inner * self.gate(x) if self.gated else inner)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.first(x + self.attend(x))
            return self.second(x + self.mlp(x))  # type: ignore[no-any-return]
        x = x + self.attend(self.first(x))
        return x + self.mlp(self.second(x))


#: What a head may do with ``[batch, tokens, width]``: name -> function.
HEAD: dict[str, Callable[[Tensor], Tensor]] = {
    "every token": lambda x: x,
    "first": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
    "mean": lambda x: x.mean(1),
    "mean behind the first": lambda x: x[:, 1:].mean(1, keepdim=True),
    "sum": lambda x: x.sum(dim=1),
    "maximum": lambda x: x.amax(1),
    "flattened": lambda x: x.reshape(-1, WIDTH).tanh().reshape(x.shape[0], TOKENS, WIDTH).mean(1),
    "channels first": lambda x: x.transpose(1, 2).mean(-1),
    "samples behind": lambda x: x.transpose(0, 1).mean(0),
    "grid": lambda x: x.transpose(1, 2).reshape(x.shape[0], WIDTH, 3, 4).sum((-1, -2)),
    "sorted": lambda x: x.sort(dim=1).values[:, 0],
    "normed over samples": lambda x: F.batch_norm(x.transpose(1, 2), *SCALES, weight=SCALES[0]).mean(-1),
    "beside zeros": lambda x: torch.where(x > 0, x, torch.zeros_like(x)).mean(1),
}


class Encoder(nn.Module):
    """Blocks and a head, over tokens that are all alike to it: no positions."""

    def __init__(self, kinds: list[tuple[bool, bool]], head: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block(*kind) for kind in kinds)
        self.head = HEAD[head]
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape) * (0.5 if parameter.dim() > 1 else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encoder(head: str, kinds: list[tuple[bool, bool]] | None = None, x: Tensor | None = None) -> Program:
    model = Encoder(kinds or [(False, False)] * 2, head).double()
    return recognised(model, (numbers(2, TOKENS, WIDTH) if x is None else x,))


kinds = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=3)


@settings(max_examples=12, derandomize=True, deadline=None)
@given(kinds, st.permutations(list(range(TOKENS))))
def test_what_is_called_equivariant_commutes_with_a_permutation(
    shape: list[tuple[bool, bool]], order: list[int]
) -> None:
    program = encoder("every token", shape)
    walk = examine(program).walk
    assert walk is not None
    steps = [step for node, step in walk.steps.items() if node.op != "output"]
    assert steps and all(step.kind in (Kind.EQUIVARIANT, Kind.REDUCIBLE) for step in steps)
    (straight,) = outputs(program)
    (turned,) = outputs(program, program.example[0][:, order])
    assert relative(turned, straight[:, order]) <= 1e-12


@settings(max_examples=25, derandomize=True, deadline=None)
@given(kinds, st.sampled_from(sorted(HEAD)), st.integers(1, 5), st.sampled_from(["tome-stream", "pitome", "grid"]))
def test_equal_tokens_may_merge_in_any_program(
    shape: list[tuple[bool, bool]], head: str, remove: int, method: str
) -> None:
    """Each token comes in pairs: whatever is merged, the program computes what it did."""
    pairs = numbers(2, TOKENS // 2, WIDTH).repeat_interleave(2, dim=1)
    if head in ("first", "last", "mean behind the first"):  # protected tokens have no twin
        alone, inner = numbers(2, 1, WIDTH, seed=1), torch.cat((pairs[:, 2:], pairs[:, -1:]), dim=1)
        ends = (inner, alone) if head == "last" else (alone, inner)
        pairs = torch.cat(ends, dim=1)
    program = encoder(head, shape, pairs)
    (before,) = outputs(program)
    session = Session(verify="off")
    schedule = (remove, *[0] * (len(shape) - 1))
    assert ReduceTokens(schedule, method).run(program, session) == 1, session.log.refusals
    assert relative(outputs(program)[0], before) <= 1e-12


def refusal(model: nn.Module, x: Any, method: str = "tome", site: int = 0) -> str:
    """Why the first attention is refused."""
    found = examine(recognised(model, x), drops=METHODS[method].drops)
    return str(found.refused[found.attentions[site]])


@pytest.mark.parametrize(
    ("head", "kind", "reason"),
    [
        ("every token", Kind.BARRIER, "every token is an output"),
        ("grid", Kind.BARRIER, "the tokens are laid out on a grid or in windows"),
        ("sorted", Kind.BARRIER, "aten.sort.default chooses among the tokens"),
        ("mean", Kind.REDUCIBLE, ""),
        ("sum", Kind.REDUCIBLE, ""),
        ("first", Kind.SELECTIVE, ""),
        ("last", Kind.SELECTIVE, ""),
    ],
)
def test_each_head_has_its_class(head: str, kind: Kind, reason: str) -> None:
    found = examine(encoder(head))
    obligation = found.obligations(next(iter(found.sites.values())))[-1]
    assert (obligation.kind, obligation.reason) == (kind, reason)
    assert "test_legality.py" in obligation.user_line or obligation.node == "output"


def test_tokens_that_are_read_by_place_are_protected() -> None:
    ends = {head: (found.prefix, found.suffix) for head in HEAD for found in [examine(encoder(head))]}
    assert ends["first"] == ends["mean behind the first"] == (1, 0)
    assert ends["last"] == (0, 1) and ends["mean"] == (0, 0)


@pytest.mark.parametrize(("front", "end"), [(3, 0), (0, 3), (1, 2)])
def test_tokens_that_come_from_weights_are_protected_at_either_end(front: int, end: int) -> None:
    class Registers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.end = (nn.Parameter(numbers(1, count, WIDTH)) for count in (front, end))
            self.places = nn.Parameter(numbers(1, TOKENS + front + end, WIDTH))
            self.encoder = Encoder([(False, False)] * 2, "mean").double()

        def forward(self, x: Tensor) -> Tensor:
            sides = [side.expand(x.shape[0], -1, -1) for side in (self.front, self.end)]
            return self.encoder(torch.cat((sides[0], x, sides[1]), 1) + self.places)  # type: ignore[no-any-return]

    found = examine(recognised(Registers(), (numbers(2, TOKENS, WIDTH),)))
    assert (found.prefix, found.suffix) == (front, end)


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ("every token", "dropped tokens cannot be put back, and every token is an output"),
        ("grid", "dropped tokens cannot be put back, and the tokens are laid out on a grid or in windows"),
        ("sum", "a sum over the tokens would miss those that are dropped"),
    ],
)
def test_what_drops_tokens_is_refused_where_all_are_needed(head: str, reason: str) -> None:
    assert refusal(Encoder([(False, False)] * 2, head).double(), (numbers(2, TOKENS, WIDTH),), "prune-cls") == reason


def test_a_token_in_the_middle_is_not_protected_but_put_back() -> None:
    program = recognised(nn.Sequential(Encoder([(False, False)], "every token").double(), Middle()),
                         (numbers(2, TOKENS, WIDTH),))  # fmt: skip
    found = examine(program)
    (site,) = found.sites.values()
    reasons = [obligation.reason for obligation in found.obligations(site)]
    assert reasons == ["token 6 of 12 is read, which lies at neither end of the sequence"]


class Middle(nn.Module):
    """Reads the token in the middle."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 6]


def test_windows_are_refused_with_the_users_line() -> None:
    model = tiny("swin", image_size=32, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=4)
    program = recognised(model, {"pixel_values": torch.randn(2, 3, 32, 32)})
    session = Session(verify="off")
    code = str(program.graph)
    assert ReduceTokens(2).run(program, session) == 0 and str(program.graph) == code
    assert session.log.refusals[0].reason.startswith(
        "the batch of the attention is made of windows or groups of the samples"
    )
    assert "modeling_swin.py" in session.log.refusals[0].user_line


class OneBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block(False, False)


def test_windows_of_one_sample_are_told_from_its_tokens() -> None:
    """What windows of one sample hold lies in one dim where they come together, as its tokens would."""

    class Windowed(OneBlock):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.block.attend(x.reshape(3, 4, WIDTH)).reshape(1, 12, WIDTH)
            return self.block.up(x).mean(1)  # type: ignore[no-any-return]

    found = examine(recognised(Windowed(), (torch.randn(1, 12, WIDTH),)))
    assert [refused.reason for refused in found.refused.values()] == [
        "the residual stream is not laid out as batch, tokens and width"
    ]


def test_an_attention_over_all_tokens_cannot_reduce_the_stream_that_was_reduced_before_it() -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(False, False), Block(False, False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = x + self.second.attend(x.cumsum(1))
            return (x + self.second.mlp(x)).mean(1)

    session = Session(verify="off")
    program = recognised(Running().double(), (numbers(2, TOKENS, WIDTH),))
    assert ReduceTokens(3, "tome-stream").run(program, session) == 1
    (refused,) = session.log.refusals
    assert refused.reason.startswith("it attends to all tokens, and joins those that an earlier reduction left")
    assert "test_legality.py" in refused.user_line


class Causal(nn.Module):
    """A block whose attention is causal, and a head."""

    def __init__(self, head: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projections, self.up = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = HEAD[head]

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            parts = self.projections(x).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2)
            x = x + self.up(x).relu()
        return self.head(x)


class Hidden(nn.Module):
    """A block whose attention has a mask, given or kept, that is added to the scores as large negative numbers."""

    def __init__(self, kept: Tensor | None = None, head: str = "mean") -> None:
        super().__init__()
        self.block, self.head = Encoder([(False, False)], "every token").blocks[0], HEAD[head]
        self.register_buffer("kept", kept)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        bias = self.kept if given is None else given
        parts = self.block.projections(x).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(*parts, attn_mask=bias).transpose(1, 2).flatten(2)
        x = x + self.block.mlp(x)
        there = torch.ones_like(x[..., :1]) if given is None else (given[:, 0, 0, :, None] == 0).to(x.dtype)
        return (x * there).sum(1) / there.sum(1)


@pytest.mark.parametrize("method", ["tome", "tome-stream", "pitome", "evit", "grid"])
@pytest.mark.parametrize("left", [False, True])
def test_tokens_that_an_additive_mask_hides_are_never_merged_with_others(method: str, left: bool) -> None:
    there = torch.arange(TOKENS) < torch.tensor([[TOKENS], [7]])
    there = there.flip(1) if left else there
    bias = ((1.0 - there.double()) * -1e4)[:, None, None]
    x, other = numbers(2, TOKENS, WIDTH), 50 * numbers(2, TOKENS, WIDTH, seed=1)
    program = recognised(Hidden().double(), (x, bias))
    assert ReduceTokens(3, method).run(program, Session(verify="off")) == 1
    (found,) = outputs(program)
    (same,) = outputs(program, torch.where(there[..., None], x, other), bias)
    assert relative(same, found) <= 1e-12


def test_other_masks_that_are_added_as_large_numbers_are_refused() -> None:
    x, later = numbers(2, TOKENS, WIDTH), torch.ones(TOKENS, TOKENS, dtype=torch.float64).triu(1)
    kept = refusal(Hidden(-1e4 * later).double(), (x,))
    assert kept == "the bias of the attention is a mask of large negative numbers, not of truth values"
    rows = refusal(Hidden().double(), (x, (-1e4 * later).expand(2, 1, -1, -1)))
    assert rows == "the bias of the attention is computed from inputs, and may hide tokens from some rows"
    places = recognised(Hidden(numbers(HEADS, TOKENS, TOKENS)).double(), (x,))
    assert ReduceTokens(3).run(places, Session(verify="off")) == 1  # a bias of places is no mask


def test_a_causal_program_gives_no_token_what_later_ones_are() -> None:
    x = (numbers(2, TOKENS, WIDTH),)
    assert refusal(Causal("every token").double(), x).startswith("a token put back would have seen later ones")
    program = recognised(Causal("last").double(), x)
    assert ReduceTokens((3, 0)).run(program, Session(verify="off")) == 1


def test_tokens_of_an_image_are_dropped_from_a_prompt_and_the_text_stays() -> None:
    """As FastV does it: by what the last token attends to, between a prefix and a text that are protected."""
    program = recognised(Causal("last").double(), (numbers(2, TOKENS, WIDTH),))
    assert ReduceTokens((5, 0), "prune-last", protect=2, protect_end=4).run(program, Session(verify="off")) == 1
    kept = next(value[0] for node, value in values(program).items() if node.target is ops.plan_merge)
    ends = {0, 1, *range(TOKENS - 4, TOKENS)}
    assert all(ends < set(row) for row in kept.tolist()) and kept.shape[1] == TOKENS - 5


def test_a_method_that_merges_backwards_is_refused_where_order_is_causal() -> None:
    program = recognised(Causal("last").double(), (numbers(2, TOKENS, WIDTH),))
    session = Session(verify="off")
    assert ReduceTokens((3, 0), "grid").run(program, session) == 0
    assert session.log.refusals[0].reason.startswith("the method grid cannot keep a causal order")


def test_a_symbolic_number_of_tokens_is_refused() -> None:
    model = Encoder([(False, False)] * 2, "mean").double()
    program = recognised(model, (numbers(2, TOKENS, WIDTH),), {"x": {1: torch.export.Dim.AUTO}})
    found: Legality = examine(program)
    assert {str(reason) for reason in found.refused.values()} == {
        "the number of tokens is a symbol; capture with a fixed length"
    }


@pytest.mark.parametrize("batch", [1, 2])
def test_one_sample_is_walked_as_two_are(batch: int) -> None:
    """PyTorch's own encoder flattens batch and tokens; a batch of one is then no dim of its own."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True, norm_first=True)
    program = recognised(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (numbers(batch, TOKENS, WIDTH).float(),)
    )
    assert len(examine(program).sites) == 2
    exact = outputs(program)[0]
    assert ReduceTokens((3, 0)).run(program, Session(verify="off")) == 1
    assert outputs(program)[0].shape == exact.shape and 0 < relative(outputs(program)[0], exact) < 1


def test_nothing_is_taken_where_nothing_is_saved() -> None:
    class Last(OneBlock):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.block.attend(x)

    assert refusal(Last().double(), (numbers(2, TOKENS, WIDTH),)).startswith("nothing is saved")


def test_every_node_behind_a_site_is_accounted_for() -> None:
    found = examine(encoder("mean"))
    site = next(iter(found.sites.values()))
    duties = [step.duty for _, step in found.steps(site)]
    assert duties.count(Duty.ATTENTION) == 1 and duties.count(Duty.MEAN) == 1 and Duty.UNMERGE not in duties
