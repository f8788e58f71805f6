"""The router of a site of routed experts: from its product with the hidden states to the experts' index and weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import Builder, arguments, is_call, is_tensor, rank, shape
from regraft.ir.program import Program
from regraft.passes.experts.expert_axis import SAME, Numbers
from regraft.passes.experts.operands import Operands, Recipe
from regraft.passes.experts.permutation import Permutation
from regraft.passes.experts.walk import Walk
from regraft.passes.refused import Refused

aten = torch.ops.aten
_WEIGHTS = ("first", "down", "up", "first_bias", "down_bias", "up_bias")


@dataclass(frozen=True)
class Rewrite:
    """What permutes one site: the router's nodes in graph order, what they read instead, and the expert weights."""

    site: fx.Node
    nodes: list[fx.Node]
    recipes: dict[tuple[fx.Node, fx.Node], Recipe]
    weights: dict[fx.Node, Recipe] = field(default_factory=dict)

    def build(self, build: Builder) -> fx.Node:
        """The site and its router over permuted weights; the old router stays for whoever else reads it."""
        new: dict[fx.Node, fx.Node] = {}
        made: dict[tuple[fx.Node, fx.Node], fx.Node] = {key: make(build) for key, make in self.recipes.items()}
        for node in self.nodes:
            new[node] = _again(build, node, {**new, **{at: value for (by, at), value in made.items() if by is node}})
        return _again(build, self.site, {**new, **{node: make(build) for node, make in self.weights.items()}})


def read_site(program: Program, site: fx.Node, order: Permutation) -> Rewrite:
    """How to permute the experts of ``regraft::moe``. Raises ``Refused`` where that would not be exact."""
    given = arguments(site)
    operands = Operands(program)
    weights = _expert_weights(operands, given, order)
    starts, between = _cone(program, given["index"], (given["weight"],), len(order))
    walk = Walk(operands, order)
    nodes = []
    for node in between:
        if node in starts:
            walk.start(node)
        elif any(source in walk.effects for source in node.all_input_nodes):
            walk.step(node)
        else:
            continue
        nodes.append(node)
    if walk.of(given["index"]) != Numbers(len(order)):
        raise Refused("the expert index does not come from a choice among the router's scores", given["index"])
    if walk.of(given["weight"]) != SAME:
        raise Refused("the routing weights are not those of the chosen experts alone", given["weight"])
    return Rewrite(site, nodes, walk.recipes, weights)


def _expert_weights(operands: Operands, given: dict[str, Any], order: Permutation) -> dict[fx.Node, Recipe]:
    held = [given[name] for name in _WEIGHTS if given[name] is not None]
    try:
        return {node: operands.along(node, -rank(node), order) for node in held}
    except Refused as refused:
        raise Refused("the weights of the experts are computed at run time", refused.node) from refused


def _cone(
    program: Program, index: fx.Node, others: Iterable[fx.Node], experts: int
) -> tuple[set[fx.Node], list[fx.Node]]:
    """The products that the index comes from, and all nodes between the inputs and the site, in graph order."""
    starts: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    for pending, looks in (([index], True), (list(others), False)):
        while pending:
            node = pending.pop()
            if node in seen or node.op != "call_function":
                continue
            seen.add(node)
            if looks and _is_product(program, node, experts):
                starts.add(node)
            elif node not in starts:
                pending += node.all_input_nodes
    if not starts:
        raise Refused(
            f"no product of the router with a weight of {experts} rows, one for each expert, was found", index
        )
    return starts, sorted(seen)


def _is_product(program: Program, node: fx.Node, experts: int) -> bool:
    """Whether ``node`` multiplies by a weight with a row (or, not transposed, a column) for each expert."""
    if not is_tensor(node) or shape(node)[-1] != experts:
        return False
    given: Any = arguments(node)
    if is_call(node, (aten.linear.default,)):
        return program.is_made_of_weights(given["weight"])
    return is_call(node, (aten.matmul.default, aten.mm.default)) and program.is_made_of_weights(given["other"])


def _again(build: Builder, node: fx.Node, new: dict[fx.Node, fx.Node]) -> fx.Node:
    """``node`` once more, of new inputs."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda old: new.get(old, old))
    return build.call(node.target, *args, **kwargs)  # type: ignore[arg-type]
