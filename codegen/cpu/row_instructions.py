"""Calls of one row as instructions of a row program (``native/fused.cpp``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from regraft.codegen.cpu.native.fused import Instruction
from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.rowwise.primitives import REDUCTIONS, is_copy, operator_word
from regraft.ir import ops
from regraft.ir.nodes import dtype, is_tensor, shape

aten = torch.ops.aten

_UNARY = frozenset(
    ("neg", "abs", "reciprocal", "sqrt", "rsqrt", "floor", "ceil", "exp", "log", "sin", "cos", "erf", "tanh", "sigmoid",
     "relu", "silu", "expm1", "log1p")
)  # fmt: skip
_BINARY = frozenset(("mul", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge"))
_TURNED = {"eq": "eq", "ne": "ne", "lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
_LOGICAL = {"and": "and", "or": "or", "xor": "xor"}
MOVES = frozenset(("permute", "transpose", "reshape", "view", "unsqueeze", "squeeze", "expand"))
_PARTS = frozenset(("slice", "cat", "repeat_interleave", "softmax", "_softmax", "log_softmax", "_log_softmax"))
_EXPANDED = frozenset(("logsumexp", "linalg_vector_norm", "var", "cosine_similarity"))
_OWN_KERNELS = (ops.rms_norm, ops.add_norm, ops.rope, ops.glu, ops.linear, aten.layer_norm.default)


def refuse(node: fx.Node) -> str | None:
    """Why a call that works on rows is in no row program; None where it may be."""
    if node.target in _OWN_KERNELS or not is_tensor(node):
        return f"{node.name} has a kernel of its own"
    tensors = (node, *(source for source in node.all_input_nodes if is_tensor(source)))
    if any(dtype(tensor) not in (torch.float32, torch.bool) for tensor in tensors):
        return f"{node.name} does not work in fp32"
    word = operator_word(node.target)
    known = word in WRITERS or word in MOVES or word in _PARTS or word in _EXPANDED or is_copy(node)
    if not known and node.target is not ops.activation:
        return f"{node.name} has no row instruction"
    if dtype(node) == torch.bool and word in ("add", "mul", "sub"):
        return f"{node.name} computes with truth values"
    return None


class Emitter(ABC):
    """What writes a program: values of a graph become registers."""

    code: list[Instruction]

    @abstractmethod
    def width_of(self, node: fx.Node) -> int:
        """The columns of a value; one where it has none."""

    @abstractmethod
    def emit(self, word: str, width: int, **fields: Any) -> int:
        """An instruction whose result is a new register."""

    @abstractmethod
    def value(self, node: fx.Node, operand: Any, width: int | None = None) -> int:
        """The register of an operand of ``node`` that is ``width`` columns wide, as ``node`` is by default."""

    def binary(self, node: fx.Node, word: str, left: Any, right: Any) -> int:
        """An instruction of two operands, the second of which may be a number."""
        width = self.width_of(node)
        first = self.value(node, left)
        if isinstance(right, fx.Node):
            return self.emit(word, width, a=first, b=self.value(node, right))
        return self.emit(word, width, a=first, number=float(right))

    def where(self, node: fx.Node, condition: Any, left: Any, right: Any) -> int:
        """Elements of ``left`` where the condition holds, else of ``right``."""
        parts = [self.value(node, part) for part in (condition, left, right)]
        return self.emit("where", self.width_of(node), a=parts[0], b=parts[1], c=parts[2])


Write = Callable[[Emitter, fx.Node, dict[str, Any]], int]


def _unary(word: str) -> Write:
    return lambda c, node, given: c.emit(word, c.width_of(node), a=c.value(node, given["self"]))


def _binary(word: str) -> Write:
    def write(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
        left, right = given["self"], given["other"]
        if not isinstance(left, fx.Node) and word in _TURNED:
            return c.binary(node, _TURNED[word], right, left)
        return c.binary(node, word, left, right)

    return write


def _sum(word: str, turned: bool = False) -> Write:
    def write(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
        left, right = given["self"], given["other"]
        alpha = given.get("alpha", 1)
        if alpha != 1:
            scaled = left if turned else right
            if not isinstance(scaled, fx.Node):
                return c.binary(node, word, *((right, scaled * alpha) if turned else (left, scaled * alpha)))
            register = c.emit("mul", c.width_of(node), a=c.value(node, scaled), number=float(alpha))
            return c.emit(word, c.width_of(node), a=c.value(node, right if turned else left), b=register)
        return c.binary(node, word, *((right, left) if turned else (left, right)))

    return write


def _div(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
    if given.get("rounding_mode") is not None:
        raise Unfusable(f"{node.name} rounds")
    return c.binary(node, "div", given["self"], given["other"])


def _gelu(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
    return _unary("gelu_tanh" if given["approximate"] == "tanh" else "gelu")(c, node, given)


def _square(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
    x = c.value(node, given["self"])
    return c.emit("mul", c.width_of(node), a=x, b=x)


def _power(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
    width, exponent = c.width_of(node), given["exponent"]
    x = c.value(node, given["self"])
    if exponent in (2, 3, 4):
        square = c.emit("mul", width, a=x, b=x)
        return square if exponent == 2 else c.emit("mul", width, a=square, b=square if exponent == 4 else x)
    words = {0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal", 1: "copy"}
    if exponent not in words:
        raise Unfusable(f"{node.name} raises to {exponent}")
    return c.emit(words[exponent], width, a=x)


def _clamp(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
    width, x = c.width_of(node), c.value(node, given["self"])
    for word, names in (("maximum", ("min", "min_val")), ("minimum", ("max", "max_val"))):
        bound = next((given[name] for name in names if given.get(name) is not None), None)
        if isinstance(bound, fx.Node):
            x = c.emit(word, width, a=x, b=c.value(node, bound))
        elif bound is not None:
            x = c.emit(word, width, a=x, number=float(bound))
    return x


def _leaky(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
    width, x = c.width_of(node), c.value(node, given["self"])
    condition = c.emit("gt", width, a=x, number=0.0)
    below = c.emit("mul", width, a=x, number=float(given["negative_slope"]))
    return c.emit("where", width, a=condition, b=x, c=below)


def _elu(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
    width, x = c.width_of(node), c.value(node, given["self"])
    condition = c.emit("gt", width, a=x, number=0.0)
    above = c.emit("mul", width, a=x, number=float(given["scale"]))
    power = c.emit("expm1", width, a=c.emit("mul", width, a=x, number=float(given["input_scale"])))
    below = c.emit("mul", width, a=power, number=float(given["alpha"] * given["scale"]))
    return c.emit("where", width, a=condition, b=above, c=below)


def _softplus(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
    width, x, beta = c.width_of(node), c.value(node, given["self"]), float(given["beta"])
    scaled = c.emit("mul", width, a=x, number=beta)
    condition = c.emit("gt", width, a=scaled, number=float(given["threshold"]))
    log = c.emit("log1p", width, a=c.emit("exp", width, a=scaled))
    return c.emit("where", width, a=condition, b=x, c=c.emit("div", width, a=log, number=beta))


def _not(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
    return c.emit("not", c.width_of(node), a=c.value(node, given["self"]))


def _isnan(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
    x = c.value(node, given["self"])
    return c.emit("ne", c.width_of(node), a=x, b=x)


def _masked_fill(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
    return c.where(node, given["mask"], given["value"], given["self"])


def _where(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
    return c.where(node, given["condition"], given["self"], given["other"])


def _reduction(word: str) -> Write:
    def write(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
        x = given["self"]
        width = int(shape(x)[-1])
        return c.emit(word, 1, a=c.value(node, x, width), from_width=width)

    return write


def _move(c: Emitter, node: fx.Node, pieces: Iterable[tuple[int, int, dict[str, int]]]) -> int:
    """A register filled piece by piece: each a register, its columns, and where they go."""
    width, made = c.width_of(node), -1
    for source, columns, fields in pieces:
        if made < 0:
            made = c.emit("move", width, a=source, columns=columns, **fields)
        else:
            c.code.append(Instruction("move", to=made, a=source, columns=columns, width=width, **fields))
    return made


def _slice(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
    columns, width = int(shape(given["self"])[-1]), c.width_of(node)
    first, step = given["start"] or 0, given["step"]
    first = max(0, first + columns if first < 0 else first)
    if shape(node)[-1] == 1:
        raise Unfusable(f"{node.name} is a single column")
    source = c.value(node, given["self"], columns)
    return _move(c, node, [(source, columns, {"from_width": width, "first": first, "step": step})])


def _cat(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
    pieces, at = [], 0
    for piece in given["tensors"]:
        columns = int(shape(piece)[-1])
        pieces.append((c.value(node, piece, columns), columns, {"from_width": columns, "at": at}))
        at += columns
    return _move(c, node, pieces)


def _repeat(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
    return _alternate(c, node, given["self"], given["self"])


def _interleave(c: Emitter, node: fx.Node, given: dict[str, Any]) -> int:
    return _alternate(c, node, given["0"], given["1"])


def _alternate(c: Emitter, node: fx.Node, *sources: fx.Node) -> int:
    columns = int(shape(sources[0])[-1])
    fields = [{"from_width": columns, "at": place, "to_step": 2} for place in range(2)]
    held = [c.value(node, source, columns) for source in sources]
    return _move(c, node, [(register, columns, field) for register, field in zip(held, fields, strict=True)])


WRITERS: dict[str, Write] = {
    **{word: _unary(word) for word in _UNARY},
    **{word: _binary(word) for word in _BINARY},
    **{word: _reduction(word) for word in REDUCTIONS},
    **{f"logical_{word}": _binary(name) for word, name in _LOGICAL.items()},
    **{f"bitwise_{word}": _binary(name) for word, name in _LOGICAL.items()},
    "logical_not": _not,
    "bitwise_not": _not,
    "isnan": _isnan,
    "add": _sum("add"),
    "sub": _sum("sub"),
    "rsub": _sum("sub", turned=True),
    "div": _div,
    "gelu": _gelu,
    "square": _square,
    "pow": _power,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "hardtanh": _clamp,
    "leaky_relu": _leaky,
    "elu": _elu,
    "softplus": _softplus,
    "masked_fill": _masked_fill,
    "where": _where,
    "slice": _slice,
    "cat": _cat,
    "repeat_interleave": _repeat,
    "interleave": _interleave,
}
