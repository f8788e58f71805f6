"""Lowering a program to the CPU: every operator becomes calls of kernels that PyTorch ships, or of our own.

The lowered graph is flat: linear layers, norms and element-wise operators between them work on ``[rows, features]``.
Weights are read one at a time: a derived weight is computed, packed for its kernel and let go before the next, so that
no second copy of the model is ever in memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from regraft.codegen.cpu.assertions import ASSERTIONS, lower_assertion
from regraft.codegen.cpu.attention import lower_attention, lower_mapped
from regraft.codegen.cpu.attention_native import lower_lse
from regraft.codegen.cpu.attention_packed import lower_packed
from regraft.codegen.cpu.context import Context, Lowered
from regraft.codegen.cpu.executable import Executable
from regraft.codegen.cpu.images import lower_fold, lower_pool, lower_unfold
from regraft.codegen.cpu.last_reads import LastReads, ReadLast
from regraft.codegen.cpu.linear import lower_linear
from regraft.codegen.cpu.moe import pack_moe, run_moe
from regraft.codegen.cpu.native.experts import PackedExperts
from regraft.codegen.cpu.native.kernels import EXPERTS, TOKENS
from regraft.codegen.cpu.native_operators import experts_native
from regraft.codegen.cpu.peephole import polish
from regraft.codegen.cpu.regions import in_order, lower_region, row_regions
from regraft.codegen.cpu.rowwise import (
    BINARY,
    UNARY,
    lower_add_norm,
    lower_elementwise,
    lower_glu,
    lower_rope,
    lower_row_norm,
)
from regraft.codegen.cpu.small import lower_gather, lower_matmul, lower_reshape
from regraft.codegen.cpu.tokens import lower_log, lower_merge, lower_plan, lower_scan, lower_unmerge
from regraft.codegen.cpu.tuning import Tuner
from regraft.codegen.cpu.windows import multiply_in_place
from regraft.ir import ops
from regraft.ir.nodes import arguments, dtype
from regraft.ir.program import Program

aten = torch.ops.aten

Lowering = Callable[[Context, fx.Node], Lowered | None]

#: How each operator is lowered; None from a lowering means: as it is.
LOWERINGS: dict[Any, Lowering] = {
    ops.rms_norm: lower_row_norm,
    aten.layer_norm.default: lower_row_norm,
    ops.add_norm: lower_add_norm,
    ops.rope: lower_rope,
    ops.glu: lower_glu,
    ops.attention_packed: lower_packed,
    ops.attention_lse: lower_lse,
    ops.plan_merge: lower_plan,
    ops.merge_tokens: lower_merge,
    ops.unmerge_tokens: lower_unmerge,
    ops.linear_scan: lower_scan,
    aten.log.default: lower_log,
    aten.reshape.default: lower_reshape,
    aten.gather.default: lower_gather,
    aten.matmul.default: lower_matmul,
    aten.bmm.default: lower_matmul,
    aten.adaptive_avg_pool2d.default: lower_pool,
    aten.avg_pool2d.default: lower_pool,
    aten.im2col.default: lower_unfold,
    aten.col2im.default: lower_fold,
    ops.moe: lambda context, node: _lower_moe(context, node),
    **dict.fromkeys((*UNARY, *BINARY), lower_elementwise),
    **dict.fromkeys(ASSERTIONS, lower_assertion),
}

#: Kernels that only some models need: built while what comes before them in the graph is lowered.
_BUILT_FOR = {ops.moe: EXPERTS, ops.merge_tokens: TOKENS, ops.linear_scan: TOKENS}


def lower(program: Program, tuner: Tuner | None = None, read_last: ReadLast | None = None) -> Executable:
    """The program as an executable for the CPU. ``tuner`` carries decisions that were measured before; ``read_last``
    hears of each weight of the model when the last call that reads it is lowered, and compiled code does not."""
    for target in {node.target for node in program.graph.nodes} & _BUILT_FOR.keys():
        _BUILT_FOR[target].start()
    tuner = tuner or Tuner()
    tuner.reads(_linear_weights(program))
    context = Context(torch.nn.Module(), fx.Graph(), program=program)
    for node in program.user_inputs():
        placeholder = context.graph.placeholder(node.name)
        placeholder.meta["val"] = node.meta["val"]
        context.values[node] = Lowered(full=placeholder)
    regions = row_regions(program)
    context.lower_alone = lambda node: _lower_alone(context, node, tuner)
    reads = None if read_last is None else LastReads(program, read_last)
    for step in in_order(program, regions):
        if isinstance(step, fx.Node):
            _lower_alone(context, step, tuner)
        else:
            for node, made in lower_region(context, step).items():
                context.values[node] = made
                _stamp(context, node, made)
        if reads is not None:
            reads.lowered(context, (step,) if isinstance(step, fx.Node) else step.nodes)
    outputs = fx.map_arg(program.output_node.args[0], context.value)
    context.graph.output(outputs)
    multiply_in_place(context.graph)
    polish(context.graph)
    return Executable(fx.GraphModule(context.root, context.graph), tuner.to_jsonl())


def _lower_alone(context: Context, node: fx.Node, tuner: Tuner) -> None:
    made = _lower_node(context, node, tuner)
    context.values[node] = made
    _stamp(context, node, made)


def _linear_weights(program: Program) -> list[torch.Tensor]:
    """The model's own weights of linear layers, which every call reads; an embedding it reads a few rows of."""
    products = [node for node in program.graph.nodes if node.target in (aten.linear.default, ops.linear)]
    names = [program.weight_name(arguments(node)["weight"]) for node in products]
    originals = program.weights.originals
    return [originals[name] for name in dict.fromkeys(names) if name in originals]


