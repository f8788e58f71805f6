"""Hypothesis strategies: random small programs over the canonical operators.

``canonical_programs()`` draws a :class:`Program` directly, without ``torch.export``, so that an example costs
milliseconds. Every graph is in canonical form (negative dims except in permute, numbers in the second
argument, reshapes without -1, …), has no dead nodes, and its values stay small, so that outputs can be
compared.

    @given(canonical_programs())
    def test_a_rewrite_keeps_the_outputs(program): ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils._pytree import tree_structure

from regraft.ir.program import Program
from regraft.ir.weights import WeightStore

aten = torch.ops.aten
_MAX_ELEMENTS = 512
_UNARY = (
    aten.gelu.default,
    aten.silu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.neg.default,
)
_BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor)
_NUMBER = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.rsub.Scalar)


@st.composite
def canonical_programs(
    draw: st.DrawFn,
    max_operators: int = 10,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    steps: Sequence[str] | None = None,
) -> Program:
    """A program of up to ``max_operators`` random steps on one or two inputs of rank 2 to 4.

    ``dtypes`` are the element types to draw the program's own from; ``steps`` restricts the kinds of step
    to names in ``STEPS``. Weights and example inputs come from a drawn seed, so that a failing example
    can be replayed.
    """
    growth = _Growth(draw, draw(st.sampled_from(list(dtypes))), draw(st.integers(0, 2**16)))
    for position in range(draw(st.integers(1, 2))):
        growth.user_input(f"x{position}", draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    names = list(STEPS if steps is None else steps)
    for _ in range(draw(st.integers(1, max_operators))):
        STEPS[draw(st.sampled_from(names))](growth)
    return growth.finish()


class _Growth:
    """A graph that steps add nodes to. ``pool`` holds the values that a step may read."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any], dtype: torch.dtype, seed: int) -> None:
        self.draw = draw
        self.dtype = dtype
        self.pool: list[fx.Node] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._graph = fx.Graph()
        self._mode = FakeTensorMode()
        self._weights: dict[str, Tensor] = {}
        self._inputs: list[InputSpec] = []
        self._example: list[Any] = []
        self._last_placeholder: fx.Node | None = None

    def user_input(self, name: str, shape: list[int]) -> None:
        """An input of the program, with a random example."""
        value = self._random(shape)
        self._example.append(value)
        self.pool.append(self._placeholder(name, value, InputKind.USER_INPUT, None))

    def weight(self, shape: list[int]) -> fx.Node:
        """A parameter: a new one, or (tied) one of the same shape that is there already."""
        same = [name for name, tensor in self._weights.items() if list(tensor.shape) == shape]
        tied = bool(same) and self.draw(st.booleans())
        value = self._weights[same[0]] if tied else self._random(shape)
        target = f"w{len(self._weights)}.weight"
        self._weights[target] = value
        return self._placeholder(f"p_w{len(self._weights) - 1}_weight", value, InputKind.PARAMETER, target)

    def pick(self, least_rank: int = 0) -> fx.Node | None:
        """A value of at least this rank; None when there is none."""
        fitting = [node for node in self.pool if len(shape(node)) >= least_rank]
        return self.draw(st.sampled_from(fitting)) if fitting else None

    def dim(self, node: fx.Node) -> int:
        """A negative dimension of ``node``."""
        return int(self.draw(st.integers(-len(shape(node)), -1)))

    def call(self, target: Any, *args: Any) -> None:
        """Add a call; results that would be large are left out."""
        values = fx.map_arg(args, lambda node: node.meta["val"])
        with self._mode, torch.no_grad():
            result = target(*values)
        if result.numel() <= _MAX_ELEMENTS:
            node = self._graph.call_function(target, args)
            node.meta["val"] = result
            self.pool.append(node)

    def finish(self) -> Program:
        """The program: every value that nothing reads is an output."""
        for placeholder in [n for n in self._graph.nodes if n.op == "placeholder" and n.name.startswith("p_")]:
            if not placeholder.users:
                self._drop(placeholder)
        results = [node for node in self.pool if not node.users and node.op == "call_function"]
        results = results or self.pool[-1:]
        self._graph.output(tuple(results))
        outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
        users = tuple(self._example)
        return Program(
            module=fx.GraphModule(torch.nn.Module(), self._graph),
            signature=ExportGraphSignature(self._inputs, outputs),
            weights=WeightStore(self._weights),
            in_spec=tree_structure((users, {})),
            out_spec=tree_structure(tuple(results)),
            example=self._example,
        )

    def _random(self, shape: list[int]) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.dtype)

    def _placeholder(self, name: str, value: Tensor, kind: InputKind, target: str | None) -> fx.Node:
        first = next(iter(self._graph.nodes), self._graph._root)
        place = self._last_placeholder
        with self._graph.inserting_before(first) if place is None else self._graph.inserting_after(place):
            node = self._graph.placeholder(name)
        self._last_placeholder = node
        node.meta["val"] = self._mode.from_tensor(value, static_shapes=True)
        self._inputs.append(InputSpec(kind, TensorArgument(node.name), target))
        return node

    def _drop(self, placeholder: fx.Node) -> None:
        (spec,) = (spec for spec in self._inputs if spec.arg.name == placeholder.name)
        self._inputs.remove(spec)
        del self._weights[str(spec.target)]
        self._graph.erase_node(placeholder)


