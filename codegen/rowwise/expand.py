"""A region's calls written out: a small graph of operators of one element, reductions, and moves of columns.

Operators that are more than that (norms, softmax, rotary embedding, gates) become the calls that their definitions
make, with the same types in between, so that a kernel rounds where they round.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.rowwise.operators import Kind, interleave, product, step_of
from regraft.codegen.rowwise.primitives import operator_word
from regraft.ir import ops
from regraft.ir.nodes import Builder, arguments, dtype, is_tensor, shape

aten = torch.ops.aten
Made = fx.Node | tuple[fx.Node, ...]


@dataclass
class Expansion:
    """``graph`` takes what the region reads, in the order of ``inputs``, and returns what is read of it elsewhere, in
    the order of ``outputs``."""

    graph: fx.Graph
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)


def expand(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], fake_mode: FakeTensorMode) -> Expansion:
    """The region of ``nodes``, in topological order, of which ``outputs`` are read outside."""
    return _Writer(fake_mode).region(nodes, outputs)


class _Writer:
    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self.made = Expansion(fx.Graph())
        self._end = self.made.graph.output(())
        self._first: fx.Node = self._end
        self._values: dict[fx.Node, Made] = {}
        self.build = Calls(self.made.graph, self._end, fake_mode)

    def region(self, nodes: Iterable[fx.Node], outputs: Sequence[fx.Node]) -> Expansion:
        for node in nodes:
            for name, operand in arguments(node).items():
                for part in operand if isinstance(operand, (tuple, list)) else (operand,):
                    if is_tensor(part) and part not in self._values:
                        self._values[part] = self._input(part, name)
            self._values[node] = self._write(node)
        self.made.outputs = list(outputs)
        self._end.args = (tuple(self._values[node] for node in outputs),)
        self.made.graph.eliminate_dead_code()
        return self.made

    def _input(self, node: fx.Node, argument: str) -> fx.Node:
        hint = "x" if argument in ("self", "input", "tensors", "0") else argument
        with self.made.graph.inserting_before(self._first):
            placeholder = self.made.graph.placeholder(hint)
        placeholder.meta = {"val": node.meta["val"]}
        self.made.inputs.append(node)
        return placeholder

    def _write(self, node: fx.Node) -> Made:
        given = {name: fx.map_arg(value, self._value) for name, value in arguments(node).items()}
        if node.target is operator.getitem:
            parts = self._values[node.args[0]]  # type: ignore[index]
            assert isinstance(parts, tuple)
            made: Made = parts[int(node.args[1])]  # type: ignore[arg-type]
        elif node.target in _DEFINITIONS:
            made = _DEFINITIONS[node.target](self.build, node, given)
        else:
            made = self._copy(node, given)
        if self._first is self._end:
            self._first = next(n for n in self.made.graph.nodes if n.op != "placeholder")
        return made

    def _copy(self, node: fx.Node, given: dict[str, Any]) -> fx.Node:
        step = step_of(node)
        if isinstance(step, str):
            raise Unfusable(step)
        if step.kind is Kind.RESHAPE:
            return _reshaped(self.build, given["self"], shape(node))
        if node.target is aten.expand.default:
            sizes = [size if isinstance(size, int) else -1 for size in shape(node)]
            return self.build.call(aten.expand.default, given["self"], sizes)
        args, kwargs = fx.map_arg(node.args, self._value), fx.map_arg(node.kwargs, self._value)
        with self.made.graph.inserting_before(self._end):
            word = operator_word(node.target) or None
            made = self.made.graph.create_node("call_function", node.target, args, kwargs, word)
        made.meta = {"val": node.meta["val"]}
        return made

    def _value(self, node: fx.Node) -> Any:
        """What stands for a node; sizes, which only moves of dims have, are read off shapes."""
        return self._values.get(node, -1)


class Calls(Builder):
    """Calls in a region's graph, by short words, and named by them."""

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new call, named by its operator."""
        made = super().call(target, *args, **kwargs)
        made._rename(operator_word(target) or _NAMES.get(target, "part"))
        return made

    def to(self, x: fx.Node, kind: torch.dtype) -> fx.Node:
        """``x`` in an element type; itself where it has it."""
        return x if dtype(x) == kind else self.call(aten.to.dtype, x, kind)

    def columns(self, x: fx.Node, start: int, end: int, step: int = 1) -> fx.Node:
        """Some columns; ``x`` itself where they are all."""
        if (start, step) == (0, 1) and end >= shape(x)[-1]:
            return x
        return self.call(aten.slice.Tensor, x, -1, start, end, step)

    def mean(self, x: fx.Node) -> fx.Node:
        """The mean of each row, as a column."""
        return self.call(aten.mean.dim, x, [-1], True)

    def activate(self, x: fx.Node, activation: str) -> fx.Node:
        """An activation by name (``ir/ops/activation.py``)."""
        if activation == "none":
            return x
        if activation == "relu_squared":
            return self.call(aten.pow.Tensor_Scalar, self.call(aten.relu.default, x), 2)
        if activation == "quick_gelu":
            return self.call(aten.mul.Tensor, x, self.call(aten.sigmoid.default, self.call(aten.mul.Tensor, x, 1.702)))
        if activation == "hardswish":
            opened = self.call(aten.clamp.default, self.call(aten.add.Tensor, x, 3.0), 0.0, 6.0)
            return self.call(aten.div.Tensor, self.call(aten.mul.Tensor, x, opened), 6.0)
        if activation == "gelu_tanh":
            return self.call(aten.gelu.default, x, approximate="tanh")
        return self.call(getattr(aten, activation).default, x)


#: What calls of our own are named, apart from the functions that emitted files define for them.
_NAMES = {interleave: "pairs", product: "total"}


def _reshaped(build: Calls, x: fx.Node, sizes: Sequence[Any]) -> fx.Node:
    """``x`` with other dims of size one."""
    ones = [dim for dim, size in enumerate(shape(x)) if isinstance(size, int) and size == 1]
    if ones:
        x = build.call(aten.squeeze.dims, x, ones)
    for dim, size in enumerate(sizes):
        if isinstance(size, int) and size == 1:
            x = build.call(aten.unsqueeze.default, x, dim)
    return x


def _wide(x: fx.Node) -> torch.dtype:
    return torch.promote_types(dtype(x), torch.float32)


def _rms(build: Calls, x: fx.Node, weight: fx.Node | None, eps: float, offset: float, cast: str) -> fx.Node:
    """``ir/ops/rms_norm.py``."""
    raised = build.to(x, _wide(x))
    square = build.mean(build.call(aten.pow.Tensor_Scalar, raised, 2))
    normed = build.call(
        aten.mul.Tensor, raised, build.call(aten.rsqrt.default, build.call(aten.add.Tensor, square, eps))
    )
    if weight is None:
        return build.to(normed, dtype(x))
    scale = weight if cast == "before_weight" else build.to(weight, _wide(x))
    scale = build.call(aten.add.Tensor, scale, offset) if offset else scale
    if cast == "before_weight":
        return build.call(aten.mul.Tensor, build.to(normed, dtype(x)), scale)
    return build.to(build.call(aten.mul.Tensor, normed, scale), dtype(x))


def _layer(build: Calls, x: fx.Node, weight: fx.Node | None, bias: fx.Node | None, eps: float) -> fx.Node:
    """Layer normalisation, in fp32 from the mean to the bias, as PyTorch's kernels do."""
    raised = build.to(x, _wide(x))
    centred = build.call(aten.sub.Tensor, raised, build.mean(raised))
    variance = build.mean(build.call(aten.pow.Tensor_Scalar, centred, 2))
    scale = build.call(aten.rsqrt.default, build.call(aten.add.Tensor, variance, eps))
    out = build.call(aten.mul.Tensor, centred, scale)
    if weight is not None:
        out = build.call(aten.mul.Tensor, out, build.to(weight, _wide(x)))
    if bias is not None:
        out = build.call(aten.add.Tensor, out, build.to(bias, _wide(x)))
    return build.to(out, dtype(x))


