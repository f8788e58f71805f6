"""Masks are made before the first native call, unless one of these decides them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from regraft.codegen.cpu.attention_parts import padding_mask
from regraft.codegen.cpu.masks_first import masks_first
from regraft.codegen.cpu.native_operators import DESCRIPTIONS, norm_native

aten = torch.ops.aten


def order_of(tokens_of: Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]) -> list[str]:
    """Names of calls after the move: a norm of ``x``, then the padding mask of what ``tokens_of`` makes."""
    graph = fx.Graph()
    x, tokens = graph.placeholder("x"), graph.placeholder("tokens")
    norm = graph.call_function(norm_native, (x, None, None, 1e-5))
    made = tokens_of(graph, norm, tokens)
    mask = graph.call_function(padding_mask, ("keys(0)", [made], 8))
    again = graph.call_function(norm_native, (norm, None, None, 1e-5))
    graph.output((again, mask))
    masks_first(graph, DESCRIPTIONS)
    graph.lint()
    return [node.name for node in graph.nodes if node.op == "call_function"]


def test_a_mask_of_an_input_is_made_first() -> None:
    made = order_of(lambda graph, norm, tokens: graph.call_function(aten.ne.Scalar, (tokens, 0)))
    assert made == ["ne_scalar", "padding_mask", "norm_native", "norm_native_1"]


@pytest.mark.parametrize(
    "tokens_of",
    [
        pytest.param(
            lambda g, norm, tokens: g.call_function(aten.gt.Scalar, (norm, 0.0)), id="what a native call makes"
        ),
        pytest.param(lambda g, norm, tokens: g.call_function(aten.bernoulli.p, (tokens, 0.5)), id="random numbers"),
        pytest.param(lambda g, norm, tokens: g.call_function(aten.zero_.default, (tokens,)), id="what is written to"),
        pytest.param(lambda g, norm, tokens: g.call_function(torch.tanh, (tokens,)), id="a function without a schema"),
    ],
)
def test_any_other_stays(tokens_of: Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]) -> None:
    names = order_of(tokens_of)
    assert names[0] == "norm_native" and names[2] == "padding_mask"


def test_masks_that_share_what_they_are_made_of() -> None:
    graph = fx.Graph()
    x, tokens = graph.placeholder("x"), graph.placeholder("tokens")
    norm = graph.call_function(norm_native, (x, None, None, 1e-5))
    seen = graph.call_function(aten.ne.Scalar, (tokens, 0))
    masks = [graph.call_function(padding_mask, ("keys(0)", [seen], keys)) for keys in (8, 9)]
    graph.output((norm, *masks))
    masks_first(graph, DESCRIPTIONS)
    graph.lint()
    assert [node.name for node in graph.nodes][2:-1] == ["ne_scalar", "padding_mask", "padding_mask_1", "norm_native"]
