"""Train the byte decoder: ``python -m bench.characters.train [--steps 700]``, a few minutes on one core.

AdamW with a cosine schedule on passages of docstrings; batches are drawn and weights begin by one seed.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from bench.characters.model import WEIGHTS, texts, untrained
from bench.decoder import PlainDecoder

_BATCH, _RATE, _DECAY, _WARM_UP = 8, 5e-3, 0.05, 0.05


def train(rows: Tensor, steps: int, seed: int = 0) -> PlainDecoder:
    """The model after ``steps`` batches of ``rows``."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = untrained().train()
    optimizer = torch.optim.AdamW(model.parameters(), _RATE, betas=(0.9, 0.98), weight_decay=_DECAY)

    def rate(step: int) -> float:
        return min(step / (_WARM_UP * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in track(range(steps), "training", console=Console(stderr=True)):
        loss = bits_of(model, rows[torch.randint(len(rows), (_BATCH,), generator=generator)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def bits_of(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """Mean bits a byte of the next bytes."""
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()) / math.log(2)


def main(arguments: list[str] | None = None) -> int:
    """Train, say what the model loses on texts that it has not seen, and write its weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700)
    options = parser.parse_args(arguments)
    rows, held_out = texts()
    model = train(rows, options.steps)
    save_file(model.state_dict(), WEIGHTS)
    with torch.no_grad():
        print(f"{len(rows)} passages; bits a byte of others: {bits_of(model, held_out):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
