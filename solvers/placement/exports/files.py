"""What the engines' files have in common: errors name the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.plan import Plan, Slots


def read_text(path: Path | str) -> str:
    """A file's text. Raises ``PlacementError``."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlacementError(f"{Path(path).name!r} cannot be read: {error}") from error


def read_json(path: Path | str) -> Any:
    """A JSON file's contents. Raises ``PlacementError``."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise PlacementError(f"{Path(path).name!r} is no JSON: {error}; expected an engine's placement file") from error


def whole_rows(rows: Any, name: str) -> Slots:
    """A table of expert numbers, ``[layers, slots]``. Raises ``PlacementError`` for anything else."""
    try:
        table = np.asarray(rows)
    except ValueError as error:
        raise PlacementError(f"{name!r} has layers of unequal slots; expected equally many in each") from error
    if table.ndim != 2 or table.dtype.kind not in "iu" or table.size == 0:
        raise PlacementError(f"{name!r} holds no table of whole numbers; expected [layers, slots]")
    if table.min() < 0:
        raise PlacementError(f"{name!r} has an expert {table.min()}; expected numbers from 0")
    return table.astype(np.int64)


def full_slots(plan: Plan, engine: str) -> Slots:
    """The plan's maps ``[layers, slots]``. Raises where slots are empty or differ between layers."""
    table = plan.array
    if (table < 0).any():
        raise PlacementError(
            f"a plan with empty slots was given; {engine} wants every slot filled: add redundant copies"
        )
    return table


def check_layers(found: int, layer_ids: Sequence[int], name: str) -> None:
    """Raise ``PlacementError`` where a file has another number of expert layers than the model."""
    if found != len(layer_ids):
        raise PlacementError(
            f"{name!r} has {found} layers; the model has {len(layer_ids)} expert layers: is it of another model, "
            "or does it count dense layers too?"
        )
