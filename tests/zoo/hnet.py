"""H-Net (arXiv:2507.07955): boundaries where neighbours differ, a network over these alone, a moving average back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.parts import HEADS, WIDTH, Projections, attend, causal, join

CAPACITY = 20


class HNet(nn.Module):
    """One stage. As many chunks are kept as a sample has at most; a graph, whose sizes are fixed, has room for
    ``capacity`` of them, and asserts that these do."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, capacity: int = CAPACITY) -> None:
        super().__init__()
        self.capacity = capacity
        self.before, self.after = nn.Linear(width, width), nn.Linear(width, width)
        self.main = Projections(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        _, length, width = x.shape
        share, boundary = self.route(x)
        room = self.room(boundary)
        order = (torch.arange(length) + length * ~boundary).argsort(dim=-1)[:, :room]
        chosen = x.gather(1, order[..., None].expand(-1, -1, width))
        query, key, value = self.main.split(chosen)
        chosen = chosen + self.main.out(join(attend(query, key, value, causal(room))))
        smooth = self.smooth(share.gather(1, order).clamp(1e-4, 1 - 1e-4), chosen)
        place = boundary.long().cumsum(1) - 1
        return x + smooth.gather(1, place[..., None].expand(-1, -1, width))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """How far each token is from the one before, from 0 to 1, and whether a chunk begins with it."""
        likeness = F.cosine_similarity(self.before(x[:, :-1]), self.after(x[:, 1:]), dim=-1)
        share = F.pad((1 - likeness) / 2, (1, 0), value=1.0)
        return share, share > 0.5

    def room(self, boundary: Tensor) -> int:
        """The number of chunks that are kept of each sample."""
        most = boundary.sum(-1).max()
        if not torch.compiler.is_compiling():
            return int(most)
        torch._assert_async(most <= self.capacity, f"a sample has more than {self.capacity} chunks")
        return self.capacity

    def smooth(self, share: Tensor, chosen: Tensor) -> Tensor:
        """z_k = p_k x_k + (1 - p_k) z_(k-1), the first one as it is."""
        state = chosen[:, 0]
        states = [state]
        for step in range(1, chosen.shape[1]):
            part = share[:, step, None]
            state = part * chosen[:, step] + (1 - part) * state
            states.append(state)
        return torch.stack(states, dim=1)
