"""MAFormer (arXiv:2209.01620): attention in windows, attention to down-sampled tokens, both fused by attention."""

from __future__ import annotations

from torch import Tensor, nn

from tests.zoo.parts import HEADS, WIDTH, Projections, attend, join, split

SIDE, WINDOW = 8, 4


class Maformer(nn.Module):
    """``[batch, side * side, width]``: windows are folded into the batch; local tokens ask the global ones."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, side: int = SIDE, window: int = WINDOW) -> None:
        super().__init__()
        self.heads, self.side, self.window = heads, side, window
        self.local, self.reduced, self.fused = (Projections(width, heads) for _ in range(3))
        self.shrink = nn.Linear(window * window * width, width)

    def forward(self, x: Tensor) -> Tensor:
        (batch, _, width), window, count = x.shape, self.window, self.side // self.window
        windows = x.reshape(batch, count, window, count, window, width).transpose(2, 3)
        folded = windows.reshape(batch * count * count, window * window, width)
        local = self.local.out(join(attend(*self.local.split(folded))))
        local = local.reshape(batch, count, count, window, window, width).transpose(2, 3).reshape(batch, -1, width)
        few = self.shrink(windows.reshape(batch, count * count, -1))
        whole = self.reduced.out(join(attend(*self.reduced.split(few))))
        query = split(self.fused.query(local), self.heads)
        key, value = (split(layer(whole), self.heads) for layer in (self.fused.key, self.fused.value))
        return x + local + self.fused.out(join(attend(query, key, value)))
