"""Which calls of a graph a row-wise kernel may hold, and what each does to the dims of its operands."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from regraft.codegen.rowwise.primitives import COMPARISONS, REDUCTIONS, is_copy, operator_word, pointwise
from regraft.ir import ops
from regraft.ir.nodes import arguments, is_tensor, rank, shape
from regraft.ir.pointwise import is_pointwise

aten = torch.ops.aten

#: Element types that kernels read and write.
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
TYPES = (*FLOATS, torch.bool, *_INTEGERS)
#: Operators that give whole numbers.
_WHOLE = ("add", "sub", "rsub", "mul", "neg", "abs", "where", "masked_fill", "bitwise_and", "bitwise_or", "bitwise_xor")

#: Operators that give truth values.
_TRUTHS = (
    *COMPARISONS,
    "logical_xor",
    "where",
    "masked_fill",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "bitwise_not",
)


def interleave(even: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    """Columns of two tensors in turn."""
    return torch.stack((even, odd), -1).flatten(-2)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x [..., in]`` times the transposed ``weight [out, in]``, in fp32."""
    return torch.nn.functional.linear(x.float(), weight.float())


class Kind(Enum):
    """What a call does to dims."""

    POINTWISE = "each element by itself, operands aligned from the last dim"
    COLUMNS = "rows by themselves, the columns of a row together"
    REDUCTION = "a number for each row"
    PERMUTE = "dims in another order, the last one kept"
    RESHAPE = "dims of size one come or go"
    PART = "one of several results"


@dataclass(frozen=True)
class Step:
    """A call that a kernel may hold. ``keeps``: the reduced dim stays with size one; ``dims``: the order of a
    permutation; ``moves``: nothing is computed; ``costly``: worth keeping rather than doing again."""

    kind: Kind
    tensors: tuple[fx.Node, ...]
    keeps: bool = False
    dims: tuple[int, ...] = ()
    moves: bool = False
    costly: bool = False


def step_of(node: fx.Node) -> Step | str:
    """What a call is to a row-wise kernel, or why none holds it."""
    if node.op != "call_function":
        return f"{node.name} is no call"
    found = _special(node) if node.target in _SPECIAL else _by_word(node)
    if isinstance(found, str):
        return found
    return _types(node, found) or found


def is_free_view(node: fx.Node) -> bool:
    """Whether a call gives memory of its operand, with other strides: it costs nothing where it is."""
    return operator_word(node.target) in ("slice", "expand", *_MOVES)


def works_on_rows(node: fx.Node) -> bool:
    """Whether one would look for a call in a row-wise kernel, be it supported or not."""
    word = operator_word(node.target)
    known = word in REDUCTIONS or word in _COLUMNS or node.target in (*_REDUCTIONS, *_SPECIAL)
    item = node.target is operator.getitem
    return (known or is_pointwise(node)) and is_tensor(node) and not item and not is_free_view(node)


def _types(node: fx.Node, step: Step) -> str | None:
    word, made = operator_word(node.target), node.meta.get("val")
    counts = isinstance(made, torch.Tensor) and made.dtype in _INTEGERS
    if counts and step.kind is Kind.POINTWISE and not (word in _WHOLE or step.moves or is_copy(node)):
        return f"{word} of whole numbers has no row-wise kernel"
    truth = isinstance(made, torch.Tensor) and made.dtype == torch.bool
    if truth and step.kind is Kind.POINTWISE and not (word in _TRUTHS or step.moves or is_copy(node)):
        return f"{word} of truth values has no row-wise kernel"
    values = [node.meta.get("val"), *(operand.meta.get("val") for operand in step.tensors)]
    devices = {tensor.device for tensor in values if isinstance(tensor, torch.Tensor)}
    if len(devices) > 1:
        return f"{node.name} works on {' and '.join(sorted(map(str, devices)))}"
    for value in values:
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
                return f"{node.name} works on what is no plain tensor"
            if tensor.dtype not in TYPES:
                return f"{node.name} works in {str(tensor.dtype).removeprefix('torch.')}"
            if tensor.dim() and not isinstance(tensor.shape[-1], int):
                return f"{node.name} has a symbolic number of columns"
            if tensor.dim() and tensor.shape[-1] == 0:
                return f"{node.name} has no columns"
    return None


