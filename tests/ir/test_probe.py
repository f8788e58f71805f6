"""Probes evaluate a few nodes: random activations, real weights, true index arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from regraft.ir.capture import capture
from regraft.ir.probe import Pool, Probe, ProbeError, index_like, vary_inputs
from regraft.ir.program import Program
from tests.ir.graphs import numbers, program_of

aten = torch.ops.aten
X = numbers(3, 4)


def node_of(program: Program, target: Any) -> fx.Node:
    return next(node for node in program.graph.nodes if node.target is target)


def test_pool_gives_equal_values_for_equal_requests() -> None:
    assert torch.equal(Pool(0).take([5, 7], torch.float32, 3), Pool(0).take([5, 7], torch.float32, 3))


def test_pool_gives_other_values_at_other_offsets_and_seeds() -> None:
    first = Pool(0).take([5], torch.float32, 0)
    assert not torch.equal(first, Pool(0).take([5], torch.float32, 1))
    assert not torch.equal(first, Pool(1).take([5], torch.float32, 0))


def test_pool_grows_when_asked_for_more() -> None:
    assert Pool(0).take([1 << 17], torch.bfloat16, 1).shape == (1 << 17,)


def test_evaluates_from_the_inputs() -> None:
    program = program_of(lambda x: (x + 1).relu(), X)
    (value,) = Probe(program, (), Pool(), [X]).evaluate([node_of(program, aten.relu.default)])
    assert torch.equal(value, (X + 1).relu())


def test_stops_at_the_frontier_with_random_numbers() -> None:
    program = program_of(lambda x: (x + 1).relu(), X)
    shifted, positive = node_of(program, aten.add.Tensor), node_of(program, aten.relu.default)
    probe = Probe(program, [shifted], Pool(), [X])
    drawn, result = probe.evaluate([shifted, positive])
    assert not torch.equal(drawn, X + 1) and torch.equal(result, drawn.relu())


def test_frontier_keeps_the_layout_of_what_it_stands_for() -> None:
    program = program_of(lambda x: x.exp().T.relu(), X)
    turned = node_of(program, aten.numpy_T.default)
    (value,) = Probe(program, [turned], Pool(), [X]).evaluate([turned])
    assert value.shape == (4, 3) and value.stride() == turned.meta["val"].stride()


def test_weights_are_the_real_ones() -> None:
    layer = nn.Linear(4, 2).eval()
    program = capture(layer, (X,))
    (value,) = Probe(program, (), Pool(), [X]).evaluate([node_of(program, aten.linear.default)])
    torch.testing.assert_close(value, layer(X).detach())


def test_double_widens_inputs_and_casts() -> None:
    program = program_of(lambda x: x.bfloat16().sum(-1).float(), X)
    cast = [node for node in program.graph.nodes if node.op == "call_function"][-1]
    (value,) = Probe(program, (), Pool(), [X], double=True).evaluate([cast])
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, X.double().sum(-1))


def causal(x: Tensor, ids: Tensor) -> Tensor:
    place = torch.arange(x.shape[0])
    mask = (place[:, None] >= place[None]) & (ids != 0)
    return torch.where(mask, (x @ x.T), torch.zeros(()))


def test_masks_are_computed_even_when_they_lie_on_the_frontier() -> None:
    ids = torch.tensor([1, 0, 2])
    program = program_of(causal, X, ids)
    mask = node_of(program, aten.where.self).args[0]
    assert isinstance(mask, fx.Node) and index_like(program, mask)
    assert not index_like(program, node_of(program, aten.matmul.default))
    (value,) = Probe(program, [mask], Pool(), [X, ids]).evaluate([mask])
    assert torch.equal(value, torch.ones(3, 3).tril().bool() & (ids != 0))


def test_failing_operator_is_named() -> None:
    program = program_of(lambda x, ids: x.index_select(0, ids), X, torch.tensor([0]))
    probe = Probe(program, (), Pool(), [X, torch.tensor([7])])
    with pytest.raises(ProbeError, match=r"aten.index_select.default \(index_select\) failed on probe inputs"):
        probe.evaluate([node_of(program, aten.index_select.default)])


def test_symbolic_sizes_take_their_value_in_the_example() -> None:
    sizes = (({0: torch.export.Dim("rows", min=2, max=64)},),)
    program = program_of(lambda x: x.exp() * x.shape[0], X, dynamic=sizes)
    product = node_of(program, aten.mul.Tensor)
    (value,) = Probe(program, (), Pool(), [X]).evaluate([product])
    torch.testing.assert_close(value, X.exp() * 3)


def test_varied_inputs_change_masks_and_integers_only() -> None:
    flags = torch.ones(2, 32, dtype=torch.bool)
    ids = torch.arange(10, 42)
    x, varied_flags, varied_ids, number = vary_inputs([X, flags, ids, 3])

    assert x is X and number == 3
    assert varied_flags.dtype == torch.bool and not varied_flags.all()
    assert varied_flags[:, 0].all()  # a row keeps its first entry: no row loses everything by chance
    assert not torch.equal(varied_ids, ids) and torch.equal(varied_ids.sort().values, ids)


def test_zeros_and_ones_of_any_type_are_a_mask() -> None:
    (mask,) = vary_inputs([torch.ones(2, 32, dtype=torch.int64)])
    assert set(mask.flatten().tolist()) == {0, 1}


def test_number_that_depends_on_the_data_is_computed() -> None:
    def function(x: Tensor, counts: Tensor) -> Tensor:
        first, second = x.split(counts.tolist())
        return torch.cat([first.sin(), second.cos()])

    counts = torch.tensor([1, 2])
    program = program_of(function, X, counts)
    (value,) = Probe(program, (), Pool(), [X, counts]).evaluate([node_of(program, aten.cat.default)])
    assert torch.equal(value, function(X, counts))
