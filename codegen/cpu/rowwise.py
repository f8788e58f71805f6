"""Lowering operators that work on each row or element by itself: norms, activations, gates, sums, rope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from regraft.codegen.cpu.context import Context, Lowered
from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.codegen.cpu.native_operators import add_norm_native, norm_native, rope_native, silu_glu_native
from regraft.ir import ops
from regraft.ir.nodes import arguments, dtype, rank, shape, sizes_equal
from regraft.ir.ops.activation import activate
from regraft.ir.ops.rms_norm import reference as rms_norm_reference

aten = torch.ops.aten


#: Element-wise operators of one tensor operand that keep type and shape.
UNARY = (
    aten.gelu.default,
    aten.silu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
)
_ACTIVATIONS: dict[Any, str] = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
}
#: Element-wise operators of two tensors of the same shape.
BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str) -> Tensor:
    """RMSNorm. In fp32, where all flavours agree, in one buffer of ``x``'s size, which holds the squares first: on a
    CPU new memory costs more than arithmetic, and PyTorch's own operator takes three such buffers."""
    if x.dtype == torch.float32 and (weight is None or weight.dtype == torch.float32):
        out = x * x
        inverse = out.mean(-1, keepdim=True).add_(eps).rsqrt_()
        torch.mul(x, inverse, out=out)
        if weight is None:
            return out
        return out.mul_(weight if offset == 0 else weight + offset)
    return rms_norm_reference(x, weight, eps, offset, cast)


def rope_half(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> Tensor:
    """Rotary embedding of paired halves without concatenation: each half of the result is written once."""
    half = rotary_dim // 2
    kind = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), sin.dtype)
    leading = torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1])
    out = torch.empty((*leading, x.shape[-1]), dtype=kind, device=x.device)
    first, second = x[..., :half], x[..., half:rotary_dim]
    wide = cos.shape[-1] == rotary_dim
    cos_first, sin_first = cos[..., :half], sin[..., :half]
    cos_second, sin_second = (cos[..., half:], sin[..., half:]) if wide else (cos_first, sin_first)
    torch.mul(first, cos_first, out=out[..., :half]).addcmul_(second, sin_first, value=-1)
    torch.mul(second, cos_second, out=out[..., half:rotary_dim]).addcmul_(first, sin_second)
    if rotary_dim < x.shape[-1]:
        out[..., rotary_dim:] = x[..., rotary_dim:]
    return out


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up with one temporary."""
    opened = activate(gate, activation)
    if opened is gate:  # the gate belongs to others too
        return gate * up
    return opened.mul_(up) if opened.dtype == torch.promote_types(gate.dtype, up.dtype) else opened * up


def _native_can(*operands: fx.Node | None) -> bool:
    """Whether there are native kernels, which take fp32 only."""
    return all(dtype(node) == torch.float32 for node in operands if node is not None) and not NATIVE.missing()


def lower_row_norm(context: Context, node: fx.Node) -> Lowered:
    """layer_norm or rms_norm over the last dim, on the flat form where there is one."""
    given = arguments(node)
    x: fx.Node = given["x"] if "x" in given else given["input"]
    last_dim = node.target is not aten.layer_norm.default or len(given["normalized_shape"]) == 1
    on_flat = last_dim and (context.has_flat(x) or _is_turned(context, x))
    source = context.flat(x) if on_flat else context.value(x)
    optional = {name: None if given.get(name) is None else context.value(given[name]) for name in ("weight", "bias")}
    out = _emit_norm(context, node, source, optional)
    return Lowered(flat=out, fresh=True) if on_flat else Lowered(full=out, fresh=True)


def _is_turned(context: Context, node: fx.Node) -> bool:
    """Whether a permutation moved the last dim away, as tokens of an image are: any norm copies it first, and as rows
    the copy is there for the residual too."""
    if node.target is not aten.permute.default or rank(node) < 2 or not isinstance(shape(node)[-1], int):
        return False
    return arguments(node)["dims"][-1] not in (-1, rank(node) - 1) and context.can_unflatten(node)


def _emit_norm(context: Context, node: fx.Node, source: fx.Node, optional: dict[str, fx.Node | None]) -> fx.Node:
    given = arguments(node)
    centred = node.target is aten.layer_norm.default
    last_dim = not centred or len(given["normalized_shape"]) == 1
    weight, bias = optional["weight"], optional["bias"]
    if last_dim and _native_can(*(given.get(name) for name in ("x", "input", "weight", "bias"))):
        return context.call(norm_native, source, weight, bias, given["eps"], given.get("offset", 0.0), centred)
    if centred:
        return context.call(node.target, source, given["normalized_shape"], weight, bias, given["eps"])
    return context.call(rms_norm, source, weight, given["eps"], given["offset"], given["cast"])


def lower_elementwise(context: Context, node: fx.Node) -> Lowered | None:
    """Unary and same-shape binary operators stay flat when an operand is; None when nothing is flat."""
    joined = _joined_to_norm(context, node)
    if joined is not None:
        return joined
    operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if rank(node) < 2 or not any(context.has_flat(operand) for operand in operands):
        return None
    if any(not _alike(node, operand) for operand in operands) or not context.can_unflatten(node):
        return None
    args = [context.flat(arg) if isinstance(arg, fx.Node) else arg for arg in node.args]
    return Lowered(flat=context.call(node.target, *args, **node.kwargs), fresh=True)


def _joined_to_norm(context: Context, node: fx.Node) -> Lowered | None:
    """An activation of a native norm that nothing else reads is computed in the norm's own pass."""
    source, name = node.args[0], _activation(node)
    if name is None or not isinstance(source, fx.Node) or len(source.users) != 1 or source not in context.values:
        return None
    held = context.values[source]
    norm = held.full if held.flat is None else held.flat
    if norm is None or norm.target is not norm_native or norm.users:
        return None
    out = context.call(norm_native, *norm.args, name)
    return Lowered(full=out, fresh=True) if held.flat is None else Lowered(flat=out, fresh=True)


