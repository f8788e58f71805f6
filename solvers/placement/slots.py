"""How many slots each rank has in each layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.model import MoeModel

#: Slots of one rank, one number a layer.
SlotCounts = NDArray[np.int64]


def uniform_slots(model: MoeModel, cluster: Cluster, redundant: int = 0) -> SlotCounts:
    """The same slots in every layer: experts and ``redundant`` copies, dealt evenly to the ranks.

    Raises ``PlacementError`` where the ranks do not divide them.
    """
    total, ranks = model.num_experts + redundant, cluster.num_ranks
    if redundant < 0:
        raise PlacementError(f"{redundant} redundant slots were given; expected 0 or more")
    if total % ranks:
        nearest = -(-total // ranks) * ranks - model.num_experts
        raise PlacementError(
            f"{model.num_experts} experts and {redundant} redundant slots do not divide among {ranks} ranks; "
            f"every rank holds equally many slots: use {nearest} redundant slots"
        )
    if total // ranks > model.num_experts:
        raise PlacementError(
            f"{total // ranks} slots per rank were given for {model.num_experts} experts; "
            "no rank may hold an expert twice: use fewer redundant slots"
        )
    return np.full(model.num_layers, total // ranks, dtype=np.int64)
