"""Reducing tokens of captured models: the exactness oracles, which need no data and no trained weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regraft.ir import ops
from regraft.ir.driver import Fuel, Session
from regraft.ir.program import Program
from regraft.passes.tokens.errors import ReductionError
from regraft.passes.tokens.methods import METHODS
from regraft.passes.tokens.reduce import ReduceTokens
from tests.passes.tokens.models import (
    IMAGE_KINDS,
    TEXT_KINDS,
    images,
    outputs,
    recognised,
    relative,
    texts,
    tiny,
    values,
)

KINDS = (*IMAGE_KINDS, *TEXT_KINDS)


def inputs(kind: str) -> dict[str, Tensor]:
    return images() if kind in IMAGE_KINDS else texts()


def reduced(program: Program, schedule: tuple[int, ...] | int = 3, method: str = "tome") -> Session:
    session = Session(verify="off")
    ReduceTokens(schedule, method).run(program, session)
    return session


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_reduced(kind: str) -> None:
    program = recognised(tiny(kind), inputs(kind))
    before = outputs(program)
    session = reduced(program)
    assert session.log.of("reduce-tokens").fired == 3 and not session.log.refusals
    after = outputs(program)
    assert [value.shape for value in after] == [value.shape for value in before]
    assert all(0 < relative(new, old) < 2 and new.isfinite().all() for new, old in zip(after, before, strict=True))
    lengths = [v[0].shape[1] for node, v in values(program).items() if node.target is ops.merge_tokens]
    tokens = 17 if kind in IMAGE_KINDS else 16
    tokens += {"deit": 1, "siglip_vision_model": -1}.get(kind, 0)
    assert lengths == [tokens - 3, tokens - 6, tokens - 9]


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_removing_nothing_leaves_the_program_as_it_is(kind: str) -> None:
    program = recognised(tiny(kind), inputs(kind))
    code, before = str(program.graph), outputs(program)
    for schedule in (0, (0, 0, 0)):
        assert ReduceTokens(schedule).run(program, Session()) == 0
    assert str(program.graph) == code
    assert all(torch.equal(new, old) for new, old in zip(outputs(program), before, strict=True))


@pytest.mark.parametrize("kind", ["vit", "beit", "bert"])
def test_sizes_sum_to_the_tokens_and_every_merge_is_a_partition(kind: str) -> None:
    program = recognised(tiny(kind), inputs(kind))
    reduced(program)
    found = values(program)
    plans = [value for node, value in found.items() if node.target is ops.plan_merge]
    sizes = [value[1] for node, value in found.items() if node.target is ops.merge_tokens]
    assert len(plans) == 3
    for (kept, sources, _), size in zip(plans, sizes, strict=True):
        tokens = kept.shape[1] + sources.shape[1]
        everything = torch.cat((kept, sources), 1).sort(-1).values
        assert torch.equal(everything, torch.arange(tokens).expand_as(everything))
        if kind != "bert":  # the padded row of a text may lose padding
            assert (size.sum(1) == 17).all()


def tiled(kind: str) -> dict[str, Tensor]:
    """Images of two kinds of patches, two of a kind beside each other."""
    first, second = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": torch.cat((first, first, second, second), dim=-1).repeat(1, 1, 4, 1)}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("vit", {}), ("deit", {}), ("dinov2", {}), ("clip_vision_model", {}), ("siglip_vision_model", {}), ("beit", {})],
)
def test_merging_equal_tokens_changes_nothing(kind: str, options: dict[str, object]) -> None:
    """With the log of the sizes in every attention and weights in every mean; without them it is off by percents."""
    if kind == "beit":
        options = {"use_relative_position_bias": False}
    model = tiny(kind, **options)
    for name, parameter in model.named_parameters():
        if "position_embedding" in name:
            parameter.data.zero_()
    program = recognised(model, tiled(kind))
    before = outputs(program)
    session = reduced(program, (4, 2, 1), "tome-stream")
    assert session.log.of("reduce-tokens").fired == 3
    assert max(relative(new, old) for new, old in zip(outputs(program), before, strict=True)) <= 1e-6
    unweighted(program)
    assert max(relative(new, old) for new, old in zip(outputs(program), before, strict=True)) > 1e-3


def unweighted(program: Program) -> None:
    """Forget the log of the sizes."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.log.default:
            with program.graph.inserting_after(node):
                zero = program.graph.call_function(torch.ops.aten.mul.Tensor, (node, 0.0))
            node.replace_all_uses_with(zero, lambda user, zero=zero: user is not zero)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_row_of_a_batch_is_its_own_run(method: str) -> None:
    model = tiny("vit", add_pooling_layer=True)
    program = recognised(ClassToken(model), (images(3)["pixel_values"],), {"pixels": {0: torch.export.Dim.AUTO}})
    session = reduced(program, 3, method)
    assert session.log.of("reduce-tokens").fired == 3, session.log.refusals
    pixels = images(3)["pixel_values"]
    (together,) = outputs(program, pixels)
    for row in range(3):
        (alone,) = outputs(program, pixels[row : row + 1])
        assert relative(together[row : row + 1], alone) <= 1e-5


