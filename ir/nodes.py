"""Reading fx nodes, and building new ones that carry a fake value."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode

_UNKNOWN_SIZE = 8192  # torch's own estimate
#: Frames of PyTorch and of the capture are not the user's code.
INTERNAL = (str(Path(torch.__file__).parent), str(Path(__file__).parent))

#: Makers of tensors of one number, in the shape of another tensor or in one that is given beside it.
FILLED_LIKE = (
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.ones_like.default,
    torch.ops.aten.full_like.default,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.new_ones.default,
    torch.ops.aten.new_full.default,
)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


def tensor_value(node: fx.Node) -> torch.Tensor:
    """The fake tensor of a node that stands for one tensor; raises ``TypeError`` for any other node."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"node {node.name} does not stand for one tensor")
    return value


def is_tensor(node: Any) -> bool:
    """Whether ``node`` is an fx node that stands for one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def shape(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of a tensor node: ints, or ``torch.SymInt`` where symbolic. One that the model settled behind this node is
    an int, too."""
    return tuple([size if type(size) is int else _settled(size) for size in tensor_value(node).shape])


def _settled(size: Any) -> Any:
    known = _expression(size)
    return int(known) if known.is_Integer else size


def dtype(node: fx.Node) -> torch.dtype:
    """Element type of a tensor node."""
    return tensor_value(node).dtype


def rank(node: fx.Node) -> int:
    """Number of dimensions of a tensor node."""
    return tensor_value(node).dim()


def is_call(node: Any, targets: Iterable[Any]) -> bool:
    """Whether ``node`` calls one of ``targets``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_random(node: fx.Node) -> bool:
    """Whether a call draws its result anew each time, by the operator's tags: attention does where it drops out."""
    tagged = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return tagged and arguments(node).get("dropout_p") != 0


def has_effects(node: fx.Node) -> bool:
    """Whether a node stays though nothing reads it."""
    return node.is_impure(impure_random=False) or is_random(node)


def is_view(node: fx.Node) -> bool:
    """Whether a call may return memory of an operand, by its schema; a plain Python function never is one."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(result.alias_info is not None for result in node.target._schema.returns)


@functools.cache
def _schema_arguments(target: Any) -> tuple[tuple[str, Any, bool], ...]:
    return tuple((arg.name, arg.default_value, arg.has_default_value()) for arg in target._schema.arguments)


@functools.cache
def schema_defaults(target: Any) -> dict[str, Any]:
    """Default value of every argument of an operator that has one; a plain Python function has none."""
    if not isinstance(target, torch._ops.OpOverload):
        return {}
    return {name: default for name, default, has_default in _schema_arguments(target) if has_default}


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call by their schema names, with the schema's defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): arg for i, arg in enumerate(node.args)} | dict(node.kwargs)
    named: dict[str, Any] = {}
    for position, (name, default, has_default) in enumerate(_schema_arguments(node.target)):
        if position < len(node.args):
            named[name] = node.args[position]
        elif name in node.kwargs:
            named[name] = node.kwargs[name]
        elif has_default:
            named[name] = default
    return named


def user_line(node: fx.Node) -> str:
    """``file:line in function`` of the user's code that made this node; empty when it is not known."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    outside = [f for f in frames if not f["file"].startswith(INTERNAL)] or frames
    if not outside:
        return ""
    last = outside[-1]
    return f"{last['file']}:{last['line']} in {last['function']}"


def sizes_equal(left: Iterable[Any], right: Iterable[Any]) -> bool:
    """Whether two shapes are the same, symbol by symbol, without adding a guard to the shape environment."""
    left, right = tuple(left), tuple(right)
    return len(left) == len(right) and all(size_equal(a, b) for a, b in zip(left, right, strict=True))


def size_equal(left: Any, right: Any) -> bool:
    """Whether two sizes are provably equal, also by what the model itself asks of them; never guards on a symbol."""
    if isinstance(left, fx.Node):
        left = left.meta.get("val")
    if isinstance(right, fx.Node):
        right = right.meta.get("val")
    if isinstance(left, torch.SymInt) or isinstance(right, torch.SymInt):
        return bool(_expression(left) == _expression(right)) or _asked_equal(left, right)
    return bool(left == right)


