"""Recognise an unrolled recurrence: states that are stacked, each ``decay * the one before + something``.

A loop over time is captured as a few small calls for each step. What a step adds and decays by is read at its own place
of tensors that hold all steps; it is computed for all steps at once, and one operator runs the recurrence. So is the
smoothing of H-Net (arXiv:2507.07955), and any exponential moving average or gated linear recurrence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir import ops
from regraft.ir.nodes import Builder, arguments, dtype, is_call, is_tensor, rank, shape, size_equal
from regraft.ir.pattern import Call
from regraft.ir.pointwise import is_pointwise
from regraft.ir.rule import Example, Match, Replacement, Requirement, Rule, need
from regraft.passes.refused import Refused

aten = torch.ops.aten
_FEWEST, _NEAR = 4, 5  # states of a loop; calls between one and the next
#: Writes what a step computes for all steps at once, ``[batch, steps, ...]``.
Writer = Callable[[Builder], fx.Node]


def _average(p: Tensor, x: Tensor) -> Tensor:
    state, states = x[:, 0], [x[:, 0]]
    for step in range(1, x.shape[1]):
        state = p[:, step : step + 1] * x[:, step] + (1 - p[:, step : step + 1]) * state
        states.append(state)
    return torch.stack(states, dim=1)


def _gated(gate: Tensor, x: Tensor) -> Tensor:
    state, states = torch.zeros_like(x[:, 0]), []
    for step in range(x.shape[1]):
        state = torch.sigmoid(gate[:, step]) * state + x[:, step].tanh()
        states.append(state)
    return torch.stack(states, dim=1)


def _with_a_step_read(p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    state, states = x[:, 0], [x[:, 0]]
    for step in range(1, x.shape[1]):
        state = p[:, step, None] * state + x[:, step]
        states.append(state)
    return torch.stack(states, dim=1), states[2] * 2


def _curved(p: Tensor, x: Tensor) -> Tensor:
    state, states = x[:, 0], [x[:, 0]]
    for step in range(1, x.shape[1]):
        state = p[:, step, None] * state.tanh() + x[:, step]
        states.append(state)
    return torch.stack(states, dim=1)


def _skipping(p: Tensor, x: Tensor) -> Tensor:
    state, states = x[:, 0], [x[:, 0]]
    for step in range(1, 6):
        state = p[:, step, None] * state + x[:, step if step != 3 else 7]
        states.append(state)
    return torch.stack(states, dim=1)


def _given(function: Any, wide: bool = False) -> Any:
    def make() -> Any:
        generator = torch.Generator().manual_seed(0)
        first = torch.rand((2, 8, 6) if wide else (2, 8), generator=generator)
        return function, (first, torch.randn(2, 8, 6, generator=generator))

    return make


class RecognizeLinearScan(Rule):
    """stack([h_0, a_1 h_0 + b_1, a_2 h_1 + b_2, ...], 1)."""

    recognizes = "linear_scan"
    examples = (
        Example("a moving average", _given(_average)),
        Example("gates of each feature, from zero", _given(_gated, wide=True)),
    )
    near_misses = (
        Example("a step is read", _given(_with_a_step_read), "a state is read elsewhere"),
        Example("a state goes through a function", _given(_curved), "the states are no linear recurrence"),
        Example("a place is left out", _given(_skipping), "a step does not read its own place"),
    )

    def pattern(self) -> Any:
        return Call((aten.stack.default,), loose=True)

    def check(self, match: Match) -> Iterator[Requirement]:
        root = match.root
        states = arguments(root)["tensors"]
        if len(states) < _FEWEST or not _reads(states[-1], states[-2], _NEAR):
            return  # tensors beside each other, no loop
        along = arguments(root)["dim"] % rank(root) == 1
        yield need(along and rank(root) == 3, "the states are not stacked as batch, time and features", at=root)
        inner = set(states)
        readers = {user for state in states[1:] for user in state.users if user is not root}
        try:
            steps = [_read(before, after) for before, after in pairwise(states)]
            inside = {node for before, product, _, _ in steps for node in (before, product)} | inner
            yield need(readers <= inside, "a state is read elsewhere", at=next(iter(readers - inside), root))
            decay = _lift([step[2] for step in steps])
            added = _lift([step[3] for step in steps])
        except Refused as refused:
            yield need(False, refused.reason, at=refused.node)
            return
        yield need(_fit(root, steps), "what a step reads is shared between samples", at=root)
        types = {dtype(node) for step in steps for node in step}
        yield need(types == {dtype(states[0])}, "the states change their type", at=root)
        match.facts["parts"] = decay, added, states[0]

    def replace(self, match: Match, build: Builder) -> Replacement:
        if "parts" not in match.facts:
            return None
        decay, added, start = match.facts["parts"]
        return build.call(ops.linear_scan, decay(build), added(build), start)


def _reads(node: Any, wanted: Any, depth: int) -> bool:
    """Whether ``node`` is computed from ``wanted`` in a few calls."""
    if node is wanted or not depth:
        return node is wanted
    return any(_reads(source, wanted, depth - 1) for source in node.all_input_nodes)


def _read(before: fx.Node, after: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
    """The state before, its product with the decay, the decay, and what is added. Raises ``Refused``."""
    if is_call(after, (aten.add.Tensor,)) and arguments(after)["alpha"] == 1:
        for product, added in (after.args[:2], after.args[1::-1]):
            if is_call(product, (aten.mul.Tensor,)) and before in product.args and is_tensor(added):  # type: ignore[union-attr]
                factors = [factor for factor in product.args[:2] if factor is not before]  # type: ignore[union-attr]
                if len(factors) == 1 and is_tensor(factors[0]):
                    return before, product, factors[0], added  # type: ignore[return-value]
    raise Refused("the states are no linear recurrence", after)


def _fit(root: fx.Node, steps: Sequence[tuple[fx.Node, fx.Node, fx.Node, fx.Node]]) -> bool:
    """Whether each step adds ``[batch, width]`` and decays by as much, or by one number a sample."""
    batch, _, width = shape(root)
    sizes = [(shape(decay), shape(added)) for _, _, decay, added in steps]
    return all(
        len(own) == len(term) == 2
        and size_equal(own[0], batch)
        and size_equal(term[0], batch)
        and size_equal(term[1], width)
        and (size_equal(own[1], 1) or size_equal(own[1], width))
        for own, term in sizes
    )


def _lift(nodes: Sequence[Any]) -> Writer:
    """What computes ``nodes``, one for each step, all at once: time is dim 1, right behind the batch. Raises
    ``Refused``."""
    first = nodes[0]
    if is_call(first, (aten.select.int, aten.slice.Tensor)):
        return _lift_place(nodes)
    alike = all(is_tensor(node) and node.op == "call_function" and node.target is first.target for node in nodes)
    if not alike:
        raise Refused("the steps do not compute the same", first)
    if is_call(first, (aten.unsqueeze.default,)) and all(node.args[1] == -1 for node in nodes):
        inner = _lift([node.args[0] for node in nodes])
        return lambda build: build.call(aten.unsqueeze.default, inner(build), -1)
    if not is_pointwise(first) or len({rank(source) for node in nodes for source in node.all_input_nodes}) != 1:
        raise Refused("a step is more than element-wise", first)
    return _lift_call(nodes)


def _lift_call(nodes: Sequence[fx.Node]) -> Writer:
    """A call element by element, whose other arguments are the same in every step."""
    first = nodes[0]
    parts: list[Any] = []
    for place, argument in enumerate(first.args):
        given = [node.args[place] if len(node.args) == len(first.args) else None for node in nodes]
        if isinstance(argument, fx.Node):
            if not all(isinstance(item, fx.Node) for item in given):
                raise Refused("the steps do not compute the same", first)
            parts.append(_lift(given))
        elif any(item != argument for item in given):
            raise Refused("the steps do not compute the same", first)
        else:
            parts.append(argument)
    if any(node.kwargs for node in nodes):
        raise Refused("the steps do not compute the same", first)
    target: Any = first.target
    return lambda build: build.call(target, *(part(build) if callable(part) else part for part in parts))


def _lift_place(nodes: Sequence[fx.Node]) -> Writer:
    """Places of one tensor, one after the other, along its dim 1."""
    source, start = nodes[0].args[0], _place(nodes[0])
    for step, node in enumerate(nodes):
        same = node.target is nodes[0].target and node.args[0] is source
        if not same or start is None or _place(node) != start + step:
            raise Refused("a step does not read its own place", node)
    one = is_call(nodes[0], (aten.slice.Tensor,))  # of [batch, time]: a dim of one stays
    begin: int = start  # type: ignore[assignment]

    def write(build: Builder) -> fx.Node:
        found = build.call(aten.slice.Tensor, source, 1 - rank(source), begin, begin + len(nodes))  # type: ignore[arg-type]
        return build.call(aten.unsqueeze.default, found, -1) if one else found

    return write


def _place(node: fx.Node) -> int | None:
    """Which place along dim 1 is read; None for another read."""
    if not is_call(node, (aten.select.int, aten.slice.Tensor)):
        return None
    given = arguments(node)
    source: Any = given["self"]
    if given["dim"] % rank(source) != 1:
        return None
    if node.target is aten.select.int:
        place = given["index"]
        return place if isinstance(place, int) and place >= 0 else None
    narrow = rank(source) == 2 and given["step"] == 1 and size_equal(shape(node)[1], 1)
    return given["start"] if narrow and isinstance(given["start"], int) and given["start"] >= 0 else None