def _lower_node(context: Context, node: fx.Node, tuner: Tuner) -> Lowered:
    if node.target in (aten.linear.default, ops.linear):
        return lower_linear(context, node, tuner)
    if node.target is ops.attention:
        return Lowered(full=lower_attention(context, node, tuner))
    if node.target is ops.attention_mapped:
        full = lower_mapped(context, node)
        return Lowered(full=full) if full is not None else _as_it_is(context, node)
    special = LOWERINGS.get(node.target)
    made = special(context, node) if special is not None else None
    return made if made is not None else _as_it_is(context, node)


def _lower_moe(context: Context, node: fx.Node) -> Lowered | None:
    """Experts packed once; experts whose weights are computed at run time run the reference."""
    given = arguments(node)
    weights = {name: given[name] for name in _EXPERT_WEIGHTS if given[name] is not None}
    if not all(context.is_weight(value) for value in weights.values()):
        return None
    options = {name: given[name] for name in _EXPERT_OPTIONS}
    tensors: dict[str, Any] = {name: context.weight(value) for name, value in weights.items()}
    packed = pack_moe(**tensors, **options)
    operands = [given[name] for name in ("hidden", "index", "weight")]
    wide = all(dtype(operand) == torch.float32 for operand in (operands[0], operands[2]))
    target = experts_native if wide and isinstance(packed, PackedExperts) else run_moe
    return Lowered(full=context.call(target, context.bind(packed, given["first"].name), *map(context.value, operands)))


_EXPERT_WEIGHTS = ("first", "down", "up", "first_bias", "down_bias", "up_bias")
_EXPERT_OPTIONS = ("activation", "layout", "transposed", "alpha", "limit", "up_offset")


def _as_it_is(context: Context, node: fx.Node) -> Lowered:
    """The same call on lowered operands; a semantic operator without a lowering runs its reference directly."""
    args = fx.map_arg(node.args, context.value)
    kwargs = fx.map_arg(node.kwargs, context.value)
    semantic = ops.OPERATORS.get(node.target)
    if semantic is not None:
        return Lowered(full=context.call(_reference_call, node.target, *args, **kwargs))
    return Lowered(full=context.call(node.target, *args, **kwargs))


def _reference_call(target: Any, *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


def _stamp(context: Context, source: fx.Node, made: Lowered) -> None:
    """Metadata of the program's node on the node that stands for it, for profiles, traces and the peephole."""
    for node in (made.full, made.flat):
        if node is not None and "source" not in node.meta:
            node.meta.update(copy.copy(source.meta), source=source.name)
    if made.flat is not None and made.fresh:
        value = source.meta["val"]
        if all(isinstance(size, int) for size in value.shape):
            rows = math.prod(value.shape[:-1])
            made.flat.meta["val"] = torch.empty((rows, value.shape[-1]), dtype=value.dtype, device="meta")
            made.flat.meta["dense"] = True  # a new buffer in row order: its views have strides that are known
