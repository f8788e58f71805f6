"""``regraft::gather``: what every rank of a group has computed of its part, on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir.nodes import arguments
from regraft.ir.ops.moe_dispatch import sharded_sites
from regraft.ir.ops.registry import Cost, register, tensor_bytes
from regraft.ir.transport import ALONE, gather_parts, group_of


def reference(part: Tensor, *, ranks: int, rank: int = 0, group: str = ALONE) -> Tensor:
    """``[ranks, *part.shape]`` in the order of the ranks, whose parts have one shape. Every rank must make the call.
    In no group (``ALONE``) all parts are this one. Raises ``GroupError`` where there is no such group."""
    if group == ALONE:
        return torch.stack([part] * ranks)
    return gather_parts(part, group_of(group, ranks, rank))


def _fake(part: Tensor, ranks: int, **_: Any) -> Tensor:
    return part.new_empty((ranks, *part.shape))


def cost(node: fx.Node) -> Cost:
    """This rank's part is read, and all parts are written."""
    return Cost(0.0, tensor_bytes(arguments(node)["part"].meta["val"]) + tensor_bytes(node.meta["val"]))


gather = register("gather", "(Tensor part, *, int ranks, int rank=0, str group='') -> Tensor", reference, _fake, cost)


def collective_calls(graph: fx.Graph) -> list[dict[str, Any]]:
    """The arguments of every operator that speaks to other ranks: a graph that has one cannot run alone."""
    gathers = [arguments(node) for node in graph.nodes if node.target is gather]
    return [*sharded_sites(graph), *(given for given in gathers if given["group"] != ALONE)]
