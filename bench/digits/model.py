"""The model and its data: 64 overlapping patches and a class token, four blocks of width 48."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights"
SEEDS = (0, 1, 2)
WIDTH, HEADS, LAYERS, CLASSES = 48, 4, 4, 10
SIZE, PATCH = 8, 3
TOKENS = SIZE * SIZE + 1
_TRAINED_ON = 1257  # of 1797 images: seven tenths


@dataclass(frozen=True)
class Split:
    """Images ``[count, 1, 8, 8]`` in [0, 1], and their classes."""

    images: Tensor
    labels: Tensor


def data() -> tuple[Split, Split]:
    """The images that the model was trained on, and the others, in an order that is always the same."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    first, rest = order[:_TRAINED_ON], order[_TRAINED_ON:]
    return Split(images[first], labels[first]), Split(images[rest], labels[rest])


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.projections, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, width]`` to the same."""
        parts = self.projections(self.first(x)).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(parts[0], parts[1], parts[2]).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))  # type: ignore[no-any-return]


class DigitsViT(nn.Module):
    """Logits ``[batch, 10]`` of images ``[batch, 1, 8, 8]``, read off the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, padding=PATCH // 2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


def weights_of(seed: int) -> Path:
    """Where the weights of one training lie."""
    return WEIGHTS / f"seed{seed}.safetensors"


def trained(seed: int) -> DigitsViT:
    """The model with the weights of one training, in eval mode."""
    model = DigitsViT()
    model.load_state_dict(load_file(weights_of(seed)))
    return model.eval()
