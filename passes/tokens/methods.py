"""The methods of token reduction: each is a few words about what is compared, scored and matched."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.ir.ops.matchings import DROPPING


@dataclass(frozen=True)
class Method:
    """``metric``: what is compared, "key" (mean over heads, before rotation), "stream" (the residual stream) or
    "random" (a constant). ``score``: "" for none, a kind of ``regraft::token_scores``, or "random" (a constant);
    ``running``: the mean with that of the sites before, the nearer the more. ``matching``: a matching of
    ``regraft::plan_merge``."""

    metric: str
    matching: str
    score: str = ""
    margin: float = 0.0
    running: bool = False

    @property
    def drops(self) -> bool:
        """Whether tokens go without a trace: then nothing can be put back, and sizes stay one."""
        return self.matching in DROPPING


#: Name -> method. The comments say where each is from; the last four are baselines.
METHODS: dict[str, Method] = {
    "tome": Method("key", "bipartite"),  # Bolya et al., ICLR 2023
    "tome-stream": Method("stream", "bipartite"),
    "pitome": Method("key", "energy", margin=0.5),  # Tran et al., NeurIPS 2024
    "evit": Method("key", "fuse", score="cls"),  # Liang et al., ICLR 2022
    "prune-cls": Method("key", "drop", score="cls"),
    "prune-received": Method("key", "drop", score="received"),
    "prune-flow": Method("key", "drop", score="flow", running=True),  # Tong et al., "FlowCut", NeurIPS 2025
    "prune-last": Method("key", "drop", score="last"),  # Chen et al., "FastV", ECCV 2024
    "divprune": Method("key", "diverse"),  # Alvar et al., CVPR 2025
    "dart": Method("key", "distinct", score="norm"),  # Wen et al., 2025
    "merge-random": Method("random", "bipartite"),
    "prune-random": Method("key", "drop", score="random"),
    "fuse-random": Method("key", "fuse", score="random"),
    "grid": Method("key", "grid"),
}
