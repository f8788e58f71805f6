"""Train the digits models: ``python -m bench.digits.train [--seeds 0 1 2] [--epochs 40]``, a minute or two a seed.

AdamW with a cosine schedule, label smoothing, and images that are shifted by up to one pixel. Images are drawn and
weights begin by the seed.
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

from bench.digits.model import SEEDS, SIZE, WEIGHTS, DigitsViT, Split, data, weights_of

_BATCH, _RATE, _DECAY, _SMOOTHING, _WARM_UP = 64, 2e-3, 0.05, 0.05, 0.1


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel, with what comes in empty."""
    padded = F.pad(images, (1, 1, 1, 1))[:, 0]
    rows, columns = (
        torch.randint(0, 3, (images.shape[0], 1), generator=generator) + torch.arange(SIZE) for _ in range(2)
    )
    sample = torch.arange(images.shape[0])[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]][:, None]


def train(seed: int, split: Split, epochs: int) -> DigitsViT:
    """One model, trained on ``split``."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = DigitsViT().train()
    optimizer = torch.optim.AdamW(model.parameters(), _RATE, weight_decay=_DECAY)
    steps = epochs * math.ceil(len(split.labels) / _BATCH)

    def rate(step: int) -> float:
        warm = step / (_WARM_UP * steps)
        return min(warm, 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in track(range(epochs), f"seed {seed}", console=Console(stderr=True)):
        for part in torch.randperm(len(split.labels), generator=generator).split(_BATCH):
            loss = F.cross_entropy(
                model(shifted(split.images[part], generator)), split.labels[part], label_smoothing=_SMOOTHING
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: DigitsViT, split: Split) -> float:
    """The share of images that get their class."""
    with torch.no_grad():
        return float((model(split.images).argmax(-1) == split.labels).float().mean())


def main(arguments: list[str] | None = None) -> int:
    """Train, say how well each model does on images that it has not seen, and write its weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args(arguments)
    first, rest = data()
    WEIGHTS.mkdir(exist_ok=True)
    for seed in options.seeds:
        model = train(seed, first, options.epochs)
        save_file(model.state_dict(), weights_of(seed))
        print(f"seed {seed}: {accuracy(model, first):.4f} of its own images, {accuracy(model, rest):.4f} of others")
    return 0


if __name__ == "__main__":
    sys.exit(main())
