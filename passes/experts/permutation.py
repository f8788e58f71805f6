"""A permutation of the experts of one layer, and how a placement plan is read as one per layer.

``order[slot]`` is the expert that comes to lie in ``slot``. A tensor with an entry for each expert becomes
``tensor[order]``; a number of an expert becomes its slot. Router groups are equal contiguous blocks of experts: they
stay whole when every block of slots holds the experts of one group, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from regraft.passes.experts.errors import PermutationError
from regraft.solvers.placement.plan import Plan


@dataclass(frozen=True)
class Permutation:
    """``order[slot]`` is the expert in ``slot``; every expert once. Raises ``PermutationError``."""

    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.order or sorted(self.order) != list(range(len(self.order))):
            raise PermutationError(
                f"an order of {len(self.order)} experts that does not name each of 0 to {len(self.order) - 1} once "
                "was given; expected a permutation"
            )

    def __len__(self) -> int:
        return len(self.order)

    @property
    def is_identity(self) -> bool:
        """Whether every expert stays where it is."""
        return self.order == tuple(range(len(self)))

    @cached_property
    def inverse(self) -> tuple[int, ...]:
        """``inverse[expert]`` is the slot of the expert."""
        slots = [0] * len(self)
        for slot, expert in enumerate(self.order):
            slots[expert] = slot
        return tuple(slots)

    def of_blocks(self, blocks: int) -> Permutation:
        """The order of ``blocks`` equal groups of experts. Raises ``PermutationError`` where a group is torn apart."""
        size, rest = divmod(len(self), blocks)
        if rest:
            raise PermutationError(f"{blocks} router groups do not divide {len(self)} experts")
        groups = np.asarray(self.order).reshape(blocks, size) // size
        torn = np.flatnonzero((groups != groups[:, :1]).any(axis=1))
        if torn.size:
            found = sorted({int(group) for group in groups[torn[0]]})
            raise PermutationError(
                f"the permutation crosses router groups: slots {torn[0] * size} to {torn[0] * size + size - 1} hold "
                f"experts of the groups {', '.join(map(str, found))} of {blocks}, and the router limits how many "
                'groups a token may use; plan with groups="block", which keeps each group in a block of slots'
            )
        return Permutation(tuple(int(group) for group in groups[:, 0]))


def permutations_of(plan: Plan) -> dict[int, Permutation]:
    """True layer id -> permutation. Raises ``PermutationError`` for replicas, empty slots and missing experts."""
    found = {}
    for layer, table in zip(plan.layer_ids, plan.slots, strict=True):
        flat = [int(expert) for expert in table.reshape(-1)]
        copies = np.bincount([expert for expert in flat if expert >= 0], minlength=plan.num_experts)
        if (copies > 1).any():
            raise PermutationError(
                f"the plan holds {copies.max()} copies of expert {copies.argmax()} in layer {layer}, and a "
                "permutation has each expert once; plan without redundant slots, or give the plan to the engine"
            )
        if (copies == 0).any():
            raise PermutationError(
                f"the plan has no slot for expert {copies.argmin()} in layer {layer}; "
                f"expected each of {plan.num_experts} experts once"
            )
        if min(flat) < 0:
            raise PermutationError(f"the plan leaves {flat.count(-1)} slots of layer {layer} empty; expected none")
        found[layer] = Permutation(tuple(flat))
    return found