def _rms_norm(build: Calls, node: fx.Node, given: dict[str, Any]) -> Made:
    return _rms(build, given["x"], given["weight"], given["eps"], given["offset"], given["cast"])


def _layer_norm(build: Calls, node: fx.Node, given: dict[str, Any]) -> Made:
    return _layer(build, given["input"], given["weight"], given["bias"], given["eps"])


def _add_norm(build: Calls, node: fx.Node, given: dict[str, Any]) -> Made:
    total = build.call(aten.add.Tensor, given["x"], given["residual"])
    if given["kind"] == "layer_norm":
        return _layer(build, total, given["weight"], given["bias"], given["eps"]), total
    return _rms(build, total, given["weight"], given["eps"], given["offset"], given["cast"]), total


def _linear(build: Calls, node: fx.Node, given: dict[str, Any]) -> Made:
    """``ir/ops/linear.py``: the bias is added in fp32, before the sum is rounded."""
    x, weight, bias = (given.get(name) for name in ("x" if "x" in given else "input", "weight", "bias"))
    total = build.call(product, x, weight)
    if bias is not None:
        total = build.call(aten.add.Tensor, total, build.to(bias, torch.float32))
    out = build.activate(build.to(total, dtype(node)), given.get("activation", "none"))
    if given.get("multiplier") is not None:
        out = build.call(aten.mul.Tensor, out, given["multiplier"])
    return out if given.get("residual") is None else build.call(aten.add.Tensor, out, given["residual"])


def _glu(build: Calls, node: fx.Node, given: dict[str, Any]) -> Made:
    return build.call(aten.mul.Tensor, build.activate(given["gate"], given["activation"]), given["up"])


def _activation(build: Calls, node: fx.Node, given: dict[str, Any]) -> Made:
    return build.activate(given["x"], given["activation"])


