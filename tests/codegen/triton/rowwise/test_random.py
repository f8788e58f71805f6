"""Random programs: every kernel computes what the graph does."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from regraft.codegen.rowwise.partition import find_regions
from regraft.codegen.triton.rowwise.emit import emit_region
from regraft.codegen.triton.rowwise.lower import lower_regions
from regraft.ir.program import Program
from tests.codegen.rowwise.support import agree
from tests.codegen.triton.interpreted import Run
from tests.codegen.triton.rowwise.support import CHUNKED, WHOLE
from tests.strategies import canonical_programs

TYPES = (torch.float32, torch.float16)
BUSY = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def values_of(program: Program, wide: bool) -> dict[fx.Node, Any]:
    """The value of every node on the example, in the program's type or in fp64."""
    graph = fx.GraphModule(torch.nn.Module(), program.graph)
    named: dict[str, Any] = dict(zip((n.name for n in program.user_inputs()), program.example, strict=True))
    for node in program.weight_placeholders():
        name = program.weight_name(node)
        assert name is not None
        named[node.name] = program.weights.get(name)
    inputs = [named[node.name] for node in program.graph.nodes if node.op == "placeholder"]
    runner = fx.Interpreter(graph, garbage_collect_values=False)
    with torch.no_grad():
        runner.run(*[x.double() if wide else x for x in inputs])
    return {node: runner.env[node] for node in program.graph.nodes if node in runner.env}


@BUSY
@given(program=canonical_programs(dtypes=TYPES, max_operators=12), chunked=st.booleans())
def test_kernels_compute_what_the_graph_does(run: Run, program: Program, chunked: bool) -> None:
    """Each region on what it reads in the example; rounding in front of it is none of its own."""
    values = values_of(program, wide=False)
    for region in find_regions(program).regions:
        made = emit_region(region.nodes, region.outputs, program.fake_mode, chunked=chunked)
        given_tensors = [values[node] for node in made.inputs]
        operands = dict(zip(made.kernel.operands, given_tensors, strict=True))
        results = run(made.kernel, operands, config=CHUNKED if chunked else WHOLE)
        exact = in_fp64(region.nodes, values)
        for node, result in zip(region.outputs, results if isinstance(results, tuple) else (results,), strict=True):
            assert result.dtype == values[node].dtype and result.shape == values[node].shape
            agree(result, exact[node], values[node])


def in_fp64(nodes: tuple[fx.Node, ...], values: dict[fx.Node, Any]) -> dict[fx.Node, Tensor]:
    """The values of calls from what they read, in fp64."""
    made: dict[fx.Node, Any] = {}

    def operand(node: fx.Node) -> Any:
        if node in made:
            return made[node]
        held = values[node]
        return held.double() if isinstance(held, Tensor) and held.is_floating_point() else held

    with torch.no_grad():
        for node in nodes:
            args, kwargs = fx.map_arg(node.args, operand), fx.map_arg(node.kwargs, operand)
            made[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return made


@BUSY
@given(program=canonical_programs(max_operators=12))
def test_a_lowered_program_gives_the_same(program: Program) -> None:
    wanted = program.callable()(*program.example)
    lower_regions(program)
    program.graph.lint()
    for result, expected in zip(program.callable()(*program.example), wanted, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert result.shape == expected.shape


@settings(max_examples=10, deadline=None)
@given(program=canonical_programs(max_operators=10))
def test_the_text_is_the_same_every_time(program: Program) -> None:
    texts = [
        [emit_region(r.nodes, r.outputs, program.fake_mode).kernel.source for r in find_regions(copy).regions]
        for copy in (program.copy(), program.copy())
    ]
    assert texts[0] == texts[1]
