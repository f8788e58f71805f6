"""The abstract walk along the expert axis of one router, node by node, and the operands that must be permuted for it.

The effect on a node follows from the effects on its inputs. An operator that is not known is refused, so that what is
accepted is exact whatever model it comes from.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import arguments, is_call, is_tensor
from regraft.ir.pointwise import is_cast, is_pointwise
from regraft.passes.experts.axis_rules import RULES, Effects
from regraft.passes.experts.errors import PermutationError
from regraft.passes.experts.expert_axis import SAME, Along, Effect, Grouped, Numbers, Same, spanned
from regraft.passes.experts.operands import Operands, Recipe, is_uniform
from regraft.passes.experts.permutation import Permutation
from regraft.passes.refused import Refused

aten = torch.ops.aten


@dataclass
class Walk:
    """The effects of one permutation on the nodes of one router, in graph order.

    ``recipes[reader, operand]`` makes what ``reader`` must read in place of an operand that the router does not
    compute from its scores.
    """

    operands: Operands
    order: Permutation
    effects: dict[fx.Node, Effects] = field(default_factory=dict)
    recipes: dict[tuple[fx.Node, fx.Node], Recipe] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return len(self.order)

    def of(self, node: Any) -> Effect:
        """The effect on one tensor; what is outside the walk does not change. Raises ``Refused``."""
        effect = self.effects.get(node, SAME) if isinstance(node, fx.Node) else SAME
        if isinstance(effect, tuple):
            raise Refused("several results of the router are read as one", node)
        return effect

    def start(self, node: fx.Node) -> None:
        """Begin at the router's product, whose weight has a row or column for each expert. Raises ``Refused``."""
        given = arguments(node)
        if is_call(node, (aten.linear.default,)):
            self.give(node, given["weight"], Along(-2, self.experts))
            if given["bias"] is not None:
                self.give(node, given["bias"], Along(-1, self.experts))
        else:
            self.give(node, given["other"], Along(-1, self.experts))
        self.effects[node] = Along(-1, self.experts)

    def step(self, node: fx.Node) -> None:
        """Find the effect on ``node`` from those on its inputs. Raises ``Refused``."""
        try:
            self.effects[node] = self._effect(node)
        except PermutationError as error:
            raise Refused(str(error), node) from error

    def fit(self, node: fx.Node, source: fx.Node, wanted: Along | Grouped) -> None:
        """See that an operand of ``node`` moves as ``wanted``, or have it made so. Raises ``Refused``."""
        effect = self.of(source)
        if effect == wanted:
            return
        if isinstance(effect, Same):
            self.give(node, source, wanted)
            return
        whole_groups = isinstance(wanted, Grouped) and effect == Along(wanted.dim, wanted.parts)
        if not (whole_groups and is_uniform(source, wanted.dim + 1)):
            raise Refused("the router combines values that lie along different axes of the experts", node)

    def give(self, node: fx.Node, source: fx.Node, wanted: Along | Grouped) -> None:
        """Have ``node`` read ``source`` permuted; nothing to do for what is the same for every expert."""
        if all(is_uniform(source, dim) for dim in spanned(wanted)):
            return
        if isinstance(wanted, Grouped) and not is_uniform(source, wanted.dim + 1):
            raise Refused("the router reads a value for each expert of a group that it does not compute", source)
        order = self.whole_groups(wanted.parts)
        self.recipes[node, source] = self.operands.along(source, wanted.dim, order)

    def whole_groups(self, parts: int) -> Permutation:
        """The order of the ``parts`` groups. Raises ``PermutationError`` where the permutation crosses them."""
        return self.order if parts == self.experts else self.order.of_blocks(parts)

    def _effect(self, node: fx.Node) -> Effects:
        if is_call(node, (operator.getitem,)):
            return self._part(node)
        if all(self.effects.get(source, SAME) == SAME for source in node.all_input_nodes):
            return SAME
        rule = RULES.get(node.target)
        if rule is not None:
            return rule(self, node)
        if is_pointwise(node):
            return self._pointwise(node)
        raise Refused(f"the router uses {node.target} on values of the experts, which is not understood", node)

    def _part(self, node: fx.Node) -> Effect:
        source: Any = node.args[0]
        place: Any = node.args[1]
        held = self.effects.get(source, SAME)
        effect = held[place] if isinstance(held, tuple) else held
        if effect is None:
            raise Refused("the router uses the places of experts inside their groups, which is not understood", node)
        return effect

    def _pointwise(self, node: fx.Node) -> Effect:
        found = [self.of(source) for source in node.all_input_nodes]
        if any(isinstance(effect, Numbers) for effect in found):
            return self._numbers(node)
        moving = [effect for effect in found if isinstance(effect, (Along, Grouped))]
        result = next((effect for effect in moving if isinstance(effect, Grouped)), moving[0])
        for source in node.all_input_nodes:
            if is_tensor(source):
                self.fit(node, source, result)
        return result

    def _numbers(self, node: fx.Node) -> Effect:
        """Casts keep numbers; a bound that every number satisfies does not see them."""
        effect = self.of(node.args[0])
        if isinstance(effect, Numbers):
            given = arguments(node)
            if is_cast(node) or (is_call(node, (aten.clamp.default,)) and _holds_all(given, effect.parts)):
                return effect
            if is_call(node, (aten.lt.Scalar,)) and given["other"] >= effect.parts:
                return SAME
            if is_call(node, (aten.ge.Scalar,)) and (given["other"] <= 0 or given["other"] >= effect.parts):
                return SAME
        raise Refused("the router computes with the numbers of experts, which is not understood", node)


def _holds_all(given: dict[str, Any], parts: int) -> bool:
    """Whether the bounds of a clamp leave the numbers from 0 to ``parts - 1`` as they are."""
    low, high = given["min"], given["max"]
    fits_low = low is None or (isinstance(low, int) and low <= 0)
    return fits_low and (high is None or (isinstance(high, int) and high >= parts - 1))
