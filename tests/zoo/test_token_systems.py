"""Systems that reduce tokens themselves are equal to their formula, and what can be faster is recognised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import regraft
from regraft.ir import ops
from tests.codegen.cpu.support import needs_native
from tests.zoo import catanet, hnet, masked_generation, pruning, super_tokens
from tests.zoo.compiled import compiled, draw, seeded

aten = torch.ops.aten
X = draw(2, 24, 32)
SYSTEMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], list[str]]] = {
    "super tokens": (super_tokens.SuperTokens, lambda: (draw(2, 32, 8, 8),), ["softmax"]),
    "content-aware groups": (catanet.Grouping, lambda: (X,), ["softmax", "softmax"]),
    "dynamic chunks": (hnet.HNet, lambda: (X,), ["softmax"]),
    "a predictor's choice": (pruning.DynamicViT, lambda: (X,), ["softmax", "softmax"]),
    "leaves dropped": (pruning.LeafPruning, lambda: (X,), ["mapped", "mapped"]),
    "coarse to fine": (
        lambda: masked_generation.CoarseToFine(6),
        lambda: (X, torch.rand(2, 24, generator=torch.Generator().manual_seed(5)) < 0.5),
        ["softmax", "softmax"],
    ),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_it_equals_its_formula_and_its_attention_is_recognised(name: str) -> None:
    make, inputs, kinds = SYSTEMS[name]
    result = compiled(seeded(make), *inputs())
    assert [kind for kind, _ in result.attentions()] == kinds


def test_chunks_that_there_is_no_room_for_are_not_left_out() -> None:
    model = seeded(hnet.HNet)
    assert isinstance(model, hnet.HNet)

    def chunks(x: Tensor) -> int:
        return int(model.route(x)[1].sum(-1).max())

    few, *_, many = sorted((draw(1, 24, 32, seed=seed) for seed in range(8)), key=chunks)
    model.capacity = chunks(few)
    assert chunks(many) > model.capacity
    fast = regraft.compile(model, (few,))
    with torch.no_grad():
        torch.testing.assert_close(fast(few), model(few))
        assert not fast.report.events
        torch.testing.assert_close(fast(many), model(many))
        torch.testing.assert_close(fast(few), model(few))
    assert f"more than {model.capacity} chunks" in "".join(event.reason for event in fast.report.events)


@needs_native
def test_smoothing_between_chunks_is_one_native_recurrence() -> None:
    result = compiled(seeded(hnet.HNet), X)
    assert result.count(ops.linear_scan) == 1
    assert "scan_native" in result.lowered()
    assert not result.count(aten.stack.default)


def test_keys_of_constant_centres_are_made_once() -> None:
    result = compiled(seeded(catanet.Grouping), X)
    products = [node for node in result.program.graph.nodes if node.target in (aten.linear.default, ops.linear)]
    assert products and not any(map(result.program.is_made_of_weights, products))


@needs_native
def test_members_of_cells_are_found_and_put_back_where_the_image_lies() -> None:
    result = compiled(seeded(lambda: super_tokens.SuperTokens(64, 4, 4, 4)), draw(2, 64, 16, 16))
    assert result.lowered().count("windows_native") == 3
    assert "reshaped_native" not in result.lowered()


@needs_native
def test_members_of_cells_of_any_batch_are_found_without_a_new_capture() -> None:
    model = seeded(lambda: super_tokens.SuperTokens(64, 4, 4, 4))
    batch = torch.export.Dim("batch", min=2, max=64)
    fast = regraft.compile(model, (draw(4, 64, 16, 16),), dynamic=({0: batch},))
    for count in (2, 7):
        x = draw(count, 64, 16, 16, seed=count)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(fast.entries) == 1 and not fast.report.events


@needs_native
def test_the_likeness_of_neighbours_is_one_pass() -> None:
    result = compiled(seeded(hnet.HNet), X)
    assert "fused_native" in result.lowered()
    assert not result.count(aten.cosine_similarity.default) and "linalg_vector_norm.default" not in result.lowered()
