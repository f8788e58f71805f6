"""A small classifier of tokens for accuracy budgets, and times that do not depend on how busy the machine is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regraft.codegen.cpu.tuning import Tuner
from regraft.passes.budget.candidate import Composition
from regraft.passes.budget.neighbours import schedule_of
from regraft.rehearsal import Rehearsal


class Classifier(nn.Module):
    """Two blocks over 16 tokens, their mean, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x).mean(dim=1))
        return out


def batch(seed: int, size: int = 8) -> Tensor:
    """Tokens that come in alike pairs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 8, 32, generator=generator).repeat_interleave(2, dim=1)
    return x + 0.3 * torch.randn(size, 16, 32, generator=generator)


def nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token gone saves time; a layer in bf16 saves none, so that machines with and without it do the same. Every
    layer has its first kernel: two compilations of one model are then equal bit by bit."""
    first = {"_measure_linear": ("plain", {}), "_measure_attention": ("sdpa", {})}
    for name, chosen in first.items():
        monkeypatch.setattr(Tuner, name, lambda self, *given, chosen=chosen: chosen)

    def ratio(self: Rehearsal, composition: Composition, thorough: bool = False) -> float:
        gone, left = 0, 1.0
        for candidate in composition:
            for number in schedule_of(candidate) or ():
                gone += number
                left -= gone / 64
        return left

    monkeypatch.setattr(Rehearsal, "ratio", ratio)
    monkeypatch.setattr(Rehearsal, "ratios_of", lambda self, executable, thorough=True: [0.5] * 9)
