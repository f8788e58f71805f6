"""How a model is compiled, as one value that every part of the face can be given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from regraft.build import Toolchain

if TYPE_CHECKING:
    from regraft.budget import Spending
    from regraft.experts import Placement


@dataclass(frozen=True)
class Options:
    """How a model is compiled; see ``regraft.compile``. ``maximum_entries`` bounds the captures that are kept."""

    target: str = "cpu"
    dynamic: Any = None
    verify: str = "each"
    maximum_entries: int = 8
    toolchain: Toolchain = field(default_factory=Toolchain)
    experts: Placement | None = None
    spending: Spending | None = None
    unpad: Callable[..., str] | None = None
    cuda_graphs: bool = False
    free_original: bool = False

    @property
    def sharded(self) -> bool:
        """Whether compiled code is one rank's part of the model, which the original cannot stand in for."""
        return self.experts is not None and self.experts.sharded
