"""Abstract interpretation of an fx graph into expressions: ``interpret(node)``.

Each aten overload family has one small handler (``sources``, ``views``, ``elementwise``, ``sequences``); a
node without one, or whose handler gives up, is a Load of itself at its own indices. Nothing is evaluated, so
static and symbolic sizes are treated alike; the graph is only read. Only the part of the graph which handlers
understand is visited.

Assumption, as in the models themselves: index arithmetic neither overflows int32 nor leaves the integers
which float32 holds exactly (2**24). Narrower types are kept as tensors unless the result is a choice between
constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx
from torch.fx import Node

from regraft.ir.mask.constants import band_of_constant
from regraft.ir.mask.expression import (
    ZERO,
    Apply,
    Const,
    Expression,
    Load,
    Sum,
    build_sum,
    choices,
    const,
    index,
    load,
    size,
)
from regraft.ir.mask.logic import boolean, map_choices, number, substitute
from regraft.ir.mask.mutation import Mutations
from regraft.ir.nodes import size_equal

MAX_DEPTH = 64
MAX_WEIGHT = 2048


class Opaque(Exception):
    """Raised by a handler which cannot describe its node."""


Handler = Callable[["Reader"], Expression]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for every overload of the aten operators ``names``."""

    def register(handler: Handler) -> Handler:
        for name in names:
            assert name not in HANDLERS, name
            HANDLERS[name] = handler
        return handler

    return register


def size_expression(value: int | torch.SymInt) -> Expression:
    """A size as an expression; affine symbolic sizes become linear forms."""
    if isinstance(value, int):
        return const(value)
    expanded = value.node.expr.expand()
    constant = 0
    terms: dict[Expression, int | float] = {}
    for term, factor in expanded.as_coefficients_dict().items():
        if not factor.is_Integer:
            return size(str(expanded), positive=False)
        if term == 1:
            constant = int(factor)
        else:
            # A size symbol is declared positive by the exporter; a data-dependent one is not.
            terms[size(str(term), positive=bool(term.is_Symbol and term.is_positive))] = int(factor)
    return build_sum(constant, terms)