def _activation(node: fx.Node) -> str | None:
    """What the native kernels call a unary operator."""
    if node.target is aten.gelu.default:
        return "gelu" if arguments(node)["approximate"] == "none" else "gelu_tanh"
    return _ACTIVATIONS.get(node.target)


def _alike(node: fx.Node, operand: fx.Node) -> bool:
    return sizes_equal(shape(node), shape(operand)) and dtype(node) == dtype(operand)


def lower_glu(context: Context, node: fx.Node) -> Lowered:
    """The gate's product, flat where both operands are."""
    gate, up, activation = node.args
    assert isinstance(gate, fx.Node) and isinstance(up, fx.Node)
    flat = context.has_flat(gate) and context.has_flat(up) and _alike(gate, up)
    args = [(context.flat if flat else context.value)(operand) for operand in (gate, up)]
    fast = activation == "silu" and _alike(gate, up) and _native_can(gate, up)
    out = context.call(silu_glu_native, *args) if fast else context.call(glu, *args, activation)
    return Lowered(flat=out, fresh=True) if flat else Lowered(full=out, fresh=True)


def lower_rope(context: Context, node: fx.Node) -> Lowered:
    """Paired halves without concatenation, other layouts by the definition."""
    given: dict[str, Any] = arguments(node)
    operands = [context.value(given[name]) for name in ("x", "cos", "sin")]
    # In low precision the definition keeps the source's roundings, on which a router's choice may hang.
    wide = dtype(node) == torch.float32 and all(dtype(given[name]) == torch.float32 for name in ("x", "cos", "sin"))
    if wide and given["layout"] == "half" and isinstance(given["rotary_dim"], int):
        native_can = rank(node) == 4 and sizes_equal(shape(node), shape(given["x"])) and _native_can(node)
        return Lowered(
            full=context.call(rope_native if native_can else rope_half, *operands, given["rotary_dim"]), fresh=True
        )
    reference: Callable[..., Any] = ops.OPERATORS[node.target].reference
    return Lowered(full=context.call(reference, *operands, given["rotary_dim"], given["layout"]), fresh=True)


def lower_add_norm(context: Context, node: fx.Node) -> Lowered:
    """The sum, then the norm of it: on a CPU the sum stays in the cache between the two."""
    given = arguments(node)
    operands = [context.value(given[name]) for name in ("x", "residual")]
    optional = [None if given[name] is None else context.value(given[name]) for name in ("weight", "bias")]
    tensors = [given[name] for name in ("x", "residual", "weight", "bias")]
    if sizes_equal(shape(given["x"]), shape(given["residual"])) and _native_can(*tensors):
        centred = given["kind"] == "layer_norm"
        options = (given["eps"], 0.0 if centred else given["offset"], centred)
        return Lowered(full=context.call(add_norm_native, *operands, *optional, *options))
    options = tuple(given[name] for name in ("eps", "kind", "offset", "cast"))
    return Lowered(full=context.call(add_norm, *operands, *optional, *options))


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    offset: float,
    cast: str,
) -> tuple[Tensor, Tensor]:
    """``(norm(x + residual), x + residual)``."""
    total = x + residual
    if kind == "layer_norm":
        return torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, eps), total
    return rms_norm(total, weight, eps, offset, cast), total
