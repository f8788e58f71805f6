"""Speed on the CPU: reduced and unpadded encoders beside the exact ones, ``torch.compile`` and eager, in turn.

Vision transformers have random weights: their attention means nothing, and only their time is read. MiniLM has its real
ones, on batches of paragraphs whose lengths are what they are, compiled with ``unpad=True``: a single paragraph has no
padding, and is to run as it did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import regraft
from bench.models import minilm_encoder
from bench.timing import time_in_turn
from bench.topics import batch_of_paragraphs
from regraft.build import Toolchain
from regraft.compiled import CompiledModule
from regraft.passes.base import Pass
from regraft.passes.pipeline import default_pipeline
from regraft.passes.tokens.reduce import ReduceTokens

_LONGEST = 256
_AS_FAST = 0.97  # the same code twice is timed to differ by as much
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


@dataclass(frozen=True)
class Case:
    """A model with its inputs, the pass that makes it smaller, and the ratio to the exact one that it must reach.
    Without a pass it is unpadded, and the outputs must be equal, to 1e-5."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    smaller: Pass | None
    wanted: float
    more: dict[str, Any] | None = None


class Classifier(nn.Module):
    """Logits of a vision transformer."""

    def __init__(self, settings: dict[str, int]) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        self.model = ViTForImageClassification(ViTConfig(**settings, num_labels=1000))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits ``[batch, 1000]``."""
        found: Tensor = self.model(pixel_values=pixel_values).logits
        return found


class SentenceEncoder(nn.Module):
    """The mean of MiniLM's last states over the tokens that are there, as its users take it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings ``[batch, 384]``."""
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


def vision(settings: dict[str, int], batch: int, removed: int, wanted: float) -> Case:
    """A vision transformer on 224x224 images."""
    torch.manual_seed(0)
    model = Classifier(settings).eval()
    return Case(model, (torch.randn(batch, 3, 224, 224),), ReduceTokens(removed), wanted)


def paragraphs(count: int, wanted: float) -> Case:
    """MiniLM on paragraphs of their own lengths, padded to the longest."""
    model, tokenizer = minilm_encoder()
    given = tokenizer(
        batch_of_paragraphs(count, 0), padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt"
    )
    mask = given["attention_mask"]
    more = {"tokens": int(mask.sum()), "length": mask.shape[1], "fill": float(mask.float().mean())}
    return Case(SentenceEncoder(model).eval(), (given["input_ids"], mask), None, wanted, more)


ROWS: dict[str, Callable[[], Case]] = {
    "vit-b16 x4, r=8": lambda: vision({}, 4, 8, 1.28),
    "vit-l16 x4, r=8": lambda: vision(_LARGE, 4, 8, 1.88),
    "minilm x32, unpadded": lambda: paragraphs(32, 1.5),
    "minilm x8, unpadded": lambda: paragraphs(8, 1.5),
    "vit-b16 x1, r=8": lambda: vision({}, 1, 8, 1.0),
    "minilm x1, unpadded": lambda: paragraphs(1, _AS_FAST),
}


def exact(case: Case) -> CompiledModule:
    """The compiled model with all its tokens."""
    return regraft.compile(case.model, case.inputs, verify="off")


def smaller(case: Case) -> CompiledModule:
    """The compiled model with fewer."""
    if case.smaller is None:
        return regraft.compile(case.model, case.inputs, verify="off", unpad=True)
    passes = (case.smaller,)
    toolchain = Toolchain(pipeline=lambda target: default_pipeline(target, tokens=passes))
    return regraft.compile(case.model, case.inputs, verify="off", toolchain=toolchain)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One row: milliseconds of each peer, ratios, and how far the outputs are from the exact ones."""
    case = ROWS[name]()
    torch._dynamo.reset()
    peer = torch.compile(case.model, dynamic=False)
    fast = smaller(case)
    models = {"eager": case.model, "torch.compile": peer, "exact": exact(case), "smaller": fast}
    calls: dict[str, Callable[[], Any]] = {
        peer: (lambda model=model: model(*case.inputs)) for peer, model in models.items()
    }
    with torch.no_grad():
        outputs = {peer: call() for peer, call in calls.items()}
        times = {peer: timing.median for peer, timing in time_in_turn(calls, rounds=rounds, warm_up=1).items()}
    error = float((outputs["smaller"] - outputs["eager"]).norm() / outputs["eager"].norm())
    ratio = times["exact"] / times["smaller"]
    right = ratio >= case.wanted and (case.smaller is not None or error <= 1e-5)
    ratios = {peer: times[peer] / times["smaller"] for peer in ("eager", "torch.compile", "exact")}
    row = {"row": name, "milliseconds": times, "ratios": ratios, "wanted": case.wanted, "error": error, "right": right}
    return {**row, "events": [event.reason for event in fast.report.events], **(case.more or {})}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table of medians and ratios."""
    table = Table(title="median ms; ratios above 1: the smaller one is faster")
    peers = list(rows[0]["milliseconds"])
    for heading in ("row", *peers, "eager /", "torch.compile /", "exact /", "wanted", "relative error", "fill"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = [f"{row['milliseconds'][peer]:.2f}" for peer in peers]
        ratios = [f"{ratio:.3f}" for ratio in row["ratios"].values()]
        fill = f"{row['fill']:.2f}" if "fill" in row else "-"
        table.add_row(row["row"], *times, *ratios, f"{row['wanted']:.2f}", f"{row['error']:.1e}", fill)
    console.print(table)
