"""Writing over dead buffers: only what nobody reads any more, and never what belongs to somebody else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from regraft.codegen.cpu.peephole import merge_reshapes, polish

aten = torch.ops.aten
X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Lines:
    """A graph line by line: each call is run on example values, so that every node knows its shape."""

    def __init__(self) -> None:
        self.graph, self.root = fx.Graph(), nn.Module()
        self.inputs: list[Tensor] = []

    def input(self, value: Tensor) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        node.meta["val"] = value
        self.inputs.append(value)
        return node

    def weight(self, value: Tensor) -> fx.Node:
        self.root.weight = nn.Parameter(value, requires_grad=False)
        node = self.graph.get_attr("weight")
        node.meta["val"] = value
        return node

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    def targets_after_polish(self, *outputs: fx.Node) -> list[Any]:
        """Polish, check that values and inputs are what they were, and return the targets of the calls."""
        self.graph.output(outputs)
        expected = [node.meta["val"].clone() for node in outputs]
        before = [value.clone() for value in self.inputs]
        polish(self.graph)
        module = fx.GraphModule(self.root, self.graph)
        for _ in range(2):
            for value, wanted in zip(module(*self.inputs), expected, strict=True):
                assert torch.equal(value, wanted)
        assert all(torch.equal(value, kept) for value, kept in zip(self.inputs, before, strict=True))
        return [node.target for node in self.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("operator", "in_place"), [(aten.add.Tensor, aten.add_.Tensor), (aten.mul.Tensor, aten.mul_.Tensor)]
)
def test_a_dead_temporary_is_written_over(operator: Any, in_place: Any) -> None:
    lines = Lines()
    x = lines.input(X)
    out = lines.call(operator, lines.call(aten.exp.default, x), x)
    assert lines.targets_after_polish(out) == [aten.exp.default, in_place]


def test_the_sum_that_a_product_starts_from_is_written_over() -> None:
    lines = Lines()
    x, weight = lines.input(X), lines.weight(torch.eye(4))
    out = lines.call(aten.addmm.default, lines.call(aten.exp.default, x), x, weight)
    assert lines.targets_after_polish(out) == [aten.exp.default, aten.addmm_.default]


def test_what_is_read_later_stays() -> None:
    lines = Lines()
    x = lines.input(X)
    residual = lines.call(aten.exp.default, x)
    total = lines.call(aten.add.Tensor, residual, x)
    out = lines.call(aten.sub.Tensor, total, residual)
    assert aten.add_.Tensor not in lines.targets_after_polish(out)


def test_a_view_that_is_read_later_keeps_its_buffer() -> None:
    lines = Lines()
    x = lines.input(X)
    made = lines.call(aten.exp.default, x)
    row = lines.call(aten.select.int, made, 0, 1)
    total = lines.call(aten.add.Tensor, made, x)
    out = lines.call(aten.mul.Tensor, total, row)
    assert aten.add_.Tensor not in lines.targets_after_polish(out)


def test_a_view_that_was_read_before_frees_its_buffer() -> None:
    lines = Lines()
    x = lines.input(X)
    made = lines.call(aten.exp.default, x)
    early = lines.call(aten.neg.default, lines.call(aten.reshape.default, made, [12]))
    total = lines.call(aten.add.Tensor, made, x)
    assert aten.add_.Tensor in lines.targets_after_polish(total, early)


def test_outputs_stay_also_through_views() -> None:
    lines = Lines()
    x = lines.input(X)
    made = lines.call(aten.exp.default, x)
    flat = lines.call(aten.reshape.default, made, [12])
    total = lines.call(aten.add.Tensor, made, x)
    assert aten.add_.Tensor not in lines.targets_after_polish(flat, total)


@pytest.mark.parametrize("view", [None, (aten.reshape.default, [3, 4]), (aten.permute.default, [0, 1])])
def test_inputs_and_weights_stay_also_through_views(view: tuple[Any, Any] | None) -> None:
    for kind in ("input", "weight"):
        lines = Lines()
        x = lines.input(X)
        other = lines.input(X + 1) if kind == "input" else lines.weight(X + 1)
        operand = other if view is None else lines.call(view[0], other, view[1])
        assert aten.add_.Tensor not in lines.targets_after_polish(lines.call(aten.add.Tensor, operand, x))


def test_a_value_that_is_both_operands_stays() -> None:
    lines = Lines()
    made = lines.call(aten.exp.default, lines.input(X))
    other = lines.call(aten.permute.default, lines.call(aten.reshape.default, made, [4, 3]), [1, 0])
    assert aten.add_.Tensor not in lines.targets_after_polish(lines.call(aten.add.Tensor, made, other))


def test_a_broadcast_operand_stays() -> None:
    lines = Lines()
    x, row = lines.input(X), lines.input(torch.ones(1, 4))
    wide = lines.call(aten.expand.default, lines.call(aten.exp.default, row), [3, 4])
    smaller = lines.call(aten.exp.default, row)
    outs = lines.call(aten.add.Tensor, wide, x), lines.call(aten.mul.Tensor, smaller, x)
    found = lines.targets_after_polish(*outs)
    assert aten.add_.Tensor not in found and aten.mul_.Tensor not in found


def test_a_computed_bias_is_no_buffer_for_the_product() -> None:
    lines = Lines()
    x, weight = lines.input(X), lines.weight(torch.eye(4))
    bias = lines.call(aten.exp.default, lines.input(torch.ones(4)))
    assert aten.addmm_.default not in lines.targets_after_polish(lines.call(aten.addmm.default, bias, x, weight))


def test_a_result_of_another_type_is_a_new_buffer() -> None:
    lines = Lines()
    made = lines.call(aten.exp.default, lines.input(X.to(torch.bfloat16)))
    assert aten.add_.Tensor not in lines.targets_after_polish(lines.call(aten.add.Tensor, made, lines.input(X)))


def test_a_chain_of_sums_is_one_buffer() -> None:
    lines = Lines()
    x = lines.input(X)
    total = lines.call(aten.exp.default, x)
    for _ in range(3):
        branch = lines.call(aten.sin.default, total)
        total = lines.call(aten.add.Tensor, total, branch)
    assert lines.targets_after_polish(total).count(aten.add_.Tensor) == 3


def test_reshapes_of_reshapes_become_one() -> None:
    lines = Lines()
    once = lines.call(aten.reshape.default, lines.input(X), [2, 6])
    out = lines.call(aten.reshape.default, once, [12])
    lines.graph.output(out)
    merge_reshapes(lines.graph)
    assert [str(arg) for arg in out.args] == ["x0", "[12]"]
