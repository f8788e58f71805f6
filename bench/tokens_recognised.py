"""Systems that reduce tokens themselves, exact: eager, ``torch.compile`` and regraft on the CPU, in turn.

The models are those of ``tests/zoo``, each written from its formula, here at sizes of use; weights are random. Outputs
are compared with an fp64 run of the formula.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import regraft
from bench.timing import time_in_turn
from tests.zoo import catanet, hnet, masked_generation, pruning, super_tokens

_LARGEST_ERROR = 1e-5
Make = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


def _known(batch: int, length: int) -> Tensor:
    return torch.rand(batch, length) < 0.5


ROWS: dict[str, Make] = {
    "super tokens (SViT)": lambda: (super_tokens.SuperTokens(64, 4, 7, 8), (torch.randn(4, 64, 56, 56),)),
    "content-aware groups (CATANet)": lambda: (catanet.Grouping(40, 4, 64, 64), (torch.randn(2, 4096, 40),)),
    "dynamic chunks (H-Net)": lambda: (hnet.HNet(384, 6, 160), (torch.randn(8, 256, 384),)),
    "a predictor's choice (DynamicViT)": lambda: (pruning.DynamicViT(384, 6, 138), (torch.randn(8, 197, 384),)),
    "leaves dropped (DependencyViT-Lite)": lambda: (pruning.LeafPruning(384, 6, 138), (torch.randn(8, 197, 384),)),
    "coarse to fine (Hi-MAR)": lambda: (
        masked_generation.CoarseToFine(64, 384, 6),
        (torch.randn(4, 320, 384), _known(4, 320)),
    ),
}


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One row: milliseconds of each, ratios to regraft, its error, and what it recognised."""
    torch.manual_seed(0)
    model, inputs = ROWS[name]()
    model.eval()
    torch._dynamo.reset()
    fast = regraft.compile(model, inputs)
    models: dict[str, Callable[..., Any]] = {
        "eager": model,
        "torch.compile": torch.compile(model, dynamic=False),
        "regraft": fast,
    }
    calls: dict[str, Callable[[], Any]] = {peer: (lambda run=run: run(*inputs)) for peer, run in models.items()}
    with torch.no_grad():
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        wanted = copy.deepcopy(model).double()(*wide)
        error = float((fast(*inputs).double() - wanted).norm() / wanted.norm())
        times = {peer: timing.median for peer, timing in time_in_turn(calls, rounds=rounds, warm_up=1).items()}
    ratios = {peer: times[peer] / times["regraft"] for peer in ("eager", "torch.compile")}
    found = {kind: count for kind, count in fast.report.recognized.items() if count}
    row = {"row": name, "milliseconds": times, "ratios": ratios, "error": error, "recognised": found}
    return {**row, "right": error <= _LARGEST_ERROR}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table of medians and ratios."""
    table = Table(title="systems recognised: median ms; ratios above 1: regraft is faster")
    for heading in ("row", *rows[0]["milliseconds"], "eager /", "torch.compile /", "relative error", "recognised"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = [f"{time:.2f}" for time in row["milliseconds"].values()]
        ratios = [f"{ratio:.2f}" for ratio in row["ratios"].values()]
        found = ", ".join(f"{count} {kind}" for kind, count in row["recognised"].items())
        table.add_row(row["row"], *times, *ratios, f"{row['error']:.0e}", found)
    console.print(table)