def same_size(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """Whether two sizes are provably equal, without adding a guard."""
    return size_expression(left) is size_expression(right) or size_equal(left, right)


def fake(node: Node) -> torch.Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def own_indices(node: Node) -> tuple[Expression, ...]:
    value = fake(node)
    assert value is not None
    rank = value.dim()
    return tuple(ZERO if _is_one(extent) else index(dim - rank) for dim, extent in enumerate(value.shape))


def _is_one(extent: int | torch.SymInt) -> bool:
    return isinstance(extent, int) and extent == 1


class Reader:
    """What a handler sees of its node: arguments by schema name, as expressions, shapes or plain values."""

    def __init__(self, interpreter: Interpreter, node: Node) -> None:
        self.interpreter = interpreter
        self.node = node
        value = fake(node)
        if value is None:
            raise Opaque
        self.value = value
        assert isinstance(node.target, torch._ops.OpOverload)
        self._arguments: dict[str, Any] = {}
        for position, argument in enumerate(node.target._schema.arguments):
            if position < len(node.args):
                self._arguments[argument.name] = node.args[position]
            elif argument.name in node.kwargs:
                self._arguments[argument.name] = node.kwargs[argument.name]
            elif argument.has_default_value():
                self._arguments[argument.name] = argument.default_value
        self.first = next(iter(self._arguments), "")

    def __contains__(self, name: str) -> bool:
        return self._arguments.get(name) is not None

    def raw(self, name: str) -> Any:
        return self._arguments.get(name)

    def tensor(self, name: str) -> torch.Tensor:
        value = fake(self.raw(name)) if isinstance(self.raw(name), Node) else None
        if value is None:
            raise Opaque
        return value

    def expression(self, name: str) -> Expression:
        return self.read(self.raw(name))

    def read(self, argument: object) -> Expression:
        """A tensor, symbolic number or plain number as an expression, its broadcasting to the output
        checked."""
        if isinstance(argument, (bool, int, float)):
            return const(argument)
        if isinstance(argument, torch.SymInt):
            return size_expression(argument)
        if not isinstance(argument, Node):
            raise Opaque
        value = argument.meta.get("val")
        if isinstance(value, (bool, int, float, torch.SymInt)):
            return size_expression(value) if isinstance(value, torch.SymInt) else const(value)
        return self.interpreter.read(self.node, argument)

    def elementwise(self, name: str) -> Expression:
        """As ``expression``, for an operand which broadcasts to the output."""
        argument = self.raw(name)
        operand = fake(argument) if isinstance(argument, Node) else None
        if operand is not None:
            for extent, target in zip(reversed(operand.shape), reversed(self.value.shape), strict=False):
                if not _is_one(extent) and not same_size(extent, target):
                    raise Opaque
        return self.read(argument)

    def integer(self, name: str) -> int:
        value = self.raw(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise Opaque
        return value


class Interpreter:
    """Interprets nodes of one graph, remembering results; share one for all masks of a graph.

    ``constants``: values of placeholders and attributes which never change (a causal buffer): a mask-like one
    is then read as the band it is.
    """

    def __init__(self, graph: torch.fx.Graph, constants: Mapping[Node, torch.Tensor] | None = None) -> None:
        self._constants = dict(constants or {})
        self._mutations = Mutations(graph)
        self._known: dict[Node, Expression] = {}
        self._witnesses: dict[Expression, list[Node]] = {}

    def expression(self, node: Node, reader: Node | None = None) -> Expression:
        """The value of ``node`` in its own indices, counted from the right, as ``reader`` sees it.

        Without a reader, a tensor which is written after its definition is opaque.
        """
        seen = self._mutations.reads(reader, node)
        if seen is None or (reader is None and seen is not node):
            opaque = load(node, own_indices(node))
            if node not in self.witnesses(opaque):
                self._witnesses.setdefault(opaque, []).append(node)
            return opaque
        self._visit(seen)
        return self._known[seen]

    def witnesses(self, expression: Expression) -> list[Node]:
        """The visited nodes whose value in their own indices is exactly ``expression``, oldest first."""
        return self._witnesses.get(expression, [])

    def read(self, reader: Node, tensor: Node) -> Expression:
        seen = self._mutations.reads(reader, tensor)
        if seen is None:
            raise Opaque
        expression = self._known[seen]
        if self._mutations.written(seen) and _loads_written(expression, self._mutations):
            raise Opaque  # the tensor may have changed by the time the mask is used
        return expression

    def _visit(self, root: Node) -> None:
        # An explicit stack: chains of thousands of nodes occur.
        stack = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if node in self._known:
                continue
            handler = _handler(node)
            if handler is None or ready:
                self._remember(node, self._evaluate(node, handler))
                continue
            stack.append((node, True))
            for operand in node.all_input_nodes:
                seen = self._mutations.reads(node, operand)
                if seen is not None and fake(seen) is not None:
                    stack.append((seen, False))

    def _evaluate(self, node: Node, handler: Handler | None) -> Expression:
        if fake(node) is None:
            return const(float("nan"))  # never read as a tensor
        known = self._constants.get(node)
        if known is not None:
            described = band_of_constant(known, own_indices(node))
            if described is not None:
                return described
        if handler is not None:
            try:
                reader = Reader(self, node)
                result = settle(handler(reader), reader.value.dtype)
                ones = {d - reader.value.dim(): ZERO for d, n in enumerate(reader.value.shape) if _is_one(n)}
                result = substitute(result, ones)
                if result.depth <= MAX_DEPTH and result.weight <= MAX_WEIGHT:
                    return result
            except Opaque:
                pass
        return load(node, own_indices(node))

    def _remember(self, node: Node, expression: Expression) -> None:
        self._known[node] = expression
        if fake(node) is not None:
            self._witnesses.setdefault(expression, []).append(node)


def interpret(node: Node) -> Expression:
    """The value of ``node`` as a function of its own indices, counted from the right (see ``expression``)."""
    return Interpreter(node.graph).expression(node)


def settle(expression: Expression, dtype: torch.dtype) -> Expression:
    """A handler's result in the dtype of its node, or Opaque where that dtype may not hold it exactly."""
    if dtype == torch.bool:
        return boolean(expression)
    expression = number(expression)
    values = choices(expression)
    if not dtype.is_floating_point:
        if dtype in (torch.int32, torch.int64):
            return expression
        if values is not None and all(0 <= value <= 127 for value in values):
            return expression
    elif values is not None:
        return map_choices(lambda value: float(torch.tensor(value, dtype=torch.float64).to(dtype)), expression)
    elif dtype in (torch.float32, torch.float64) or _one_rounding(expression):
        return expression
    raise Opaque


def _one_rounding(expression: Expression) -> bool:
    """Whether a narrow float result is a tensor, a choice, or one tensor plus choices: rounded as in the
    source."""
    match expression:
        case Load():
            return expression.dtype.is_floating_point
        case Apply(operator="where", arguments=(_, left, right)):
            return all(isinstance(side, Const) or _one_rounding(side) for side in (left, right))
        case Sum(constant=0, terms=terms) if len(terms) == 2:
            loads = [term for term, _ in terms if choices(term) is None]
            return all(factor == 1 for _, factor in terms) and len(loads) == 1 and isinstance(loads[0], Load)
    return False


def _handler(node: Node) -> Handler | None:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._schema.name.removeprefix("aten::")
    return HANDLERS.get(name) or (HANDLERS.get(name[:-1]) if name.endswith("_") and name[-2:] != "__" else None)


def _loads_written(expression: Expression, mutations: Mutations) -> bool:
    if isinstance(expression, Load) and mutations.written(expression.node):
        return True
    return any(_loads_written(operand, mutations) for operand in expression.operands)


# The handlers register themselves; they need the names above, hence at the end.
from regraft.ir.mask import elementwise, sequences, sources, views  # noqa: E402, F401
