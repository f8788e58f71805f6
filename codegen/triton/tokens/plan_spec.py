"""What a kernel of a plan is emitted for: everything about a site that its text depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.rowwise.operators import FLOATS
from regraft.ir.nodes import arguments, concrete, dtype, is_call, rank, shape, tensor_value
from regraft.ir.ops.matchings import PAIRED

aten = torch.ops.aten
#: Matchings with a kernel. "diverse" takes as many steps as there are tokens, and "grid" is a baseline.
MATCHINGS = ("bipartite", "energy", "distinct", "drop", "fuse")
#: Up to this many tokens the one program of a sample also takes the mean over heads, instead of a call before it.
MOST_WITH_HEADS = 1024


@dataclass(frozen=True)
class PlanSpec:
    """A plan of ``regraft::plan_merge``, by its names. ``heads``: the metric is ``[batch, heads, tokens, width]``, and
    its mean over heads is meant. ``scores``: their element type, None where there are none. The numbers of samples,
    tokens, heads, of tokens that go and that are protected, and the margin reach the kernel at run time."""

    dtype: torch.dtype
    width: int
    matching: str = "bipartite"
    heads: bool = False
    scores: torch.dtype | None = None
    keep: bool = False
    causal: bool = False

    def __post_init__(self) -> None:
        if self.matching not in MATCHINGS:
            raise Unfusable(f"plans by the matching {self.matching!r} have no kernel: {_REASONS[self.matching]}")
        if self.dtype not in FLOATS or self.scores not in (None, *FLOATS):
            raise Unfusable(f"a plan from a metric in {self.dtype} and scores in {self.scores}")

    @property
    def paired(self) -> bool:
        """Whether what goes merges into a token of its own choice."""
        return self.matching in PAIRED

    @property
    def compares(self) -> bool:
        """Whether tokens are compared with each other."""
        return self.matching in ("bipartite", "energy", "distinct")

    @property
    def scales(self) -> bool:
        """Whether squares of the metric's numbers can leave the range of fp32: those of fp16 cannot."""
        return self.compares and self.dtype != torch.float16

    @property
    def operands(self) -> tuple[str, ...]:
        """The operator's arguments in order."""
        found = ["metric", *(["scores"] if self.scores else []), *(["keep"] if self.keep else [])]
        return (*found, "remove", "prefix", "suffix", *(["margin"] if self.matching == "energy" else []))


_REASONS = {
    "diverse": "it takes one token after the other",
    "grid": "it looks at nothing, and is a baseline",
}


def plan_spec(node: fx.Node) -> tuple[PlanSpec, dict[str, Any]]:
    """The spec of a ``regraft::plan_merge`` site, and the arguments of its kernel by name; raises ``Unfusable`` with
    the reason where none is emitted for it."""
    given = arguments(node)
    metric, scores, keep = (given[name] for name in ("metric", "scores", "keep"))
    for name in ("scores", "keep"):
        if given[name] is not None and rank(given[name]) != 2:
            raise Unfusable(f"{node.name}: {name} are {list(shape(given[name]))}")
    if keep is not None and dtype(keep) != torch.bool:
        raise Unfusable(f"{node.name}: keep is {dtype(keep)}")
    if not isinstance(tensor_value(metric).shape[2], int):
        raise Unfusable(f"{node.name}: the width of the metric is symbolic")
    heads = _heads(metric)
    spec = PlanSpec(
        dtype=dtype(metric),
        width=int(shape(metric)[2]),
        matching=given["matching"],
        heads=heads is not None,
        scores=dtype(scores) if scores is not None else None,
        keep=keep is not None,
        causal=given["causal"] and given["matching"] in ("bipartite", "energy"),
    )
    return spec, {**given, "metric": heads if heads is not None else metric}


def _heads(metric: fx.Node) -> fx.Node | None:
    """What a metric is the mean over heads of, where the kernel of the plan takes it and nobody else reads it."""
    if not is_call(metric, (aten.mean.dim,)) or len(metric.users) != 1:
        return None
    given = arguments(metric)
    source: fx.Node = given["self"]
    over_heads = rank(source) == 4 and list(given["dim"]) in ([-3], [1]) and not given["keepdim"]
    same = dtype(source) == dtype(metric)
    return source if over_heads and same and concrete(shape(source)[2]) <= MOST_WITH_HEADS else None
