"""UniFormer (arXiv:2201.09450): early blocks mix by a depthwise convolution between two 1x1, late ones by attention."""

from __future__ import annotations

from torch import Tensor, nn

from tests.zoo.parts import HEADS, WIDTH, Projections, attend, join


class LocalBlock(nn.Module):
    """x + conv(depthwise(conv(norm(x)))), with no activation between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.first = nn.Conv2d(width, width, 1)
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.last = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.depthwise(self.first(self.norm(x))))


class GlobalBlock(nn.Module):
    """A depthwise convolution says places, then attention over all of them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.places = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.attention = Projections(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(x)
        tokens = x.flatten(2).transpose(1, 2)
        mixed = self.attention.out(join(attend(*self.attention.split(self.norm(tokens)))))
        return (tokens + mixed).transpose(1, 2).reshape(x.shape)


class Uniformer(nn.Sequential):
    """One block of each kind, ``[batch, width, rows, columns]``."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__(LocalBlock(width), GlobalBlock(width, heads))
