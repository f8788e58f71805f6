"""SGLang's recording, a torch file: mapped into memory, so that a batch is read when it is asked for."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.readers.sglang import recorded_layers, trace_of_passes, trace_of_statistics
from regraft.solvers.placement.trace import Trace

_COUNT, _LAYOUT = "logical_count", "logical_count_layout"


@dataclass(frozen=True)
class SglangTrace:
    """The file as a ``Stored`` trace; a batch is a step with any count, or a recorded pass."""

    path: Path
    top_k: int
    layers: tuple[int, ...]
    #: Steps or records that are batches; None where the recording is one batch as a whole.
    steps: tuple[int, ...] | None
    passes: bool
    scenario: str = "all"

    @classmethod
    def open(cls, path: Path, top_k: int, layers: tuple[int, ...] | None = None) -> SglangTrace:
        """Look through the file; without ``layers`` those with any count are taken. Raises ``PlacementError``."""
        loaded = _load(path)
        if not isinstance(loaded, dict):
            raise PlacementError(
                f"{path.name!r} holds a {type(loaded).__name__}; expected the dictionary that SGLang's recorder writes"
            )
        with _stated(path):
            passes = "records" in loaded
            steps = tuple(range(len(loaded["records"]))) if passes else _steps(loaded)
            if layers is None:
                found = [recorded_layers(_part(loaded, passes, at)) for at in (steps or [None])]
                layers = tuple(sorted({layer for own in found for layer in own}))
                if not layers:
                    raise PlacementError(
                        f"{path.name!r} holds zeros; expected tokens; record while requests are served"
                    )
            opened = cls(path, top_k, layers, steps, passes)
            opened._trace(loaded, range(min(1, len(opened.scenarios))))  # what is malformed is said now
            return opened

    @property
    def scenarios(self) -> tuple[str, ...]:
        """The scenario of each batch."""
        return (self.scenario,) * (1 if self.steps is None else len(self.steps))

    @property
    def num_layers(self) -> int:
        """How many expert layers were recorded."""
        return len(self.layers)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    def read(self, numbers: Sequence[int]) -> Trace:
        """These batches in this order."""
        with _stated(self.path):
            return self._trace(_load(self.path), numbers)

    def transitions(self) -> dict[str, NDArray[np.float64]]:
        """None: they follow from the tokens, where these were recorded."""
        return {}

    def _trace(self, loaded: dict[str, Any], numbers: Sequence[int]) -> Trace:
        chosen = None if self.steps is None else [self.steps[number] for number in numbers]
        part = _part(loaded, self.passes, chosen)
        return (trace_of_passes if self.passes else trace_of_statistics)(part, self.top_k, self.layers, self.scenario)


def _steps(loaded: dict[str, Any]) -> tuple[int, ...] | None:
    """Steps with any count; None where there are no steps to tell apart. One step is looked at, at a time."""
    count = loaded.get(_COUNT)
    if count is None or count.ndim != 3 or loaded.get(_LAYOUT) == "rank_layer_expert":
        return None
    return tuple(number for number, step in enumerate(count) if bool((step != 0).any()))


def _part(loaded: dict[str, Any], passes: bool, steps: Sequence[int] | int | None) -> dict[str, Any]:
    """The recording with these steps or records alone, as numpy arrays; all of it for None."""
    chosen = [steps] if isinstance(steps, int) else steps
    part = dict(loaded)
    if chosen is not None and passes:
        part["records"] = [loaded["records"][number] for number in chosen]
    elif chosen is not None:
        part[_COUNT] = loaded[_COUNT][list(chosen)]
    return {key: _arrays(value) for key, value in part.items()}


def _load(path: Path) -> Any:
    """A torch file's contents, tensors mapped into memory; nothing in it is executed."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        said = (str(error).strip().splitlines() or ["no message"])[0]
        raise PlacementError(
            f"torch file {path.name!r} cannot be read as tensors alone: {said}; expected SGLang's recording"
        ) from error


@contextmanager
def _stated(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise PlacementError(f"{path.name!r} is no recording of SGLang: {error!r} is missing or malformed") from error


def _arrays(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, dict):
        return {key: _arrays(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_arrays(entry) for entry in value]
    return value