def _by_word(node: fx.Node) -> Step | str:
    word = operator_word(node.target)
    if word in REDUCTIONS or word in ("logsumexp", "linalg_vector_norm", "var"):
        return _reduction(node, word)
    if word in _COLUMNS:
        return _COLUMNS[word](node)
    if word in _MOVES:
        return _MOVES[word](node)
    found = pointwise(node)
    if found is None:
        return f"{word or node.target} has no row-wise kernel"
    entry, operands = found
    if any(isinstance(operand, fx.Node) and not is_tensor(operand) for operand in operands):
        return f"{node.name} reads a size"
    if not all(isinstance(operand, (fx.Node, bool, int, float)) for operand in operands):
        return f"{node.name} reads what is neither tensor nor number"
    return Step(Kind.POINTWISE, tuple(o for o in operands if isinstance(o, fx.Node)), costly=entry.costly)


def _reduction(node: fx.Node, word: str) -> Step | str:
    given = arguments(node)
    if node.target not in _REDUCTIONS:
        return f"{node.target} has no row-wise kernel"
    x = given["self"]
    dims = given["dim"]
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    if not rank(x) or [dim % rank(x) for dim in dims] != [rank(x) - 1]:
        return f"{node.name} reduces other dims than the last"
    if not x.meta["val"].dtype.is_floating_point or not node.meta["val"].dtype.is_floating_point:
        return f"{node.name} reduces numbers that are not floating-point"
    if shape(x)[-1] == 1:
        return f"{node.name} reduces a single column"
    if word == "linalg_vector_norm" and given["ord"] != 2:
        return f"{node.name} is a norm of order {given['ord']}"
    if word == "var" and not isinstance(given.get("correction"), (int, float, type(None))):
        return f"{node.name} corrects by what is no number"
    return Step(Kind.REDUCTION, (x,), keeps=bool(given["keepdim"]), costly=True)


_REDUCTIONS = (
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.logsumexp.default,
    aten.linalg_vector_norm.default,
    aten.var.correction,
    aten.var.dim,
)


def _softmax(node: fx.Node) -> Step | str:
    given = arguments(node)
    x = given["self"]
    if given["dim"] % max(1, rank(x)) != rank(x) - 1:
        return f"{node.name} runs over another dim than the last"
    return Step(Kind.COLUMNS, (x,), costly=True)


def _norm(node: fx.Node) -> Step | str:
    given = arguments(node)
    if len(given["normalized_shape"]) != 1:
        return f"{node.name} normalises more than one dim"
    return _rows("input", "weight", "bias")(node)


def _rows(*names: str) -> Callable[[fx.Node], Step | str]:
    def found(node: fx.Node) -> Step | str:
        given = arguments(node)
        tensors = tuple(given[name] for name in names if isinstance(given.get(name), fx.Node))
        return Step(Kind.COLUMNS, tensors, costly=True)

    return found


def _gated(node: fx.Node) -> Step | str:
    given = arguments(node)
    return Step(Kind.POINTWISE, tuple(given[name] for name in ("x", "gate", "up") if name in given), costly=True)


def _rope(node: fx.Node) -> Step | str:
    given = arguments(node)
    width = given["rotary_dim"]
    if not isinstance(width, int):
        return f"{node.name} has a symbolic rotary_dim"
    if width < 4 or shape(given["x"])[-1] - width == 1:
        return f"{node.name} works on single columns"
    return _rows("x", "cos", "sin")(node)


def _item(node: fx.Node) -> Step | str:
    source = node.args[0]
    if isinstance(source, fx.Node) and source.target is ops.add_norm:
        return Step(Kind.PART, (source,), moves=True)
    return f"{node.name} is a part of {source}"


