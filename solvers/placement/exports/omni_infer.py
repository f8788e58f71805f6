"""omni-infer: a ``.npy`` of int32 0 and 1, ``[ranks, expert layers, experts]``. Layers may differ in slots.

The pattern does not say in which slot an expert lies: reading back gives experts in ascending order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.exports.files import check_layers
from regraft.solvers.placement.plan import Plan, Slots
from regraft.solvers.placement.repair import duplicates
from regraft.solvers.placement.whole import replacing


def omni_pattern(plan: Plan) -> NDArray[np.int32]:
    """What the file holds. Raises ``PlacementError`` for an expert twice on a rank, which it cannot say."""
    if any(duplicates(table) for table in plan.slots):
        raise PlacementError("a plan with an expert twice on a rank was given; omni-infer's pattern cannot say that")
    held = np.stack([plan.presence(at) for at in range(plan.num_layers)], axis=1)
    return held.astype(np.int32)


def write_omni_infer(plan: Plan, path: Path | str) -> None:
    """Write the file; it appears whole."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, omni_pattern(plan))


def read_omni_infer(path: Path | str, layer_ids: Sequence[int], num_hidden_layers: int) -> Plan:
    """Read the file back. Raises ``PlacementError`` for other arrays, and for ranks of unequal slots in a layer."""
    name = Path(path).name
    try:
        pattern = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise PlacementError(f"{name!r} cannot be read: {error}; expected a .npy of 0 and 1") from error
    if pattern.ndim != 3 or not np.isin(pattern, (0, 1)).all():
        raise PlacementError(f"{name!r} is of shape {pattern.shape}; expected 0 and 1 by [rank, layer, expert]")
    check_layers(pattern.shape[1], layer_ids, name)
    tables = tuple(_table(pattern[:, at], layer, name) for at, layer in enumerate(layer_ids))
    return Plan(int(pattern.shape[2]), tuple(layer_ids), num_hidden_layers, tables)


def _table(held: NDArray[np.int32], layer: int, name: str) -> Slots:
    size = held.sum(1)
    if (size != size[0]).any():
        raise PlacementError(
            f"{name!r}, layer {layer} gives ranks {size.min()} to {size.max()} experts; expected equal"
        )
    return np.nonzero(held)[1].reshape(len(held), -1).astype(np.int64)
