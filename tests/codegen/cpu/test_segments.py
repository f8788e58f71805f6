"""Native calls made in one go: what they give, whose memory it lies in, and what is left to single calls."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from regraft.codegen.cpu.calls import function_of
from regraft.codegen.cpu.native_operators import (
    add_norm_native,
    attend_native,
    norm_native,
    rope_native,
    silu_glu_native,
)
from regraft.codegen.cpu.segments import Segment
from tests.codegen.cpu.support import needs_native
from tests.ir.graphs import numbers

pytestmark = needs_native
aten = torch.ops.aten
EPS = (1e-5, 0.0, True)


def module_of(build: Callable[[fx.Graph], Any], **attributes: Tensor) -> fx.GraphModule:
    """A lowered graph whose nodes ``build`` writes."""
    graph, root = fx.Graph(), nn.Module()
    for name, value in attributes.items():
        root.register_buffer(name, value)
    graph.output(build(graph))
    return fx.GraphModule(root, graph)


def segments_of(function: Callable[..., Any]) -> list[Segment]:
    """The segments that a function made from a lowered graph holds."""
    return [value for value in function.args if isinstance(value, Segment)]  # type: ignore[attr-defined]


def tapes_of(function: Callable[..., Any]) -> list[bool]:
    """For each thing a segment was recorded for: whether that worked."""
    return [tape is not None for segment in segments_of(function) for tape in segment._tapes.values()]


def block(graph: fx.Graph) -> Any:
    """Norm, attention on three views of it, the sum with the input and its norm; two results."""
    x = graph.placeholder("x")
    call = graph.call_function
    weight = graph.get_attr("weight")
    normed = call(norm_native, (x, weight, None, *EPS))
    heads = call(aten.permute.default, (call(aten.reshape.default, (normed, [2, 5, 4, 6])), [0, 2, 1, 3]))
    mixed = call(attend_native, (heads, heads, heads, None, None, None, 0.4, 0.0, None, None, "nan"))
    flat = call(aten.reshape.default, (call(aten.permute.default, (mixed, [0, 2, 1, 3])), [2, 5, 24]))
    pair = call(add_norm_native, (flat, x, None, None, *EPS))
    return call(operator.getitem, (pair, 0)), call(operator.getitem, (pair, 1))


def test_a_run_of_calls_is_one_segment_and_gives_what_the_calls_give() -> None:
    module = module_of(block, weight=numbers(24, seed=1))
    fast = function_of(module)
    for seed in (2, 3):
        x = numbers(2, 5, 24, seed=seed)
        kept = x.clone()
        for given_now, wanted in zip(fast(x), module(x), strict=True):
            assert torch.equal(given_now, wanted)
        assert torch.equal(x, kept)
    assert len(segments_of(fast)) == 1 and tapes_of(fast) == [True]


def test_other_strides_and_sizes_are_recorded_when_they_come_again() -> None:
    module = module_of(block, weight=numbers(24, seed=1))
    fast = function_of(module)
    wide = numbers(2, 5, 40, seed=2)
    forms = (numbers(2, 5, 24), wide[..., 7:31], wide[..., 8:32], numbers(5, 2, 24).transpose(0, 1))
    for recorded in (1, 4, 4):
        for x in forms:
            for given_now, wanted in zip(fast(x), module(x), strict=True):
                assert torch.equal(given_now, wanted)
        assert len(tapes_of(fast)) == recorded


def test_results_of_two_calls_do_not_share_memory() -> None:
    fast = function_of(module_of(block, weight=torch.ones(24)))
    held = fast(numbers(2, 5, 24))
    first = [result.clone() for result in held]
    fast(numbers(2, 5, 24, seed=9))
    assert all(torch.equal(a, b) for a, b in zip(held, first, strict=True))


def test_threads_do_not_disturb_each_other() -> None:
    module = module_of(block, weight=torch.ones(24))
    fast = function_of(module)
    inputs = [numbers(2, 5, 24, seed=seed) for seed in range(4)]
    wanted = [module(x)[0] for x in inputs]
    wrong: list[int] = []

    def repeat(number: int) -> None:
        for _ in range(50):
            if not torch.equal(fast(inputs[number])[0], wanted[number]):
                wrong.append(number)

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_result_may_be_a_view_of_what_a_call_makes_or_of_an_input() -> None:
    def build(graph: fx.Graph) -> Any:
        x = graph.placeholder("x")
        call = graph.call_function
        turned = call(aten.transpose.int, (x, 0, 1))
        normed = call(norm_native, (turned, None, None, *EPS))
        part = call(aten.slice.Tensor, (normed, 0, 1, 3))
        return part, call(norm_native, (part, None, None, *EPS)), call(aten.neg.default, (turned,))

    module = module_of(build)
    fast = function_of(module)
    x = numbers(4, 5, 6)[:, 1:]
    for given_now, wanted in zip(fast(x), module(x), strict=True):
        assert torch.equal(given_now, wanted)


def test_what_has_to_be_copied_first_runs_call_by_call() -> None:
    def build(graph: fx.Graph) -> Any:
        x = graph.placeholder("x")
        normed = graph.call_function(norm_native, (x, None, None, *EPS))
        turned = graph.call_function(aten.permute.default, (normed, [1, 0]))
        return (graph.call_function(norm_native, (turned, None, None, *EPS)),)

    module = module_of(build)
    fast = function_of(module)
    x = numbers(4, 6)
    assert torch.equal(fast(x)[0], module(x)[0])
    assert tapes_of(fast) == [False]


def test_an_operand_may_be_missing_in_one_call_and_there_in_the_next() -> None:
    def build(graph: fx.Graph) -> Any:
        x, mask = graph.placeholder("x"), graph.placeholder("mask")
        mixed = graph.call_function(attend_native, (x, x, x, mask, None, None, 0.4, 0.0, None, None, "nan"))
        rows = graph.call_function(aten.permute.default, (mixed, [0, 2, 1, 3]))  # as they lie in memory
        return (graph.call_function(norm_native, (rows, None, None, *EPS)),)

    module = module_of(build)
    fast = function_of(module)
    x, mask = numbers(2, 3, 5, 6), torch.zeros(2, 1, 1, 5)
    mask[1, ..., 3:] = -torch.inf
    for given_mask in (None, mask, None, mask):
        assert torch.equal(fast(x, given_mask)[0], module(x, given_mask)[0])
    assert tapes_of(fast) == [True, True]


def test_other_calls_part_a_run_and_keep_their_order() -> None:
    def build(graph: fx.Graph) -> Any:
        x = graph.placeholder("x")
        call = graph.call_function
        first = call(norm_native, (call(norm_native, (x, None, None, *EPS)), None, None, *EPS))
        written = call(aten.mul_.Tensor, (call(aten.clone.default, (first,)), 2.0))
        last = call(norm_native, (call(silu_glu_native, (first, written)), None, None, *EPS))
        return last, written

    module = module_of(build)
    fast = function_of(module)
    x = numbers(3, 8)
    for given_now, wanted in zip(fast(x), module(x), strict=True):
        assert torch.equal(given_now, wanted)
    assert len(segments_of(fast)) == 2


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["norm", "glu", "add", "rope", "view", "flip"]), st.integers(0, 30), st.integers(0, 30)
        ),
        min_size=2,
        max_size=14,
    ),
    returned=st.lists(st.integers(0, 30), min_size=1, max_size=3),
)
def test_any_sequence_of_calls(steps: list[tuple[str, int, int]], returned: list[int]) -> None:
    def build(graph: fx.Graph) -> Any:
        values = [graph.placeholder("x"), graph.placeholder("y")]
        call = graph.call_function
        for kind, one, other in steps:
            x, y = values[one % len(values)], values[other % len(values)]
            if kind == "norm":
                values.append(call(norm_native, (x, None, None, *EPS)))
            elif kind == "glu":
                values.append(call(silu_glu_native, (x, y)))
            elif kind == "rope":
                values.append(call(rope_native, (x, y, x, 8)))
            elif kind == "view":
                values.append(
                    call(aten.flip.default if one % 2 else aten.alias.default, (x, *([[0]] if one % 2 else [])))
                )
            else:
                pair = call(add_norm_native, (x, y, None, None, *EPS))
                values += [call(operator.getitem, (pair, 0)), call(operator.getitem, (pair, 1))]
        return tuple(values[place % len(values)] for place in returned)

    module = module_of(build)
    inputs = numbers(2, 3, 4, 8), numbers(2, 3, 4, 8, seed=1)
    for given_now, wanted in zip(function_of(module)(*inputs), module(*inputs), strict=True):
        assert torch.equal(given_now, wanted)
