"""Systems that are recognised by the graph alone, and equal to their formula: which operator, and which mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn

from regraft.codegen.cpu import attention_measured
from regraft.codegen.cpu.lower import lower
from regraft.ir import ops
from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.ir.mask import parse, spans
from regraft.passes.pipeline import default_pipeline
from tests.codegen.cpu.support import needs_native
from tests.zoo import (
    core_context,
    heads,
    long_short,
    lumos,
    maformer,
    masks,
    reversed_attention,
    sigmoid,
    tokenformer,
    trees,
    uniformer,
)
from tests.zoo.compiled import Compiled, compiled, draw, seeded

aten = torch.ops.aten
X = draw(2, 24, 32)
WINDOW = long_short.WINDOW


@dataclass(frozen=True)
class System:
    """A system, its inputs, and the kind and mask of each attention that must be found."""

    make: Callable[[], nn.Module]
    found: tuple[tuple[str, str], ...]
    args: Callable[[], tuple[Tensor, ...]] = lambda: (X,)


def _set() -> tuple[Tensor, ...]:
    return (draw(2, 15, 32), *(tensor.expand(2, -1) for tensor in masks.members((3, 4, 2), 3, 3)))


CONSTANT = "~dense(0)"  # a mask that no predicate says, folded to a constant
SYSTEMS: dict[str, System] = {
    "long-short, one mask": System(long_short.LongShortByMask, (("softmax", CONSTANT),)),
    "long-short, two calls": System(
        long_short.LongShortByHeads,
        (("softmax", f"(band({1 - WINDOW},0) & heads(0,2)) | (band(None,0) & heads(2,4))"),),
    ),
    "core context": System(
        core_context.CoreContextAttention, (("softmax", "all"), ("softmax", "all"), ("softmax", CONSTANT))
    ),
    "sigmoid": System(sigmoid.SigmoidAttention, (("mapped", "band(None,0)"),)),
    "sigmoid, normalised": System(lambda: sigmoid.SigmoidAttention(True), (("mapped", "band(None,0)"),)),
    "sigmoid, shifted": System(sigmoid.ShiftedSigmoid, (("mapped", "band(None,0)"),)),
    "elu + 1": System(sigmoid.EluAttention, (("mapped", "band(None,0)"),)),
    "linear over max(|sum|, 1)": System(sigmoid.LinearAttention, (("mapped", "band(None,0)"),)),
    "key bias": System(sigmoid.KeyBias, (("softmax", "band(None,1) | prefix(1)"),)),
    "key and value bias": System(lambda: sigmoid.KeyBias(True), (("softmax", "band(None,1) | prefix(1)"),)),
    "learned sink": System(sigmoid.LearnedSink, (("softmax", "band(None,0)"),)),
    "sink in front": System(sigmoid.SinkInFront, (("softmax", "band(None,0)"),)),
    "one more in the denominator": System(sigmoid.OneMore, (("softmax", "band(None,0)"),)),
    "keys padded": System(lambda: sigmoid.KeysPadded(False), (("softmax", "band(None,1) | prefix(1)"),)),
    "keys and mask padded": System(lambda: sigmoid.KeysPadded(True), (("softmax", "band(None,1) | prefix(1)"),)),
    "reversed": System(reversed_attention.ReversedAttention, (("mapped", "all"),)),
    "MAFormer": System(maformer.Maformer, (("softmax", "all"),) * 3, lambda: (draw(2, maformer.SIDE**2, 32),)),
    "Lumos-1": System(lambda: lumos.Lumos(32), (("softmax", CONSTANT),), lambda: (draw(2, 23, 64),)),
    "PPD": System(
        lambda: trees.TreeVerification(trees.PPD),
        (("softmax", CONSTANT),),
        lambda: (draw(2, len(trees.PPD), 32), *trees.cache(2, 11)),
    ),
    "Falcon": System(
        lambda: trees.TreeVerification(trees.FALCON),
        (("softmax", CONSTANT),),
        lambda: (draw(2, len(trees.FALCON), 32), *trees.cache(2, 11)),
    ),
    "set-based prompting": System(
        masks.SetBasedPrompting, (("softmax", "band(None,0) & (same(0,0) | ~keys(0) | ~rows(0))"),), _set
    ),
    "switching": System(masks.Switching, (("softmax", "band(None,0) | dense(0)"),), lambda: (X, torch.tensor([0, 1]))),
    "identities": System(
        masks.Identity,
        (("softmax", "band(None,0) & same(0,0)"), ("softmax", "band(None,0) & (band(0,0) | ~same(0,0))")),
        lambda: (X, torch.randint(0, 3, (2, 24), generator=torch.Generator().manual_seed(2))),
    ),
    "word blocks": System(
        masks.WordBlocks, (("softmax", "same(0,0)"),), lambda: (X, torch.arange(24).expand(2, -1) // 5)
    ),
    "dilated": System(masks.Dilated, (("softmax", "band(-8,0) & dense(0)"),)),
}


def is_weights(node: fx.Node) -> bool:
    """Whether a softmax is over a product: a choice of heads is none."""
    scores = node.args[0]
    while isinstance(scores, fx.Node) and scores.target in (aten.mul.Tensor, aten.div.Tensor, aten.where.ScalarSelf):
        scores = next(argument for argument in scores.args[::-1] if isinstance(argument, fx.Node))
    return isinstance(scores, fx.Node) and scores.target is aten.matmul.default


@pytest.fixture(scope="module", params=SYSTEMS)
def case(request: pytest.FixtureRequest) -> tuple[str, Compiled]:
    system = SYSTEMS[request.param]
    return request.param, compiled(seeded(system.make), *system.args())


def test_it_is_recognised_and_equals_its_formula(case: tuple[str, Compiled]) -> None:
    name, result = case
    assert result.attentions() == list(SYSTEMS[name].found)
    assert not [node for node in result.program.graph.nodes if node.target is aten.softmax.int and is_weights(node)]


@needs_native
def test_a_large_site_makes_no_mask_of_all_scores(case: tuple[str, Compiled], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_measured, "_LARGEST_SAMPLE", 0)  # smaller ones are measured: any kernel may win
    name, result = case
    if "dense" in str(SYSTEMS[name].found) or "same" in str(SYSTEMS[name].found):
        called = {getattr(node.target, "__name__", "") for node in lower(result.program).module.graph.nodes}
        assert "attend_native" in called and not {"score_mask", "additive_mask"} & called


def test_long_short_attention_reads_few_keys_in_its_short_heads() -> None:
    result = compiled(seeded(long_short.LongShortByMask), X)
    (site,) = [node for node in result.program.graph.nodes if node.target is ops.attention]
    tensor = result.program.weights.get(str(result.program.weight_name(site.args[3][0])))
    table = spans(parse(CONSTANT), 4, 24, 24, [tensor], dense=True)
    assert table is not None and table.shape == (2, 1, 4, 24, 1)
    seen = (table[1] - table[0])[0, :, -1, 0].tolist()
    assert seen == [WINDOW, WINDOW, 24, 24]


@pytest.mark.parametrize("size", [32, 48])
def test_rotary_places_of_three_axes_are_one_operator_whatever_the_head_size(size: int) -> None:
    """The operator takes a table of all dims, so that axes which differ within a rotating pair (sizes that are no
    multiple of 32) need no gate: both are exact."""
    result = compiled(seeded(lambda: lumos.Lumos(size)), draw(2, 23, 2 * size))
    assert result.count(ops.rope) == 2
    assert result.count(aten.cos.default) == 0, "tables are made once, not in each call"


def test_the_members_of_a_set_may_come_in_any_order() -> None:
    """Set-Based Prompting's promise: permuting the members leaves what follows them as it was."""
    model = seeded(masks.SetBasedPrompting)
    x, member, place = _set()
    result = compiled(model, x, member, place)
    order = [0, 1, 2, *range(6, 10), *range(3, 6), *range(10, 15)]
    moved = result.executable(x[:, order], member[:, order].contiguous(), place[:, order].contiguous())[0]
    torch.testing.assert_close(moved[:, -3:], result.executable(x, member, place)[0][:, -3:], rtol=1e-5, atol=1e-5)