class ClassToken(torch.nn.Module):
    """An image model that gives its class token alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.model(pixel_values=pixels).last_hidden_state[:, 0]
        return found


class FirstToken(torch.nn.Module):
    """A text model that gives its first token alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        return found


class MeanOfTokens(torch.nn.Module):
    """A text model whose tokens are averaged, padding aside, as sentence embeddings are."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        found: Tensor = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return found


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_padding_is_never_merged_with_words(kind: str) -> None:
    """What the padded tokens are cannot matter, nor how much of them there is beside enough words."""
    model = MeanOfTokens(tiny(kind))
    short, long = texts((12, 12), 12), texts((12, 12), 16)
    long["input_ids"][:, :12] = short["input_ids"]
    results = []
    for given in (short, long, {**long, "input_ids": torch.where(long["attention_mask"] > 0, long["input_ids"], 7)}):
        program = recognised(model, given)
        assert reduced(program, (2, 2, 0)).log.of("reduce-tokens").fired == 2
        results.append(outputs(program)[0])
    assert relative(results[1], results[0]) <= 1e-5 and relative(results[2], results[1]) <= 1e-6


def test_a_mean_over_equal_words_counts_them_by_size() -> None:
    model = tiny("bert")
    for name, parameter in model.named_parameters():
        if "position_embeddings" in name:
            parameter.data.zero_()
    ids = torch.tensor([[5, 9, 9, 9, 9, 7, 9, 9, 9, 9, 9, 7], [5, 4, 4, 4, 4, 4, 8, 8, 8, 8, 0, 0]])
    program = recognised(MeanOfTokens(model), {"input_ids": ids, "attention_mask": (ids > 0).long()})
    before = outputs(program)[0]
    assert reduced(program, (3, 2, 0)).log.of("reduce-tokens").fired == 2
    assert relative(outputs(program)[0], before) <= 1e-6


@pytest.mark.parametrize("method", sorted(name for name in METHODS if "random" not in name))
def test_a_row_of_a_padded_batch_is_its_own_run(method: str) -> None:
    given = texts((16, 11, 9))
    dynamic = {"input_ids": {0: torch.export.Dim.AUTO}, "attention_mask": {0: torch.export.Dim.AUTO}}
    program = recognised(FirstToken(tiny("bert")), given, dynamic)
    assert reduced(program, (2, 2, 1), method).log.of("reduce-tokens").fired == 3
    rows = given["input_ids"], given["attention_mask"]
    (together,) = outputs(program, *rows)
    for row in range(3):
        (alone,) = outputs(program, *(value[row : row + 1] for value in rows))
        assert relative(together[row : row + 1], alone) <= 1e-5


def test_tokens_without_a_length_are_planned_and_merged() -> None:
    """All pixels alike and a bias-free projection: every key is zero, and nothing divides by it."""
    model = tiny("vit", qkv_bias=False)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.data.zero_()
            module.bias.data.zero_()
    program = recognised(model, images())
    reduced(program)
    keys = [value for node, value in values(program).items() if node.target is ops.plan_merge]
    assert len(keys) == 3 and all(value.isfinite().all() for value in outputs(program))


def test_what_is_not_a_number_stays_in_its_sample() -> None:
    program = recognised(tiny("vit"), images())
    reduced(program)
    pixels = images()["pixel_values"]
    (clean, _), broken = outputs(program, pixels), pixels.clone()
    broken[0, :, :8, :8] = float("nan")
    (found, _) = outputs(program, broken)
    assert torch.equal(found[1], clean[1])
    zero = torch.zeros_like(pixels)
    assert all(value.isfinite().all() for value in outputs(program, zero))


def test_a_reduced_program_exports_and_compiles_to_the_same() -> None:
    program = recognised(tiny("vit"), images())
    reduced(program)
    weights = [program.weights.get(str(program.weight_name(node))) for node in program.weight_placeholders()]
    by_name = dict(zip((node.name for node in program.weight_placeholders()), weights, strict=True))
    pixels = images()["pixel_values"]
    args = tuple(by_name.get(node.name, pixels) for node in program.graph.nodes if node.op == "placeholder")
    program.module.recompile()
    with torch.no_grad():
        eager = program.module(*args)
        exported = torch.export.export(program.module, args).module()(*args)
        compiled = torch.compile(program.module, backend="aot_eager", fullgraph=True)(*args)
    for other in (exported, compiled):
        assert all(torch.equal(a, b) for a, b in zip(other, eager, strict=True))


@pytest.mark.parametrize("kind", ["vit", "bert", "modernbert"])
def test_attention_written_out_is_reduced_alike(kind: str) -> None:
    results = []
    for implementation in ("eager", "sdpa"):
        program = recognised(tiny(kind, implementation), inputs(kind))
        assert reduced(program).log.of("reduce-tokens").fired == 3
        results.append(outputs(program)[0])
    words = slice(None) if kind == "vit" else texts()["attention_mask"] > 0
    assert relative(results[0][words], results[1][words]) <= 1e-5


def test_the_log_says_what_was_done_and_fuel_bounds_it() -> None:
    program = recognised(tiny("vit"), images())
    session = Session(verify="off", fuel=Fuel(1))
    assert ReduceTokens((2, 2, 2)).run(program, session) == 1 and session.fuel.empty
    (entry,) = session.log.applications
    assert entry.exactness == "lossy" and entry.new_nodes == ("tome: 2 of 17 tokens",)
    assert "modeling_vit.py" in entry.user_line


def test_more_than_can_go_is_cut_down_and_said() -> None:
    program = recognised(tiny("vit"), images())
    session = reduced(program, (20, 0, 0))
    assert session.log.applications[0].new_nodes == ("tome: 8 of 17 tokens",)
    assert session.log.refusals[0].reason.startswith("of 17 tokens at most 8 can go here, and 20 were to")


class MeanOfPatches(torch.nn.Module):
    """An image model whose patches are averaged, those behind the first ``ends`` tokens."""

    def __init__(self, model: torch.nn.Module, ends: int) -> None:
        super().__init__()
        self.model, self.ends = model, ends

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.model(pixel_values=pixels).last_hidden_state[:, self.ends :].mean(1)
        return found


@pytest.mark.parametrize("method", ["prune-received", "prune-flow", "divprune", "dart", "evit", "tome"])
@pytest.mark.parametrize(("kind", "ends"), [("vit", 1), ("siglip_vision_model", 0)])
def test_a_schedule_that_asks_for_every_token_leaves_one_to_read(kind: str, ends: int, method: str) -> None:
    program = recognised(MeanOfPatches(tiny(kind), ends), (images()["pixel_values"],))
    session = reduced(program, (20, 20, 20), method)
    assert session.log.of("reduce-tokens").fired and session.log.refusals
    assert outputs(program)[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": (1, 2)}, "a schedule of 2 numbers was given for a program with 3 self-attentions"),
        ({"schedule": -1}, "removes a negative number"),
        ({"schedule": 2, "method": "best"}, "the method 'best' is not known; known: tome"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(options: dict[str, object], message: str) -> None:
    program = recognised(tiny("vit"), images())
    with pytest.raises(ReductionError, match=message):
        ReduceTokens(**options).run(program, Session())  # type: ignore[arg-type]


class Rotary(torch.nn.Module):
    """Blocks over ``[batch, tokens, 16]`` with rotary embedding, applied before heads and tokens change places or
    behind it; the mean of the tokens."""

    def __init__(self, heads_first: bool, tokens: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads_first = heads_first
        self.projections, self.up = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        angles = torch.arange(tokens)[:, None] / 10.0 ** torch.arange(4)
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos())
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin())

    def rotated(self, x: Tensor) -> Tensor:
        """``[batch, tokens, heads, width]`` to ``[batch, heads, tokens, width]``."""
        cos, sin = (self.cos, self.sin) if self.heads_first else (self.cos[:, None], self.sin[:, None])
        x = x.transpose(1, 2) if self.heads_first else x
        first, second = x.chunk(2, dim=-1)
        x = x * cos + torch.cat((-second, first), dim=-1) * sin
        return x if self.heads_first else x.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            q, k, v = self.projections(x).reshape(*x.shape[:2], 3, 2, 8).unbind(2)
            attended = torch.nn.functional.scaled_dot_product_attention(
                self.rotated(q), self.rotated(k), v.transpose(1, 2)
            )
            x = x + attended.transpose(1, 2).flatten(2)
            x = x + self.up(x).relu()
        return x.mean(1)


def test_rotary_embedding_may_come_before_the_heads_are_parted() -> None:
    x, results = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1)), []
    for heads_first in (True, False):
        program = recognised(Rotary(heads_first, 12), (x,))
        assert sum(node.target is ops.rope for node in program.graph.nodes) == 4
        assert reduced(program, (3, 2)).log.of("reduce-tokens").fired == 2
        results.append(outputs(program)[0])
    assert relative(results[1], results[0]) <= 1e-6