def _asked_equal(left: Any, right: Any) -> bool:
    """Whether sizes that are spelled differently are equal by the conditions under which the program runs at all. What
    is asked of a symbol alone is its value already."""
    sizes = (left, right)
    if any(not isinstance(size, (int, torch.SymInt)) for size in sizes) or concrete(left) != concrete(right):
        return False
    if all(isinstance(size, int) or size.node.expr.is_Symbol for size in sizes):
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # sympy takes a moment to load

    return statically_known_true(left == right)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def concrete(size: Any) -> int:
    """The size as an int: a symbol's value in the example that the program was captured with; of a size that only the
    data tell, torch's estimate."""
    if isinstance(size, fx.Node):
        size = size.meta["val"]
    if not isinstance(size, torch.SymInt):
        return int(size)
    known = size.node.hint
    return _estimate(size) if known is None else int(known)


def _estimate(size: torch.SymInt) -> int:
    """What a size that only the data tell is taken for."""
    estimated = getattr(size.node.shape_env, "optimization_hint", None)  # of torch 2.12
    if estimated is not None:
        return int(estimated(size.node.expr))
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, _UNKNOWN_SIZE)))


def last_two_swapped(rank: int) -> list[int]:
    """The order of dims of a transposed matrix, with leading dims or without."""
    return [*range(rank - 2), rank - 1, rank - 2]


@dataclass
class Builder:
    """Inserts calls in front of ``before``; every new node carries its fake value.

    ``stamp`` makes the metadata of each new node (stack trace and provenance of what it replaces).
    """

    graph: fx.Graph
    before: fx.Node
    fake_mode: FakeTensorMode
    stamp: Callable[[], dict[str, Any]] = dict
    made: list[fx.Node] = field(default_factory=list)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new call of ``target``; raises whatever its fake kernel raises when the arguments do not fit."""
        values = fx.map_arg(args, _value_of), fx.map_arg(kwargs, _value_of)
        # Kernels of composite operators in C++ ask for sizes as numbers, which would fix a symbol: Python's do not.
        with self.fake_mode, torch.no_grad(), enable_python_dispatcher():
            result = target(*values[0], **values[1])
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {**self._stamped(), "val": result}
        self.made.append(node)
        return node

    def _stamped(self) -> dict[str, Any]:
        if not self.made:
            self._metadata = self.stamp()
        return self._metadata

    def size(self, node: fx.Node, dim: int) -> Any:
        """The size of ``node`` along ``dim``: an int, or a node that computes it where it is symbolic.

        A symbol that an input of the graph has is read there, and what the graph computes as a number is taken from
        there, so that ``node`` need not be kept for its size. ``node`` may be ``before``, which is not there yet.
        """
        size = shape(node)[dim]
        if not isinstance(size, torch.SymInt):
            return size
        held = _holders(self.graph).get(_expression(size))
        if held is None:
            number = self._number(size)
            if number is not None:
                return number
            held = self._operand_of_size(size) if node is self.before else (node, dim % rank(node))
        return self.call(torch.ops.aten.sym_size.int, *held)

    def _number(self, size: torch.SymInt) -> fx.Node | None:
        """A node in front of ``before`` that is ``size`` itself, where the graph has one."""
        node = self.before.prev
        while node.op != "root":
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and _expression(value) == _expression(size):
                return node
            node = node.prev
        return None

    def _operand_of_size(self, size: torch.SymInt) -> tuple[fx.Node, int]:
        """An operand of ``before`` and its dim of this size; raises ``ValueError`` where none has it."""
        for node in self.before.all_input_nodes:
            for dim, other in enumerate(shape(node) if is_tensor(node) else ()):
                if size_equal(size, other):
                    return node, dim
        raise ValueError(f"the size {size} of {self.before.name} is known only once that is computed")

    def sizes(self, node: fx.Node) -> list[Any]:
        """The shape of ``node`` as the argument of a reshape; one size that no input has is left as -1."""
        holders = _holders(self.graph)
        unknown = [isinstance(size, torch.SymInt) and _expression(size) not in holders for size in shape(node)]
        single = unknown.count(True) == 1
        return [-1 if single and odd else self.size(node, dim) for dim, odd in enumerate(unknown)]


_HOLDERS: WeakKeyDictionary[fx.Graph, dict[Any, tuple[fx.Node, int]]] = WeakKeyDictionary()


def _holders(graph: fx.Graph) -> dict[Any, tuple[fx.Node, int]]:
    """Symbolic size -> an input of the graph and its dim of that size; inputs never change."""
    known = _HOLDERS.get(graph)
    if known is None:
        known = _HOLDERS[graph] = {}
        for node in graph.nodes:
            if node.op != "placeholder":
                break
            for dim, size in enumerate(shape(node) if is_tensor(node) else ()):
                if isinstance(size, torch.SymInt):
                    known.setdefault(_expression(size), (node, dim))
    return known


def _value_of(node: fx.Node) -> Any:
    return node.meta["val"]
