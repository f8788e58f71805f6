"""Kernels of small functions, run by the interpreter beside the function in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from regraft.codegen.triton.rowwise.emit import RegionKernel, emit_region
from regraft.ir.program import Program
from tests.codegen.rowwise.support import agree
from tests.codegen.triton.interpreted import Run
from tests.support import captured

#: Tiles for the interpreter: two rows a program, and for rows in chunks sixteen columns.
WHOLE, CHUNKED = (2, 4, 1), (2, 16, 4, 1)


def region_of(function: Callable[..., Any], *operands: Tensor, chunked: bool | None = None) -> RegionKernel:
    """The kernel of all calls of a function."""
    return kernel_of(captured(function, operands), chunked)


def kernel_of(program: Program, chunked: bool | None = None) -> RegionKernel:
    """The kernel of all calls of a program."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    results: Any = program.output_node.args[0]
    return emit_region(calls, list(dict.fromkeys(results)), program.fake_mode, chunked=chunked)


def values_of(program: Program, nodes: tuple[fx.Node, ...], operands: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The example's tensors by the names of the program's inputs."""
    given = dict(zip(program.user_inputs(), operands, strict=True))
    return {node.name: given[node] for node in nodes}


def launched(run: Run, region: RegionKernel, program: Program, operands: tuple[Tensor, ...], **options: Any) -> Any:
    """The kernel's results on a program's inputs, as a tuple."""
    given = dict(zip(program.user_inputs(), operands, strict=True))
    values = {name: given[node] for name, node in zip(region.kernel.operands, region.inputs, strict=True)}
    results = run(region.kernel, values, **options)
    return results if isinstance(results, tuple) else (results,)


def compare(run: Run, function: Callable[..., Any], *operands: Tensor) -> None:
    """A function's kernel, with rows whole and in chunks, beside the function in fp64."""
    program = captured(function, operands)
    wide = [x.double() if x.is_floating_point() else x for x in operands]
    wanted = function(*wide)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    plain = function(*operands)
    plain = plain if isinstance(plain, tuple) else (plain,)
    for chunked, config in ((False, WHOLE), (True, CHUNKED)):
        made = launched(run, kernel_of(program, chunked), program, operands, config=config)
        for result, exact, usual in zip(made, wanted, plain, strict=True):
            assert result.dtype == usual.dtype and result.shape == usual.shape
            agree(result, exact, usual)