#: Operators that are not ATen's.
_SPECIAL: dict[Any, Callable[[fx.Node], Step | str]] = {
    ops.rms_norm: _rows("x", "weight"),
    ops.add_norm: _rows("x", "residual", "weight", "bias"),
    ops.rope: _rope,
    ops.glu: _gated,
    ops.activation: _gated,
    operator.getitem: _item,
    interleave: lambda node: Step(Kind.COLUMNS, (node.args[0], node.args[1]), moves=True),  # type: ignore[arg-type]
    product: lambda node: Step(Kind.COLUMNS, (node.args[0],), costly=True),  # type: ignore[arg-type]
}


def _special(node: fx.Node) -> Step | str:
    return _SPECIAL[node.target](node)


def _slice(node: fx.Node) -> Step | str:
    given = arguments(node)
    x = given["self"]
    if given["dim"] % rank(x) != rank(x) - 1:
        return f"{node.name} slices another dim than the last"
    if not all(isinstance(given[name], (int, type(None))) for name in ("start", "end", "step")):
        return f"{node.name} slices by a size that is symbolic"
    return Step(Kind.COLUMNS, (x,), moves=True)


def _cat(node: fx.Node) -> Step | str:
    given = arguments(node)
    pieces = given["tensors"]
    if any(rank(piece) != rank(node) for piece in pieces) or given["dim"] % rank(node) != rank(node) - 1:
        return f"{node.name} joins along another dim than the last"
    if any(shape(piece)[-1] == 1 for piece in pieces):
        return f"{node.name} joins single columns"
    return Step(Kind.COLUMNS, tuple(pieces), moves=True)


def _repeat(node: fx.Node) -> Step | str:
    given = arguments(node)
    x = given["self"]
    if node.target is not aten.repeat_interleave.self_int or given["dim"] is None or given["repeats"] != 2:
        return f"{node.name} does not repeat each number once"
    if given["dim"] % rank(x) != rank(x) - 1:
        return f"{node.name} repeats along another dim than the last"
    return Step(Kind.COLUMNS, (x,), moves=True)


def _permute(node: fx.Node) -> Step | str:
    given = arguments(node)
    x = given["self"]
    if "dims" in given:
        dims = tuple(dim % rank(x) for dim in given["dims"])
    else:
        order = list(range(rank(x)))
        one, other = given["dim0"] % rank(x), given["dim1"] % rank(x)
        order[one], order[other] = order[other], order[one]
        dims = tuple(order)
    if not dims or dims[-1] != rank(x) - 1:
        return f"{node.name} moves the last dim"
    return Step(Kind.PERMUTE, (x,), dims=dims, moves=True)


def _reshape(node: fx.Node) -> Step | str:
    x = arguments(node)["self"]
    kept, made = ([size for size in shape(n) if not (isinstance(size, int) and size == 1)] for n in (x, node))
    if len(kept) != len(made) or any(str(a) != str(b) for a, b in zip(kept, made, strict=True)):
        return f"{node.name} splits or merges dims"
    return Step(Kind.RESHAPE, (x,), moves=True)


def _expand(node: fx.Node) -> Step | str:
    given = arguments(node)
    before = [1] * (rank(node) - rank(given["self"])) + list(shape(given["self"]))
    for size, held in zip(shape(node), before, strict=True):
        if not isinstance(size, int) and isinstance(held, int) and held == 1:
            return f"{node.name} repeats along a dim whose size is symbolic"
    return Step(Kind.POINTWISE, (arguments(node)["self"],), moves=True)


_COLUMNS: dict[str, Callable[[fx.Node], Step | str]] = {
    "softmax": _softmax,
    "log_softmax": _softmax,
    "_softmax": _softmax,
    "_log_softmax": _softmax,
    "layer_norm": _norm,
    "slice": _slice,
    "cat": _cat,
    "repeat_interleave": _repeat,
}
_MOVES: dict[str, Callable[[fx.Node], Step | str]] = {
    "permute": _permute,
    "transpose": _permute,
    "reshape": _reshape,
    "view": _reshape,
    "unsqueeze": _reshape,
    "squeeze": _reshape,
    "expand": _expand,
}
