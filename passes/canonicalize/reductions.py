"""Canonical spelling of reductions: means as ``mean``, the reduced dims kept, moments one by one."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, dtype, is_call, rank, shape
from regraft.passes.canonicalize.identity import identity

aten = torch.ops.aten

_KEEPING = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.var.correction, aten.var.dim)
#: Operators on one tensor (and numbers) that do the same with a dim of one more.
_POINTWISE = (
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.pow.Tensor_Scalar,
    aten.clamp.default,
    aten.rsqrt.default,
    aten.sqrt.default,
    aten.reciprocal.default,
    aten.to.dtype,
)


@identity(aten.unsqueeze.default, aten.reshape.default)
def reduced_dim_is_kept(node: fx.Node, build: Builder) -> fx.Node | None:
    """mean(x, -1).unsqueeze(-1) is mean(x, -1, keepdim=True), also with arithmetic on the mean in between."""
    steps: list[fx.Node] = []
    source: Any = node.args[0]
    while is_call(source, _POINTWISE) and len(source.all_input_nodes) == 1:
        steps.append(source)
        source = source.args[0]
    if not is_call(source, _KEEPING):
        return None
    given = arguments(source)
    if given.get("keepdim") or list(given["dim"] or ()) not in ([-1], [rank(given["self"]) - 1]):
        return None
    if any(len(step.users) > 1 for step in (*steps, source)) or not _adds_last(node):
        return None
    named: dict[str, Any] = {name: given.pop(name) for name in ("correction", "dtype") if name in given}
    if source.target is aten.var.correction:
        named["keepdim"] = True
        result = build.call(source.target, given["self"], given["dim"], **named)
    else:
        given["keepdim"] = True
        kept = {name: value for name, value in named.items() if value is not None}
        result = build.call(source.target, *given.values(), **kept)
    for step in reversed(steps):
        result = build.call(step.target, result, *step.args[1:], **step.kwargs)  # type: ignore[arg-type]
    return result


def _adds_last(node: fx.Node) -> bool:
    """Whether a view adds a last dim of one and does nothing else."""
    before, after = shape(node.args[0]), shape(node)  # type: ignore[arg-type]
    if node.target is aten.unsqueeze.default:
        return node.args[1] in (-1, len(before))
    return all(isinstance(size, int) for size in after) and (*before, 1) == after


@identity(aten.div.Tensor, aten.mul.Tensor, exactness=Exactness.REASSOCIATED)
def sum_over_count_is_mean(node: fx.Node, build: Builder) -> fx.Node | None:
    """sum(x, dims) / n and sum(x, dims) * (1 / n) are mean(x, dims), where n is the number of summed entries."""
    total: Any = node.args[0]
    number = node.args[1]
    if not is_call(total, (aten.sum.dim_IntList,)) or not isinstance(number, (int, float)) or len(total.users) > 1:
        return None
    given = arguments(total)
    x, dims = given["self"], given["dim"] or range(rank(given["self"]))
    sizes = [shape(x)[dim] for dim in dims]
    if not dtype(x).is_floating_point or not all(isinstance(size, int) for size in sizes):
        return None
    count = math.prod(sizes)
    if count == 0 or number == 0 or count != (number if node.target is aten.div.Tensor else 1 / number):
        return None
    extra = {"dtype": given["dtype"]} if given.get("dtype") is not None else {}
    return build.call(aten.mean.dim, x, list(dims), given["keepdim"], **extra)


@identity(operator.getitem, exactness=Exactness.REASSOCIATED)
def one_of_two_moments(node: fx.Node, build: Builder) -> fx.Node | None:
    """The parts of var_mean are var and mean."""
    source: Any = node.args[0]
    place = node.args[1]
    if not is_call(source, (aten.var_mean.correction, aten.var_mean.dim)):
        return None
    given = arguments(source)
    x, dims, keep = given["self"], given["dim"], given["keepdim"]
    dims = list(range(rank(x))) if not dims else list(dims)
    dims = [dim - rank(x) if dim >= 0 else dim for dim in dims]
    if place == 1:
        return build.call(aten.mean.dim, x, dims, keep)
    if "unbiased" in given:
        correction: Any = int(given["unbiased"])
    else:
        correction = 1 if given["correction"] is None else given["correction"]
    return build.call(aten.var.correction, x, dims, correction=correction, keepdim=keep)


SPELLINGS = (reduced_dim_is_kept, sum_over_count_is_mean, one_of_two_moments)
