"""Reading nodes by the names of their schema, comparing sizes without guards, building nodes with fake values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from regraft.ir.capture import capture
from regraft.ir.nodes import (
    Builder,
    arguments,
    concrete,
    dtype,
    is_call,
    is_random,
    is_tensor,
    rank,
    shape,
    size_equal,
    sizes_equal,
    tensor_value,
    user_line,
)
from regraft.ir.program import Program
from tests.support import AsModule

aten = torch.ops.aten


def scaled(x: Tensor) -> Tensor:
    return torch.add(x, x, alpha=2).softmax(-1)


def program_of_scaled(dynamic: bool = False) -> Program:
    sizes = (({0: torch.export.Dim("batch", min=2, max=64)},),) if dynamic else None
    return capture(AsModule(scaled).eval(), (torch.zeros(3, 4),), dynamic=sizes)


def call_of(program: Program, target: object) -> fx.Node:
    return next(node for node in program.graph.nodes if node.target is target)


def builder(program: Program) -> Builder:
    return Builder(program.graph, program.output_node, program.fake_mode, lambda: {"stack_trace": "trace"})


def test_facts_of_a_tensor_node() -> None:
    node = call_of(program_of_scaled(), aten.add.Tensor)
    assert is_tensor(node) and is_call(node, (aten.add.Tensor,)) and not is_call(node, (aten.mul.Tensor,))
    assert (shape(node), dtype(node), rank(node)) == ((3, 4), torch.float32, 2)


def test_what_draws_random_numbers_says_so() -> None:
    program = capture(AsModule(lambda x: torch.rand_like(x) + x).eval(), (torch.zeros(2, 2),))
    assert is_random(call_of(program, aten.rand_like.default)) and not is_random(call_of(program, aten.add.Tensor))
    assert not is_random(program.output_node)


def test_output_stands_for_no_tensor() -> None:
    program = program_of_scaled()
    with pytest.raises(TypeError, match="does not stand for one tensor"):
        tensor_value(program.output_node)


def test_arguments_go_by_schema_names_with_defaults() -> None:
    program = program_of_scaled()
    add, softmax = call_of(program, aten.add.Tensor), call_of(program, aten.softmax.int)
    (x,) = program.user_inputs()
    assert arguments(add) == {"self": x, "other": x, "alpha": 2}
    assert arguments(softmax) == {"self": add, "dim": -1, "dtype": None}


def test_user_line_is_the_line_of_the_users_function() -> None:
    line = user_line(call_of(program_of_scaled(), aten.softmax.int))
    first = scaled.__code__.co_firstlineno
    assert line == f"{__file__}:{first + 1} in scaled"


def test_user_line_is_empty_where_nothing_is_known() -> None:
    assert user_line(fx.Graph().placeholder("x")) == ""


def test_symbolic_sizes_compare_without_a_guard() -> None:
    program = program_of_scaled(dynamic=True)
    (x,) = program.user_inputs()
    batch = shape(x)[0]

    assert isinstance(batch, torch.SymInt) and concrete(batch) == 3
    assert size_equal(batch, shape(call_of(program, aten.add.Tensor))[0])
    assert not size_equal(batch, 3)  # equal in the example only
    assert sizes_equal((batch, 4), shape(x)) and not sizes_equal((batch,), shape(x))
    assert not batch.node.shape_env.guards


def test_built_nodes_carry_fake_values_and_the_stamp() -> None:
    program = program_of_scaled()
    build = builder(program)

    node = build.call(aten.sum.dim_IntList, call_of(program, aten.add.Tensor), [-1])

    assert shape(node) == (3,) and node.meta["stack_trace"] == "trace" and build.made == [node]


def test_a_call_that_does_not_fit_raises_and_adds_nothing() -> None:
    program = program_of_scaled()
    build, count = builder(program), len(program.graph.nodes)
    with pytest.raises(RuntimeError):
        build.call(aten.matmul.default, program.user_inputs()[0], program.user_inputs()[0])
    assert len(program.graph.nodes) == count and build.made == []


def test_size_is_a_number_where_static_and_a_node_where_symbolic() -> None:
    program = program_of_scaled(dynamic=True)
    (x,) = program.user_inputs()
    build = builder(program)

    assert build.size(x, -1) == 4
    size = build.size(x, -2)
    assert size.target is aten.sym_size.int and size.args == (x, 0) and concrete(size) == 3


def test_symbolic_size_is_read_from_the_input_that_has_it() -> None:
    program = program_of_scaled(dynamic=True)
    size = builder(program).size(call_of(program, aten.softmax.int), 0)
    assert size.args == (program.user_inputs()[0], 0)


def test_sizes_of_a_reshape_leave_one_unknown() -> None:
    program = program_of_scaled(dynamic=True)
    build = builder(program)
    softmax = call_of(program, aten.softmax.int)
    assert build.sizes(softmax) == [build.made[-1], 4]
    assert build.sizes(build.call(aten.cat.default, [softmax, softmax], 0)) == [-1, 4]  # twice the batch


def test_a_size_that_the_graph_computes_is_taken_from_there() -> None:
    program = capture(
        AsModule(lambda x: x.reshape(x.shape[0] * x.shape[1]).softmax(-1)).eval(), (torch.zeros(3, 4),), dynamic=True
    )
    softmax = call_of(program, aten.softmax.int)
    size = builder(program).size(softmax, 0)
    assert not isinstance(size.meta["val"], Tensor) and softmax not in size.all_input_nodes


def test_a_size_of_the_node_that_is_built_for_is_read_from_its_operands() -> None:
    program = capture(AsModule(lambda x: torch.cat([x, x]).softmax(-1)).eval(), (torch.zeros(3, 4),), dynamic=True)
    softmax = call_of(program, aten.softmax.int)
    size = Builder(program.graph, softmax, program.fake_mode).size(softmax, 0)
    assert size.args == (call_of(program, aten.cat.default), 0)
    program.graph.lint()


def test_a_size_that_is_settled_behind_a_node_is_a_number_there_too() -> None:
    def scaled_sum(x: Tensor) -> Tensor:
        return x.square() * torch.ones(4)

    program = capture(AsModule(scaled_sum).eval(), (torch.zeros(3, 4),), dynamic=True)
    square = next(node for node in program.graph.nodes if node.op == "call_function")
    assert type(shape(square)[1]) is int and isinstance(shape(square)[0], torch.SymInt)
