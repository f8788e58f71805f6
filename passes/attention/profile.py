"""What the heads of a model do on calibration data: how much they give, and how near they look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir import ops
from regraft.ir.mask import parse, to_dense
from regraft.ir.nodes import arguments
from regraft.ir.ops.attention_scores import of_rows, scores_of
from regraft.ir.program import Program
from regraft.passes.attention.lossy import attentions

_SCORES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class HeadProfile:
    """Of one attention, for each head: ``norm``, the mean length of its outputs over the mean of its layer's heads
    (arXiv:2504.03889); ``near``, the share of its weight within the window; ``sunk``, the share on the sinks in front
    of that. Means over batches, rows that see keys, and samples."""

    norm: tuple[float, ...]
    near: tuple[float, ...]
    sunk: tuple[float, ...]


def profile_heads(
    program: Program, window: int, sinks: int, batches: Sequence[Sequence[Any]] | None = None
) -> list[HeadProfile]:
    """A profile of each attention, in the order of the graph. ``batches`` are flat user inputs; without them the inputs
    that the program was captured with."""
    recorder = _Recorder(program, window, sinks)
    for batch in batches or [program.example]:
        recorder.measure(batch)
    return [recorder.profile(site) for site in attentions(program)]


class _Recorder(fx.Interpreter):
    """Runs a program and adds up what its heads do."""

    def __init__(self, program: Program, window: int, sinks: int) -> None:
        program.module.recompile()
        super().__init__(program.module)
        self.program, self.window, self.sinks = program, window, sinks
        self.sums: dict[fx.Node, Tensor] = {}
        self.batches = 0

    def measure(self, batch: Sequence[Any]) -> None:
        """Run one batch."""
        users = dict(zip((node.name for node in self.program.user_inputs()), batch, strict=True))
        names = (
            (node, self.program.weight_name(node)) for node in self.program.graph.nodes if node.op == "placeholder"
        )
        held = [users[node.name] if name is None else self.program.weights.get(name) for node, name in names]
        self.batches += 1
        with torch.no_grad():
            self.run(*held)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is ops.attention:
            given = fx.map_arg(arguments(n), lambda node: self.env[node])
            found = torch.stack((_norms(result), *_shares(given, self.window, self.sinks)))
            self.sums[n] = self.sums.get(n, torch.zeros_like(found)) + found
        return result

    def profile(self, site: fx.Node) -> HeadProfile:
        """The means of one site."""
        norm, near, sunk = (self.sums[site] / self.batches).tolist()
        return HeadProfile(tuple(norm), tuple(near), tuple(sunk))


def _norms(out: Tensor) -> Tensor:
    """``[heads]``: mean length of a head's outputs over the mean of all heads'."""
    lengths: Tensor = out.double().norm(dim=-1).nan_to_num(0.0).mean((0, 2))
    return lengths / lengths.mean().clamp(min=1e-30)


def _shares(given: dict[str, Any], window: int, sinks: int) -> tuple[Tensor, Tensor]:
    """``[heads]`` each: the weight within the window, and on the sinks in front of it."""
    query, key = given["query"].float(), given["key"].float()
    batch, heads, length = query.shape[:3]
    keys = key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    seen = to_dense(parse(given["mask"]), given["mask_tensors"], batch, heads, length, keys, query.device)
    step = max(1, _SCORES_AT_ONCE // max(1, batch * heads * keys))
    totals = torch.zeros(2, heads, dtype=torch.float64)
    rows = torch.zeros(heads, dtype=torch.float64)
    place = torch.arange(keys)
    for start in range(0, length, step):
        some = slice(start, start + step)
        bias = of_rows(given["bias"], some)
        scores = scores_of(
            query[:, :, some], key, given["scale"], given["softcap"], bias, given["slopes"], first_row=start
        )
        row = torch.arange(length)[some, None] + (keys - length)
        scores = scores.masked_fill(~seen[:, :, some], float("-inf"))
        weights = scores.softmax(-1).nan_to_num(0.0).double()
        near = (place - row).abs() < window
        totals[0] += (weights * near).sum((0, 2, 3))
        totals[1] += (weights * (~near & (place < sinks))).sum((0, 2, 3))
        rows += seen[:, :, some].any(-1).sum((0, 2))
    shares = totals / rows.clamp(min=1)
    return shares[0], shares[1]