def shape(node: fx.Node) -> list[int]:
    """Sizes of a node's value."""
    return [int(size) for size in node.meta["val"].shape]


def _unary(growth: _Growth) -> None:
    growth.call(growth.draw(st.sampled_from(_UNARY)), growth.pick())


def _number(growth: _Growth) -> None:
    number = growth.draw(st.sampled_from([0.5, 2.0, -1.5, 3]))
    growth.call(growth.draw(st.sampled_from(_NUMBER)), growth.pick(), number)


def _binary(growth: _Growth) -> None:
    left = growth.pick()
    assert left is not None
    fitting = [node for node in growth.pool if _broadcasts(shape(left), shape(node))]
    growth.call(growth.draw(st.sampled_from(_BINARY)), left, growth.draw(st.sampled_from(fitting)))


def _matmul(growth: _Growth) -> None:
    left = growth.pick(2)
    if left is None:
        return
    fitting = [
        node
        for node in growth.pool
        if len(shape(node)) >= 2
        and shape(node)[-2] == shape(left)[-1]
        and _broadcasts(shape(left)[:-2], shape(node)[:-2])
    ]
    if fitting:
        growth.call(aten.matmul.default, left, growth.draw(st.sampled_from(fitting)))


def _linear(growth: _Growth) -> None:
    x = growth.pick(1)
    if x is None:
        return
    out = growth.draw(st.integers(1, 4))
    bias = growth.weight([out]) if growth.draw(st.booleans()) else None
    growth.call(aten.linear.default, x, growth.weight([out, shape(x)[-1]]), bias)


def _layer_norm(growth: _Growth) -> None:
    x = growth.pick(1)
    if x is None:
        return
    width = shape(x)[-1]
    affine = [growth.weight([width]), growth.weight([width])] if growth.draw(st.booleans()) else [None, None]
    growth.call(aten.layer_norm.default, x, [width], *affine, 1e-5)


def _softmax(growth: _Growth) -> None:
    x = growth.pick(1)
    if x is not None:
        growth.call(aten.softmax.int, x, growth.dim(x))


def _mean(growth: _Growth) -> None:
    x = growth.pick(1)
    if x is not None:
        growth.call(aten.mean.dim, x, [growth.dim(x)], growth.draw(st.booleans()))


def _reshape(growth: _Growth) -> None:
    x = growth.pick()
    assert x is not None
    count = math.prod(shape(x))
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    first = growth.draw(st.sampled_from(divisors))
    growth.call(aten.reshape.default, x, growth.draw(st.sampled_from([[count], [first, count // first]])))


def _permute(growth: _Growth) -> None:
    x = growth.pick(2)
    if x is not None:
        growth.call(aten.permute.default, x, list(growth.draw(st.permutations(range(len(shape(x)))))))


def _unsqueeze(growth: _Growth) -> None:
    x = growth.pick()
    assert x is not None
    if len(shape(x)) < 4:
        growth.call(aten.unsqueeze.default, x, growth.draw(st.integers(-len(shape(x)) - 1, -1)))


def _slice(growth: _Growth) -> None:
    x = growth.pick(1)
    if x is None:
        return
    dim = growth.dim(x)
    start = growth.draw(st.integers(0, shape(x)[dim] - 1))
    growth.call(aten.slice.Tensor, x, dim, start, growth.draw(st.integers(start + 1, shape(x)[dim])))


def _select(growth: _Growth) -> None:
    x = growth.pick(2)
    if x is not None:
        dim = growth.dim(x)
        growth.call(aten.select.int, x, dim, growth.draw(st.integers(0, shape(x)[dim] - 1)))


def _cat(growth: _Growth) -> None:
    x = growth.pick(1)
    if x is None:
        return
    dim = growth.dim(x)
    fitting = [node for node in growth.pool if _without(shape(node), dim) == _without(shape(x), dim)]
    growth.call(aten.cat.default, [x, growth.draw(st.sampled_from(fitting))], dim)


def _square(growth: _Growth) -> None:
    """A square through a bounded function, so that chains of squares do not overflow."""
    growth.call(aten.tanh.default, growth.pick())
    growth.call(aten.pow.Tensor_Scalar, growth.pool[-1], 2)


#: Kind of step -> what adds it; a step that nothing in the pool fits adds nothing.
STEPS: dict[str, Callable[[_Growth], None]] = {
    "unary": _unary,
    "number": _number,
    "binary": _binary,
    "matmul": _matmul,
    "linear": _linear,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "mean": _mean,
    "reshape": _reshape,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "slice": _slice,
    "select": _select,
    "cat": _cat,
    "square": _square,
}


def _broadcasts(left: list[int], right: list[int]) -> bool:
    return all(a == b or 1 in (a, b) for a, b in zip(reversed(left), reversed(right), strict=False))


def _without(sizes: list[int], dim: int) -> list[int] | None:
    """Sizes with one dimension left out; None when there is no such dimension."""
    if len(sizes) < -dim:
        return None
    return [size for place, size in enumerate(sizes) if place != len(sizes) + dim]
