"""What one expert computes: its projections and the gate function between them, read from canonical nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.nodes import (
    FILLED_LIKE,
    Builder,
    arguments,
    dtype,
    is_call,
    is_tensor,
    rank,
    shape,
    size_equal,
    sizes_equal,
)
from regraft.ir.ops.activation import activation_name
from regraft.ir.ops.moe import moe

aten = torch.ops.aten

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Refused(Exception):
    """A site that looks like routed experts and is none that ``regraft::moe`` can express."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


@dataclass(frozen=True)
class Gate:
    """The arguments of ``regraft::moe`` that describe the gate function, and the projections it is computed
    from."""

    first: fx.Node
    up: fx.Node | None
    activation: str
    layout: str
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0


@dataclass(frozen=True)
class Projection:
    """A projection of every expert: ``weight [experts, out, in]`` (``[experts, in, out]`` where
    ``transposed``) and ``bias [experts, out]``; ``rows`` is what it is applied to. ``parts`` are those of each
    expert where they are not stacked yet; weight and bias are then the first expert's."""

    rows: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    parts: tuple[Projection, ...] = ()


@dataclass(frozen=True)
class Experts:
    """Routed experts in normal form. ``hidden`` is cast to ``cast`` first, and its leading dims are one; ``index`` and
    ``weight`` are reshaped to ``[tokens, top_k]`` where they are not. ``weight`` None is one for each; with ``table``
    it is the weight of every expert, of which the index names those that are not zero. ``scaled`` experts have their
    inputs multiplied by the weights, instead of their outputs."""

    hidden: fx.Node
    index: fx.Node
    weight: fx.Node | None
    top_k: int
    gate: Gate
    first: Projection
    down: Projection
    up: Projection | None = None
    cast: torch.dtype | None = None
    base: fx.Node | None = None
    table: bool = False
    scaled: bool = False


def float_source(node: fx.Node) -> fx.Node:
    """What a cast between floating-point types is a cast of; any other node itself."""
    source: Any = node.args[0] if is_call(node, (aten.to.dtype,)) else node
    return cast(fx.Node, source) if dtype(node) in _FLOATS and dtype(source) in _FLOATS else node


def read_gate(inner: fx.Node) -> Gate:
    """The gate function that ends in ``inner``, the input of the experts' last projection; raises
    ``Refused``."""
    if is_call(inner, (ops.glu,)):
        gate, up, name = inner.args[:3]
        return _gate(inner, gate, up, str(name), 1.0)
    if is_call(inner, (aten.mul.Tensor,)) and all(is_tensor(factor) for factor in inner.args):
        alone = _activation(inner)
        if alone is not None:
            return Gate(alone[0], None, alone[1], "single", alone[2])
        for activated, up in (inner.args, inner.args[::-1]):
            read = _activation(activated)
            if read is not None:
                return _gate(inner, read[0], up, read[1], read[2])
    read = _activation(inner)
    if read is None:
        raise Refused("the function between the experts' projections is no known activation", inner)
    return Gate(read[0], None, read[1], "single", read[2])


def _activation(node: Any) -> tuple[fx.Node, str, float] | None:
    """``(x, name, alpha)`` of ``activation(x)``."""
    if is_call(node, (ops.activation,)):
        return node.args[0], str(node.args[1]), 1.0
    name = activation_name(node) if isinstance(node, fx.Node) else None
    if name is not None:
        return node.args[0], name, 1.0
    if not is_call(node, (aten.mul.Tensor,)):
        return None
    for x, sigmoid in (node.args, node.args[::-1]):
        if is_call(sigmoid, (aten.sigmoid.default,)):
            scaled = sigmoid.args[0]
            if scaled is x:
                return x, "silu", 1.0
            if is_call(scaled, (aten.mul.Tensor,)) and scaled.args[0] is x and _is_number(scaled.args[1]):
                return x, "swish", float(scaled.args[1])
    return None


def _gate(inner: fx.Node, gate: Any, up: Any, activation: str, alpha: float) -> Gate:
    offset = 0.0
    if is_call(up, (aten.add.Tensor,)) and _is_number(up.args[1]) and arguments(up).get("alpha", 1) == 1:
        up, offset = up.args[0], float(up.args[1])
    gate, gate_limits = _unclamped(gate)
    up, up_limits = _unclamped(up)
    limit = gate_limits[1]
    wanted = (None, None) if limit is None else (-limit, limit)
    if gate_limits[0] is not None or up_limits != wanted:
        raise Refused("gate and up are not clamped to one limit", inner)
    first, layout = _layout(inner, gate, up)
    separate = up if layout == "separate" else None
    return Gate(first, separate, activation, layout, alpha, limit, offset)


def _unclamped(node: Any) -> tuple[Any, tuple[float | None, float | None]]:
    if is_call(node, (aten.clamp.default, aten.clamp_max.default, aten.clamp_min.default)):
        given = arguments(node)
        low, high = given.get("min"), given.get("max")
        if all(number is None or _is_number(number) for number in (low, high)):
            return given["self"], (_as_float(low), _as_float(high))
    return node, (None, None)


