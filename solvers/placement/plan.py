"""A placement plan: which expert lies in each slot of each rank, layer by layer; a versioned JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.whole import write_text

FORMAT = "regraft.plan"
VERSION = 1
Slots = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """``slots[layer]`` is ``[ranks, slots per rank]``, the expert in each slot; -1 is an empty slot.

    Slot ``s`` of rank ``r`` is the layer's physical slot ``r * slots_per_rank + s``. ``layer_ids`` are true layer
    positions among ``num_hidden_layers``. Engines want no empty slots; ``constraints.validate`` says so.
    """

    num_experts: int
    layer_ids: tuple[int, ...]
    num_hidden_layers: int
    slots: tuple[Slots, ...]
    model_name: str = ""
    method: str = ""

    def __post_init__(self) -> None:
        if len(self.slots) != len(self.layer_ids) or not self.slots:
            raise PlacementError(
                f"a plan with {len(self.slots)} layers of slots for {len(self.layer_ids)} expert layers was given; "
                "expected one table a layer"
            )
        for layer, table in zip(self.layer_ids, self.slots, strict=True):
            if table.ndim != 2 or table.shape[0] != self.num_ranks:
                raise PlacementError(
                    f"layer {layer} has slots of shape {table.shape}; expected [{self.num_ranks} ranks, slots]: "
                    "every rank holds equally many slots of a layer"
                )
            if table.size and (table.max() >= self.num_experts or table.min() < -1):
                raise PlacementError(
                    f"layer {layer} places expert {int(table.max())} (lowest {int(table.min())}); "
                    f"expected experts 0 to {self.num_experts - 1}"
                )

    @classmethod
    def of_array(
        cls,
        array: NDArray[np.integer],
        num_experts: int,
        num_ranks: int,
        layer_ids: Sequence[int] | None = None,
        num_hidden_layers: int = 0,
        model_name: str = "",
        method: str = "",
    ) -> Plan:
        """A plan from physical-to-logical maps ``[layers, slots]``. Raises where ranks do not divide the slots."""
        if array.ndim != 2 or array.shape[1] % num_ranks:
            raise PlacementError(
                f"slots of shape {array.shape} were given for {num_ranks} ranks; "
                "expected [layers, slots] with as many slots on every rank"
            )
        layers = tuple(range(array.shape[0])) if layer_ids is None else tuple(int(layer) for layer in layer_ids)
        tables = tuple(row.reshape(num_ranks, -1).astype(np.int64) for row in array)
        return cls(num_experts, layers, num_hidden_layers or layers[-1] + 1, tables, model_name, method)

    @property
    def num_layers(self) -> int:
        """Expert layers."""
        return len(self.slots)

    @property
    def num_ranks(self) -> int:
        """Ranks that the plan is for."""
        return int(self.slots[0].shape[0])

    @cached_property
    def slots_per_rank(self) -> tuple[int, ...]:
        """Slots of one rank, by layer."""
        return tuple(int(table.shape[1]) for table in self.slots)

    @cached_property
    def array(self) -> Slots:
        """Physical-to-logical maps ``[layers, slots]``. Raises ``PlacementError`` where layers differ in slots."""
        if len(set(self.slots_per_rank)) > 1:
            raise PlacementError(
                f"a plan with {min(self.slots_per_rank)} to {max(self.slots_per_rank)} slots per rank was given; "
                "this use wants equally many in every layer; plan with a uniform number of slots"
            )
        return np.stack([table.reshape(-1) for table in self.slots])

    @cached_property
    def replicas(self) -> NDArray[np.int64]:
        """Copies of each expert, ``[layers, experts]``."""
        return np.stack([np.bincount(table[table >= 0], minlength=self.num_experts) for table in self.slots])

    def presence(self, layer: int) -> NDArray[np.bool_]:
        """``[ranks, experts]``: whether the rank holds the expert in this layer (by position in the plan)."""
        held = np.zeros((self.num_ranks, self.num_experts), dtype=bool)
        rank, slot = np.nonzero(self.slots[layer] >= 0)
        held[rank, self.slots[layer][rank, slot]] = True
        return held

    def to_json(self) -> str:
        """The plan file's text."""
        return json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "model_name": self.model_name,
                "method": self.method,
                "num_experts": self.num_experts,
                "num_ranks": self.num_ranks,
                "num_hidden_layers": self.num_hidden_layers,
                "layers": [
                    {"layer_id": layer, "slots": table.tolist()}
                    for layer, table in zip(self.layer_ids, self.slots, strict=True)
                ],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan file's text. Raises ``PlacementError`` for another format or version, or a wrong field."""
        try:
            facts: dict[str, Any] = json.loads(text)
            if facts.get("format") != FORMAT or facts.get("version") != VERSION:
                raise PlacementError(
                    f"a file of format {facts.get('format')!r} version {facts.get('version')!r} was given; "
                    f"expected {FORMAT} version {VERSION}"
                )
            tables = tuple(_table(layer["slots"]) for layer in facts["layers"])
            layers = tuple(int(layer["layer_id"]) for layer in facts["layers"])
            plan = cls(
                int(facts["num_experts"]), layers, int(facts["num_hidden_layers"]), tables,
                str(facts.get("model_name", "")), str(facts.get("method", "")),
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise PlacementError(f"a plan file that cannot be read was given: {error!r}; expected {FORMAT}") from error
        if plan.num_ranks != facts.get("num_ranks"):
            raise PlacementError(f"a plan for {facts.get('num_ranks')} ranks holds slots for {plan.num_ranks}")
        return plan

    def save(self, path: Path | str) -> None:
        """Write the plan file; it appears whole."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read a plan file. Raises ``PlacementError``."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PlacementError(f"plan file {Path(path).name!r} cannot be read: {error}") from error


def _table(rows: Any) -> Slots:
    try:
        table = np.asarray(rows)
    except ValueError as error:
        raise PlacementError("a plan with ranks of unequal slots was given; expected equally many on each") from error
    if table.ndim != 2 or table.dtype.kind not in "iu":
        raise PlacementError("a plan layer without a table of whole numbers was given; expected [ranks, slots]")
    return table.astype(np.int64)
