"""Recorded routing counts as JSON: ``expert_counts[domain]`` of some layers, with joint counts between them.

``layers_recorded`` names the layers; ``crosslayer_rank_aligned[domain]["0->7"]`` pairs the r-th choices of two layers
(not all pairs of choices), so that its sums are the counts. Each domain becomes one batch and one scenario.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.trace import Batch, Trace, whole_counts


def read_counts_json(path: Path | str) -> Trace:
    """Read the file; scenarios are its domains. Raises ``PlacementError`` for a file of another form."""
    path = Path(path)
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        layers = tuple(int(layer) for layer in recorded["layers_recorded"])
        domains: dict[str, Any] = recorded["expert_counts"]
        experts, top_k = int(recorded["num_experts"]), int(recorded["top_k"])
        batches = tuple(
            Batch(whole_counts(np.asarray(counts), f"{path.name!r}, domain {domain!r}"), scenario=domain)
            for domain, counts in domains.items()
        )
        joint = recorded.get("crosslayer_rank_aligned") or {}
        return Trace(
            experts,
            top_k,
            layers,
            batches,
            int(recorded.get("num_model_layers", layers[-1] + 1)),
            str(recorded.get("model", "")),
            {domain: _joint(pairs, layers) for domain, pairs in joint.items() if len(layers) > 1},
        )
    except PlacementError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OSError) as error:
        raise PlacementError(
            f"{path.name!r} holds no recorded counts: {error!r}; expected num_experts, top_k, layers_recorded and "
            "expert_counts"
        ) from error


def _joint(pairs: dict[str, Any], layers: tuple[int, ...]) -> NDArray[np.float64]:
    names = [f"{first}->{second}" for first, second in pairwise(layers)]
    return np.stack([np.asarray(pairs[name], dtype=np.float64) for name in names])