def test_both_directions_and_one_are_the_same_program() -> None:
    result = compiled(seeded(masks.Switching), X, torch.tensor([0, 1]))
    both, one = result.executable(X, torch.tensor([1, 1]))[0], result.executable(X, torch.tensor([0, 0]))[0]
    mixed = result.executable(X, torch.tensor([0, 1]))[0]
    torch.testing.assert_close(mixed, torch.stack([one[0], both[1]]))


@pytest.mark.parametrize("normed_first", [False, True])
def test_parameter_attention_is_a_feed_forward_layer(normed_first: bool) -> None:
    """TokenFormer's parameters go to linear kernels, never to an attention kernel, with either norm."""
    result = compiled(seeded(lambda: tokenformer.TokenFormer(normed_first)), X)
    assert not result.attentions()
    assert result.count(aten.linear.default) + result.count(ops.linear) == 4
    assert not result.count(aten.matmul.default)
    assert result.count(ops.rms_norm) == 2, "scores of a length are an RMSNorm"


def test_a_length_that_the_capture_fixed_may_stand_beside_a_symbolic_batch() -> None:
    """The logarithm fixes the length only after other nodes have their sizes."""
    model = seeded(sigmoid.ShiftedSigmoid)
    program = capture(model, (X,), dynamic=True)
    default_pipeline("cpu").run(program, Session())
    more = draw(3, 24, 32, seed=9)
    torch.testing.assert_close(lower(program)(more)[0], model(more).detach(), rtol=1e-5, atol=1e-5)


def test_convolutions_take_their_norm_and_their_residual() -> None:
    """UniFormer: the batch norm and the sum behind the depthwise convolution are weights."""
    result = compiled(seeded(uniformer.Uniformer), draw(2, 32, 6, 7))
    assert result.attentions() == [("softmax", "all")]
    assert not result.count(aten.batch_norm.default)
    assert result.count(aten.conv2d.default) == 4
    assert result.count(aten.add.Tensor) == 1, "the residual of the first block alone: the last joins a linear layer"


def test_heads_of_many_tokens_are_one_product() -> None:
    result = compiled(seeded(heads.MultiToken), X)
    wide = [node for node in result.program.graph.nodes if node.target is aten.linear.default]
    assert heads.TOKENS * heads.CLASSES in [node.meta["val"].shape[-1] for node in wide]


def test_heads_that_nobody_reads_are_gone_with_their_weights() -> None:
    result = compiled(seeded(heads.Auxiliary), X)
    names = {str(result.program.weight_name(node)) for node in result.program.weight_placeholders()}
    kept = {source for name in names for source in result.program.weights.sources(name)}
    assert not [name for name in kept if "auxiliary" in name]
    assert [name for name in kept if "main" in name]
