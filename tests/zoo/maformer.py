"""MAFormer (arXiv:2209.01620): attention in windows, attention to down-sampled tokens, both fused by attention."""

from __future__ import annotations

from torch import Tensor, nn

from tests.zoo.parts import WIDTH, Projections, attend, join, split

SIDE, WINDOW = 8, 4


class Maformer(nn.Module):
    """``[batch, SIDE * SIDE, WIDTH]``: windows are folded into the batch; local tokens ask the global ones."""

    def __init__(self) -> None:
        super().__init__()
        self.local, self.reduced, self.fused = (Projections() for _ in range(3))
        self.shrink = nn.Linear(WINDOW * WINDOW * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, count = x.shape[0], SIDE // WINDOW
        windows = x.reshape(batch, count, WINDOW, count, WINDOW, WIDTH).transpose(2, 3)
        folded = windows.reshape(batch * count * count, WINDOW * WINDOW, WIDTH)
        local = self.local.out(join(attend(*self.local.split(folded))))
        local = local.reshape(batch, count, count, WINDOW, WINDOW, WIDTH).transpose(2, 3).reshape(batch, -1, WIDTH)
        few = self.shrink(windows.reshape(batch, count * count, -1))
        whole = self.reduced.out(join(attend(*self.reduced.split(few))))
        query = split(self.fused.query(local))
        key, value = split(self.fused.key(whole)), split(self.fused.value(whole))
        return x + local + self.fused.out(join(attend(query, key, value)))
