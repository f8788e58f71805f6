"""Rotary embeddings are found in each layout; the operator is a rotation of pairs by the position's angle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.ir import ops
from regraft.ir.nodes import arguments
from regraft.ir.program import Program
from regraft.passes.recognize import rope_examples as written
from regraft.passes.recognize.rope import RecognizeRope
from regraft.passes.recognize.rope_complex import RecognizeRopeComplex
from regraft.passes.recognize.rope_pairs import RecognizeRopePairs
from regraft.passes.recognize.rope_pairs_examples import rotated as rotated_pairs
from tests.support import apply, captured, run

RULES = (RecognizeRope(), RecognizeRopePairs(), RecognizeRopeComplex())


def tensors(table: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """``x [2, 3, 5, 8]`` with tables of ``table`` values a position."""
    generator = torch.Generator().manual_seed(0)
    x, angles = torch.randn(2, 3, 5, 8, generator=generator), torch.rand(5, table, generator=generator)
    return x.to(dtype), angles.cos().to(dtype), angles.sin().to(dtype)


def ropes(program: Program) -> list[tuple[int, str]]:
    """``rotary_dim`` and layout of each rotation in the graph."""
    calls = [arguments(node) for node in program.graph.nodes if node.target is ops.rope]
    return [(call["rotary_dim"], call["layout"]) for call in calls]


@pytest.mark.parametrize(("layout", "stride"), [("half", 4), ("interleaved", 1)])
def test_reference_turns_each_pair_as_a_complex_number(layout: str, stride: int) -> None:
    x, cos, sin = tensors(4, torch.float64)
    first = torch.arange(4) if stride == 4 else torch.arange(0, 8, 2)
    turned = torch.complex(x[..., first], x[..., first + stride]) * torch.complex(cos, sin)
    expected = torch.empty_like(x)
    expected[..., first], expected[..., first + stride] = turned.real, turned.imag
    torch.testing.assert_close(ops.rope(x, cos, sin, 8, layout), expected)


@pytest.mark.parametrize(
    ("function", "table", "found"),
    [
        (written.rotated(written.half), 8, (8, "half")),
        (written.rotated(written.by_step), 8, (8, "interleaved")),
        (written.rotated(written.by_reshape), 8, (8, "interleaved")),
        (written.partial, 4, (4, "half")),
        (written.part_by_step, 4, (4, "interleaved")),
        (written.last_part, 4, (4, "half")),
        (written.deepseek, 8, (8, "interleaved_to_half")),
        (rotated_pairs("halves", "halves"), 4, (8, "half")),
        (rotated_pairs("steps", "pairs"), 4, (8, "interleaved")),
        (rotated_pairs("picks", "pairs"), 4, (8, "interleaved")),
        (rotated_pairs("steps", "halves"), 4, (8, "interleaved_to_half")),
    ],
)
def test_layout_is_read_from_the_graph(function: Any, table: int, found: tuple[int, str]) -> None:
    args = tensors(table)
    program = captured(function, args)
    apply(program, RULES)
    assert ropes(program) == [found]
    torch.testing.assert_close(run(program, args), function(*args))


def test_part_that_turns_is_read_in_place() -> None:
    program = captured(written.partial, tensors(4))
    apply(program, RULES)
    (call,) = [node for node in program.graph.nodes if node.target is ops.rope]
    assert program.output_node.all_input_nodes == [call]
    assert call.args[0].op == "placeholder"


def test_append_of_another_tensor_stays_outside_the_rotation() -> None:
    def appended(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat((written.rotated(written.half)(x, cos, sin), x), -1)

    program = captured(appended, tensors(8))
    session = apply(program, RULES)
    assert ropes(program) == [(8, "half")]
    assert session.log.refusals == []


def test_query_and_key_share_their_tables() -> None:
    def both(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turn = written.rotated(written.half)
        return turn(x + 1, cos[None, None], sin[None, None]), turn(x[:, :1], cos[None, None], sin[None, None])

    program = captured(both, tensors(8))
    apply(program, RULES)
    tables = {call.args[1:3] for call in program.graph.nodes if call.target is ops.rope}
    assert len(ropes(program)) == 2
    assert len(tables) == 1


def test_rotation_with_a_symbolic_length() -> None:
    length = torch.export.Dim("length", min=2, max=64)
    program = captured(
        written.rotated(written.half), tensors(8), dynamic={"args": ({2: length}, {0: length}, {0: length})}
    )
    apply(program, RULES)
    assert ropes(program) == [(8, "half")]


def test_bf16_rotation_widened_in_the_source_stays_wide() -> None:
    def widened(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return written.rotated(written.half)(x.float(), cos, sin).to(x.dtype)

    args = tensors(8, torch.bfloat16)
    program = captured(widened, args)
    apply(program, RULES)
    assert torch.equal(run(program, args), widened(*args))