def _layout(inner: fx.Node, gate: Any, up: Any) -> tuple[fx.Node, str]:
    """The projection that holds gate and up, and where each lies in it."""
    if not is_call(gate, (aten.slice.Tensor,)) or not is_call(up, (aten.slice.Tensor,)):
        if not is_tensor(gate) or not is_tensor(up) or gate is up:
            raise Refused("gate and up are not two projections", inner)
        return gate, "separate"
    one, other = arguments(gate), arguments(up)
    if one["self"] is not other["self"]:
        return gate, "separate"
    packed = one["self"]
    width = shape(packed)[-1]
    places = tuple(
        (given["dim"], given["start"] or 0, _end(given["end"], width), given["step"]) for given in (one, other)
    )
    layouts = {
        ((-1, 0, width // 2, 1), (-1, width // 2, width, 1)): "gate_up",
        ((-1, width // 2, width, 1), (-1, 0, width // 2, 1)): "up_gate",
        ((-1, 0, width, 2), (-1, 1, width, 2)): "interleaved",
    }
    if not isinstance(width, int) or width % 2 or places not in layouts:
        raise Refused("gate and up are not the two halves of the experts' first projection", inner)
    return packed, layouts[places]


def _end(end: Any, width: Any) -> Any:
    return width if end is None or (isinstance(end, int) and isinstance(width, int) and end > width) else end


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_float(value: Any) -> float | None:
    return None if value is None else float(value)


def build_experts(build: Builder, root: fx.Node, experts: Experts) -> fx.Node:
    """``regraft::moe`` in front of ``root``, with ``root``'s shape and element type."""
    hidden = experts.hidden
    if experts.cast is not None and experts.cast != dtype(hidden):
        hidden = build.call(aten.to.dtype, hidden, experts.cast)
    if rank(hidden) != 2:
        hidden = build.call(aten.reshape.default, hidden, [-1, shape(hidden)[-1]])
    tokens = build.size(hidden, 0)
    up, weight = experts.up, _weight(build, experts, hidden, tokens)
    if experts.scaled:  # of one expert a token
        hidden = build.call(aten.mul.Tensor, hidden, weight)
        weight = build.call(aten.new_ones.default, hidden, [tokens, experts.top_k])
    node = build.call(
        moe,
        hidden,
        _two_dims(build, experts.index, tokens, experts.top_k),
        weight,
        experts.first.weight,
        experts.down.weight,
        None if up is None else up.weight,
        experts.first.bias,
        experts.down.bias,
        None if up is None else up.bias,
        activation=experts.gate.activation,
        layout=experts.gate.layout,
        transposed=experts.down.transposed,
        alpha=experts.gate.alpha,
        limit=experts.gate.limit,
        up_offset=experts.gate.up_offset,
    )
    if dtype(node) != dtype(root):
        node = build.call(aten.to.dtype, node, dtype(root))
    if not sizes_equal(shape(node), shape(root)):
        node = build.call(aten.reshape.default, node, build.sizes(root))
    return node if experts.base is None else build.call(aten.add.Tensor, experts.base, node)


def _weight(build: Builder, experts: Experts, hidden: fx.Node, tokens: Any) -> fx.Node:
    """The routing weights ``[tokens, top_k]``."""
    weight, index = experts.weight, experts.index
    if weight is None:
        return build.call(aten.new_ones.default, hidden, [tokens, experts.top_k])
    if experts.table:
        table = _rebuilt(build, weight, index, {})
        named = [*(build.size(weight, dim) for dim in range(rank(weight) - 1)), experts.top_k]
        if not sizes_equal(shape(index), (*shape(weight)[:-1], experts.top_k)):
            index = build.call(aten.reshape.default, index, named)
        weight = build.call(aten.gather.default, table, -1, index)
    return _two_dims(build, weight, tokens, experts.top_k)


def _rebuilt(build: Builder, table: fx.Node, index: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """The table made anew from the index: a rewrite is checked on random values of what it reads, and only the table's
    own nodes keep its zeros where they are."""
    if table is index or not (is_call(table, FILLED_LIKE) or _reads(table, index)):
        return table
    if table not in known:
        args = fx.map_arg(table.args, lambda node: _rebuilt(build, node, index, known))
        kwargs = fx.map_arg(table.kwargs, lambda node: _rebuilt(build, node, index, known))
        known[table] = build.call(table.target, *args, **kwargs)  # type: ignore[arg-type]
    return known[table]


def _reads(node: fx.Node, source: fx.Node) -> bool:
    seen, pending = {node}, [node]
    while pending:
        one = pending.pop()
        if one is source:
            return True
        if one < source:  # comes before it in the graph
            continue
        fresh = [operand for operand in one.all_input_nodes if operand not in seen]
        seen.update(fresh)
        pending += fresh
    return False


def _two_dims(build: Builder, node: fx.Node, tokens: Any, top_k: int) -> fx.Node:
    """``[tokens, top_k]`` of a tensor with that many elements; what a reshape flattened is read before it."""
    source = node.args[0] if is_call(node, (aten.reshape.default,)) else node
    for candidate in (node, source):
        if isinstance(candidate, fx.Node) and _is_pairs(candidate, tokens, top_k):
            return candidate
    return build.call(aten.reshape.default, node, [tokens, top_k])


def _is_pairs(node: fx.Node, tokens: Any, top_k: int) -> bool:
    if rank(node) != 2:
        return False
    rows, columns = shape(node)
    return size_equal(rows, tokens) and size_equal(columns, top_k)


def same_storage(build: Builder, projection: Projection, transposed: bool) -> Projection:
    """The projection with its weight stored as ``transposed`` says."""
    if projection.transposed == transposed:
        return projection
    turned = build.call(aten.permute.default, projection.weight, [0, 2, 1])
    return Projection(projection.rows, turned, projection.bias, transposed)