def _rope(build: Calls, node: fx.Node, given: dict[str, Any]) -> Made:
    """Pairs of columns turned: the first and the second of each pair are apart, and joined again at the end."""
    x, width, layout = given["x"], given["rotary_dim"], given["layout"]
    half = width // 2
    halves = ((0, half, 1), (half, width, 1))
    pairs = ((0, width, 2), (1, width, 2))
    first, second = (build.columns(x, *place) for place in (halves if layout == "half" else pairs))
    tables = []
    for table in (given["cos"], given["sin"]):
        wide = shape(table)[-1] == width
        places = pairs if layout == "interleaved" else halves
        tables.append([build.columns(table, *place) if wide else table for place in places])
    cos, sin = tables

    def turned(one: fx.Node, other: fx.Node, place: int, target: Any) -> fx.Node:
        return build.call(
            target, build.call(aten.mul.Tensor, one, cos[place]), build.call(aten.mul.Tensor, other, sin[place])
        )

    parts = [turned(first, second, 0, aten.sub.Tensor), turned(second, first, 1, aten.add.Tensor)]
    if layout == "interleaved":
        parts = [build.call(interleave, *parts)]
    if width < shape(x)[-1]:
        parts.append(build.to(build.columns(x, width, shape(x)[-1]), dtype(parts[0])))
    return parts[0] if len(parts) == 1 else build.call(aten.cat.default, parts, -1)


def _softmax(build: Calls, node: fx.Node, given: dict[str, Any]) -> Made:
    raised = _input_of_softmax(build, node, given)
    shifted = build.call(aten.sub.Tensor, raised, build.call(aten.amax.default, raised, [-1], True))
    weights = build.call(aten.exp.default, shifted)
    total = build.call(aten.sum.dim_IntList, weights, [-1], True)
    return build.to(build.call(aten.div.Tensor, weights, total), dtype(node))


def _log_softmax(build: Calls, node: fx.Node, given: dict[str, Any]) -> Made:
    raised = _input_of_softmax(build, node, given)
    shifted = build.call(aten.sub.Tensor, raised, build.call(aten.amax.default, raised, [-1], True))
    total = build.call(aten.sum.dim_IntList, build.call(aten.exp.default, shifted), [-1], True)
    return build.to(build.call(aten.sub.Tensor, shifted, build.call(aten.log.default, total)), dtype(node))


def _input_of_softmax(build: Calls, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    x = given["self"]
    if given.get("dtype") is not None:
        x = build.to(x, given["dtype"])
    return build.to(x, _wide(x))


def _logsumexp(build: Calls, node: fx.Node, given: dict[str, Any]) -> Made:
    """Shifted by the maximum where that is finite."""
    raised = build.to(given["self"], _wide(given["self"]))
    top = build.call(aten.amax.default, raised, [-1], True)
    infinite = build.call(aten.eq.Scalar, build.call(aten.abs.default, top), math.inf)
    shift = build.call(aten.where.ScalarSelf, infinite, 0.0, top)
    total = build.call(
        aten.sum.dim_IntList, build.call(aten.exp.default, build.call(aten.sub.Tensor, raised, shift)), [-1], True
    )
    out = build.call(aten.add.Tensor, build.call(aten.log.default, total), shift)
    return _kept(build, build.to(out, dtype(node)), given["keepdim"])


def _vector_norm(build: Calls, node: fx.Node, given: dict[str, Any]) -> Made:
    raised = build.to(given["self"], _wide(given["self"]))
    total = build.call(aten.sum.dim_IntList, build.call(aten.pow.Tensor_Scalar, raised, 2), [-1], True)
    return _kept(build, build.to(build.call(aten.sqrt.default, total), dtype(node)), given["keepdim"])


def _variance(build: Calls, node: fx.Node, given: dict[str, Any]) -> Made:
    raised = build.to(given["self"], _wide(given["self"]))
    centred = build.call(aten.sub.Tensor, raised, build.mean(raised))
    total = build.call(aten.sum.dim_IntList, build.call(aten.pow.Tensor_Scalar, centred, 2), [-1], True)
    correction = int(given["unbiased"]) if "unbiased" in given else given["correction"]
    correction = 1 if correction is None else correction
    left = shape(given["self"])[-1] - correction
    out = build.call(aten.div.Tensor, total, float(max(0, left)))
    return _kept(build, build.to(out, dtype(node)), given["keepdim"])


def _kept(build: Calls, column: fx.Node, keepdim: bool) -> fx.Node:
    return column if keepdim else build.call(aten.squeeze.dims, column, [-1])


#: How operators that are more than one primitive are written out.
_DEFINITIONS: dict[Any, Callable[[Calls, fx.Node, dict[str, Any]], Made]] = {
    ops.rms_norm: _rms_norm,
    ops.add_norm: _add_norm,
    ops.rope: _rope,
    ops.glu: _glu,
    ops.activation: _activation,
    ops.linear: _linear,
    aten.linear.default: _linear,
    aten.layer_norm.default: _layer_norm,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.log_softmax.int: _log_softmax,
    aten._log_softmax.default: _log_softmax,
    aten.logsumexp.default: _logsumexp,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.var.correction: _variance,
    aten.var.dim: _variance,
}


def run(made: Expansion, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The region's outputs by its small graph, operator by operator."""
    result: tuple[Tensor, ...] = fx.Interpreter(fx.GraphModule(torch.nn.Module(), made.graph)).run(*inputs)
    return result
