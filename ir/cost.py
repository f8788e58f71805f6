"""The cost model: work of every node, and the least time it can take on a device (roofline).

Work is counted from fake values: floating-point operations, and bytes that must move through memory at least
(each input read once, each output written once; a dimension of stride zero is read once). Symbolic sizes
count as in the example that the program was captured with. ``time = max(flops / peak, bytes / bandwidth)``,
after Williams, Waterman and Patterson, "Roofline", 2009.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

import regraft.ir.ops  # noqa: F401  registers the semantic operators
from regraft.ir.device import Device
from regraft.ir.nodes import arguments, concrete, user_line
from regraft.ir.ops.registry import OPERATORS, Cost

_NOTHING = Cost(0.0, 0.0)


@dataclass(frozen=True)
class NodeCost:
    """Work of one node and its least time in seconds. ``known`` is false where only bytes could be
    counted."""

    node: str
    operator: str
    cost: Cost
    seconds: float
    user_line: str
    provenance: tuple[str, ...]
    known: bool


@dataclass(frozen=True)
class GraphCost:
    """Work of a whole graph on one device."""

    device: Device
    nodes: tuple[NodeCost, ...]

    @property
    def total(self) -> Cost:
        """Work of all nodes together."""
        return sum((node.cost for node in self.nodes), _NOTHING)

    @property
    def seconds(self) -> float:
        """Least time when nodes run one after the other."""
        return sum(node.seconds for node in self.nodes)


def graph_cost(graph: fx.Graph, device: Device) -> GraphCost:
    """Cost of every call in ``graph``; placeholders, attributes and the output cost nothing and are left
    out."""
    return GraphCost(device, tuple(_describe(node, device) for node in graph.nodes if node.op == "call_function"))


def node_cost(node: fx.Node) -> Cost:
    """Work of one node; bytes alone for an operator that is not known."""
    return _count(node)[0]


def roofline_seconds(cost: Cost, device: Device, dtype: torch.dtype) -> float:
    """The least time that ``cost`` takes: limited by arithmetic in ``dtype`` or by memory."""
    return max(cost.flops / device.peak(dtype), cost.bytes / device.bytes_per_second)


def compute_dtype(node: fx.Node) -> torch.dtype:
    """The element type that a node's arithmetic runs in: its first floating-point operand's, else its
    result's."""
    values = [source.meta.get("val") for source in node.all_input_nodes] + [node.meta.get("val")]
    floating = [v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return floating[0] if floating else torch.float32


def operator_name(node: fx.Node) -> str:
    """A short name of what a node calls: "matmul", "regraft.attention", "sym_size"."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        space, _, name = target._schema.name.partition("::")
        return name if space == "aten" else f"{space}.{name}"
    return str(getattr(target, "__name__", target))


def _describe(node: fx.Node, device: Device) -> NodeCost:
    cost, known = _count(node)
    return NodeCost(
        node=node.name,
        operator=operator_name(node),
        cost=cost,
        seconds=roofline_seconds(cost, device, compute_dtype(node)),
        user_line=user_line(node),
        provenance=tuple(node.meta.get("provenance", ())),
        known=known,
    )


def _count(node: fx.Node) -> tuple[Cost, bool]:
    if node.op != "call_function":
        return _NOTHING, True
    if _unsized(node):
        return _NOTHING, False
    if node.target in OPERATORS:
        return OPERATORS[node.target].cost(node), True
    family = _family(node.target)
    if family is None:
        return Cost(0.0, _traffic(node)), False
    return family(node), True


_SIZED = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)  # a program of rows, say, has no size


def _unsized(node: fx.Node) -> bool:
    """Whether a size depends on data, so that nobody can say what the call moves."""
    values = tree_leaves([part.meta.get("val") for part in (node, *node.all_input_nodes)])
    return any(bool(free_unbacked_symbols(value)) for value in values if isinstance(value, _SIZED))


def _family(target: Any) -> Callable[[fx.Node], Cost] | None:
    if not isinstance(target, torch._ops.OpOverload):
        return _free if target is operator.getitem or not _makes_tensors(target) else None
    name = target._schema.name
    if name in _FAMILIES:
        return _FAMILIES[name]
    if torch.Tag.pointwise in target.tags:
        return _per_output(1)
    return None


def _makes_tensors(target: Any) -> bool:
    """Index arithmetic on symbolic sizes calls functions of ``operator`` and ``math``."""
    return getattr(target, "__module__", "") not in ("_operator", "math", "torch")


def footprint(value: Any) -> float:
    """Bytes of memory behind a fake value; a dimension that is expanded (stride zero) counts once."""
    if isinstance(value, torch.Tensor):
        strides = _strides(value)
        sizes = (concrete(size) for size in value.shape)
        extents = (1 if stride == 0 and size else size for size, stride in zip(sizes, strides, strict=True))
        return float(math.prod(extents) * value.element_size())
    if isinstance(value, (list, tuple)):
        return sum(footprint(item) for item in value)
    return 0.0


def _strides(value: torch.Tensor) -> list[int]:
    if value.layout is not torch.strided:
        return [1] * value.dim()
    return [concrete(stride) for stride in value.stride()]


def _elements(node: Any) -> float:
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    if isinstance(value, (list, tuple)):
        value = next((item for item in value if isinstance(item, torch.Tensor)), None)
    return float(math.prod(concrete(size) for size in value.shape)) if isinstance(value, torch.Tensor) else 0.0


def _read(nodes: Iterable[Any]) -> float:
    return sum(footprint(node.meta.get("val")) for node in nodes if isinstance(node, fx.Node))


def _traffic(node: fx.Node) -> float:
    return _read(node.all_input_nodes) + footprint(node.meta.get("val"))


def _size(node: Any, dim: int) -> int:
    return concrete(node.meta["val"].shape[dim])


def _free(node: fx.Node) -> Cost:
    return _NOTHING


def _move(node: fx.Node) -> Cost:
    return Cost(0.0, _traffic(node))


def _write(node: fx.Node) -> Cost:
    return Cost(0.0, footprint(node.meta.get("val")))


def _reshape(node: fx.Node) -> Cost:
    """A view costs nothing; a reshape that no view can express copies."""
    source, result = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    if not isinstance(source, torch.Tensor) or not isinstance(result, torch.Tensor):
        return _NOTHING
    held = torch.empty_strided([concrete(s) for s in source.shape], _strides(source), device="meta")
    try:
        held.view([concrete(s) for s in result.shape])
    except RuntimeError:
        return Cost(0.0, footprint(source) + footprint(result))
    return _NOTHING


def _contiguous(node: fx.Node) -> Cost:
    """Nothing when the layout is the wanted one already, else a copy."""
    source, result = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    if isinstance(source, torch.Tensor) and isinstance(result, torch.Tensor):
        return _NOTHING if _strides(source) == _strides(result) else _move(node)
    return _move(node)


def _gather(node: fx.Node) -> Cost:
    """The entries that are picked, read and written, and the indices; never the whole table."""
    values = [source.meta.get("val") for source in node.all_input_nodes]
    integers = [v for v in values if isinstance(v, torch.Tensor) and not v.is_floating_point()]
    table = values[0] if isinstance(node.args[0], fx.Node) else None
    indices = sum(footprint(value) for value in integers if value is not table)
    return Cost(0.0, 2.0 * footprint(node.meta.get("val")) + indices)


def _per_output(flops: float) -> Callable[[fx.Node], Cost]:
    return lambda node: Cost(flops * _elements(node), _traffic(node))


def _per_input(flops: float) -> Callable[[fx.Node], Cost]:
    return lambda node: Cost(flops * _elements(node.all_input_nodes[0]), _traffic(node))


def _product(left: int, dim: int = -1) -> Callable[[fx.Node], Cost]:
    """A matrix product whose summed size is dimension ``dim`` of argument ``left``."""
    return lambda node: Cost(2.0 * _elements(node) * _size(node.args[left], dim), _traffic(node))


def _convolution(node: fx.Node) -> Cost:
    given = arguments(node)
    weight = given["weight"] if "weight" in given else given["W"]  # oneDNN's operators say W
    return Cost(2.0 * _elements(node) * _elements(weight) / _size(weight, 0), _traffic(node))


def _attention(node: fx.Node) -> Cost:
    """Two matrix products and the softmax between them; the scores never reach memory."""
    query, key, value = node.args[:3]
    scores = _elements(query) / _size(query, -1) * _size(key, -2)
    flops = scores * (2.0 * (_size(query, -1) + _size(value, -1)) + 5.0)
    return Cost(flops, _traffic(node))


def _named(names: str, family: Callable[[fx.Node], Cost], space: str = "aten") -> dict[str, Callable[[fx.Node], Cost]]:
    return {f"{space}::{name}": family for name in names.split()}


#: Operator name without its overload -> how its work is counted. Operations per element of transcendental
#: functions are those of a polynomial evaluation; they matter only beside the bytes.
_FAMILIES: dict[str, Callable[[fx.Node], Cost]] = {
    **_named("matmul mm bmm linear _grouped_mm", _product(0)),
    **_named("addmm baddbmm _addmm_activation", _product(1)),
    **_named("_linear_pointwise", _product(0), "mkldnn"),
    **_named("_mkl_linear", _product(0), "mkl"),
    **_named("grouped_mm_fallback", _product(0), "transformers"),
    **_named("convolution conv1d conv2d conv3d", _convolution),
    **_named("_convolution_pointwise", _convolution, "mkldnn"),
    **_named("scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu", _attention),
    **_named("_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention", _attention),
    **_named("softmax _softmax _safe_softmax log_softmax _log_softmax", _per_output(5)),
    **_named("layer_norm native_layer_norm group_norm native_group_norm batch_norm", _per_output(8)),
    **_named("_native_batch_norm_legit_no_training instance_norm", _per_output(8)),
    **_named("rms_norm _fused_rms_norm", _per_output(5)),
    **_named("gelu silu mish tanh sigmoid erf exp exp2 log pow sqrt rsqrt softplus sin cos", _per_output(10)),
    **_named("sum mean amax amin max min prod any all argmax argmin var std norm", _per_input(1)),
    **_named("linalg_vector_norm logsumexp cumsum cumprod avg_pool2d adaptive_avg_pool2d max_pool2d", _per_input(1)),
    **_named("permute transpose t expand unsqueeze squeeze slice select view alias detach unbind", _free),
    **_named("split split_with_sizes chunk as_strided diagonal unfold movedim swapaxes narrow", _free),
    **_named("sym_size sym_numel sym_stride _assert_scalar _assert_tensor_metadata lift_fresh_copy", _free),
    **_named("_assert_async", _free),
    **_named("reshape _unsafe_view flatten unflatten", _reshape),
    **_named("contiguous", _contiguous),
    **_named("cat stack clone copy to _to_copy repeat repeat_interleave flip roll pad constant_pad_nd", _move),
    **_named("sort topk masked_fill where scatter index_put index_add slice_scatter select_scatter", _move),
    **_named("full zeros ones empty arange full_like zeros_like ones_like scalar_tensor eye", _write),
    **_named("new_full new_zeros new_ones tril_indices triu_indices linspace", _write),
    **_named("embedding index index_select gather take_along_dim embedding_bag", _gather),
}
