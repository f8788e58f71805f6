"""Every family of lossy rewrites through ``compile(budget=…)``: offered, taken where it is the faster way, told of in
the report, and never beside what it excludes. Times are made up: each rewrite saves a tenth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regraft
from regraft import Budget
from regraft.passes.budget import precision
from regraft.passes.budget.candidate import Composition
from regraft.rehearsal import Rehearsal
from tests.passes.attention.test_tidal import HEADS as STEP_HEADS
from tests.passes.attention.test_tidal import KV_HEADS, LAYERS, SIZE, Step
from tests.regraft.budget_cases import Classifier, batch, nothing_is_timed

WIDTH, HEADS = 64, 4


class Reader(nn.Module):
    """A transformer layer over tokens whose first two features are a place on an arc: head 0 looks at what is near by
    them. Head 1 says next to nothing. The mean over tokens, in ten classes."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        angle = torch.linspace(0.0, math.pi, tokens)
        self.register_buffer("places", torch.stack((angle.cos(), angle.sin()), -1))
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 10)
        with torch.no_grad():
            for layer in (self.query, self.key):
                layer.weight[: WIDTH // HEADS] = 0.0
                layer.bias[: WIDTH // HEADS] = 0.0
                layer.weight[:2, :2] = 15.0 * torch.eye(2)
            for part in (self.value.weight, self.value.bias):
                part[WIDTH // HEADS : 2 * WIDTH // HEADS] *= 1e-3

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.places.expand(x.shape[0], -1, -1), x), -1)
        query, key, value = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        out: Tensor = self.head(x.mean(1))
        return out


def reading(tokens: int) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(1)
    return Reader(tokens).eval(), [(torch.randn(4, tokens, WIDTH - 2, generator=generator),) for _ in range(7)]


def decoding(keys: int) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """One query against caches of ``keys`` keys, the same for all batches."""
    generator = torch.Generator().manual_seed(1)
    caches = [torch.randn(LAYERS, 4, KV_HEADS, keys, SIZE, generator=generator) for _ in range(2)]
    width = Step().queries[0].in_features
    assert STEP_HEADS % KV_HEADS == 0
    there = torch.ones(4, keys, dtype=torch.bool)
    return Step().eval(), [(torch.randn(4, 1, width, generator=generator), *caches, there) for _ in range(7)]


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_is_timed(monkeypatch)

    def ratio(self: Rehearsal, composition: Composition, thorough: bool = False) -> float:
        return 0.9 ** len(composition)

    monkeypatch.setattr(Rehearsal, "ratio", ratio)
    monkeypatch.setattr(precision, "bf16_is_native", lambda target: True)


def spent(
    model: nn.Module, batches: Sequence[Any], limit: float, *families: str, metric: str = "relative_l2"
) -> tuple[Any, Any]:
    budget = Budget(metric, limit, seconds=20, families=families or None)
    fast = regraft.compile(model, batches[0], budget=budget, calibration=batches[1:])
    return fast, fast.report.budget


@pytest.mark.parametrize(
    ("case", "size", "family", "site", "knob"),
    [
        (reading, 160, "windows", "attention 0", "4 sinks, a window of 80"),
        (reading, 512, "head specialisation", "attention 0", "1 local and 0 streaming of 4 heads, window 64"),
        (reading, 16, "dormant heads", "attention 0", "1 of 4 heads dropped"),
        (decoding, 64, "decode sparsity", "decode step", "32 of 64 keys, chosen in layer 2"),
        (reading, 16, "bf16", "linear layers 1 (out.weight…)", "bf16"),
        (reading, 16, "tokens", "tokens", None),
    ],
)
def test_a_family_is_taken_where_it_wins(case: Any, size: int, family: str, site: str, knob: str | None) -> None:
    model, batches = case(size)
    fast, told = spent(model, batches, 2.0, family)
    decisions = {decision.site: decision for decision in told.decisions}
    assert told.spent and told.within_limit, told
    assert site in decisions and knob in (None, decisions[site].knob), decisions
    with torch.no_grad():
        exact, found = model(*batches[0]), fast(*batches[0])
    assert 0 < (found - exact).norm() / exact.norm() <= 2.0
    assert any(point.chosen and site in point.name for point in told.points)
    assert any(item.exactness == "lossy" for item in fast.report.applications)


@pytest.mark.parametrize(
    ("case", "size", "family", "reason"),
    [
        (reading, 16, "windows", "the attentions have at most 16 keys, and this begins at 128"),
        (reading, 16, "head specialisation", "the attentions have at most 16 keys, and this begins at 512"),
        (reading, 64, "decode sparsity", "the model is no decode step"),
        (decoding, 64, "tokens", "no self-attention was recognised"),
    ],
)
def test_a_family_that_offers_nothing_says_why(case: Any, size: int, family: str, reason: str) -> None:
    model, batches = case(size)
    _, told = spent(model, batches, 0.2, family)
    assert not told.spent and f"{family}: not offered, because {reason}" in told.kept_exact


def test_symbolic_sizes_are_named_as_the_reason() -> None:
    budget, batches = Budget("kl", 0.2, families=("tokens", "windows")), [batch(seed) for seed in range(4)]
    fast = regraft.compile(Classifier().eval(), batches[0], budget=budget, calibration=batches, dynamic=True)
    told = fast.report.budget.kept_exact
    assert "tokens: not offered, because the number of tokens is a symbol" in told
    assert "windows: not offered, because the numbers of keys are symbols" in told


def test_families_are_chosen_together() -> None:
    model, batches = reading(16)
    _, told = spent(model, batches, 0.2)
    sites = {decision.site for decision in told.decisions}
    assert {"attention 0", "tokens"} <= sites and any(site.startswith("linear layer") for site in sites)
    assert told.held_out_bound <= 0.2


def test_what_excludes_each_other_is_not_chosen_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows change the masks that a selection of keys must share."""

    def ratio(self: Rehearsal, composition: Composition, thorough: bool = False) -> float:
        return float(1.0 - sum({"windows": 0.05, "decode sparsity": 0.4}[item.family] for item in composition))

    monkeypatch.setattr(Rehearsal, "ratio", ratio)
    model, batches = decoding(128)
    _, told = spent(model, batches, 2.0, "windows", "decode sparsity")
    sites = {decision.site for decision in told.decisions}
    assert sites == {"decode step"}
    names = [point.name for point in told.points]
    assert not any("window" in name and "keys, chosen" in name for name in names)


def test_an_offer_that_fails_is_told_of_and_takes_nothing_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def offer_trouble(program: Any, target: str) -> Any:
        raise ValueError("no such graph")

    monkeypatch.setattr("regraft.budget.OFFERS", (offer_trouble,))
    model, batches = reading(16)
    _, told = spent(model, batches, 0.2)
    assert told.spent and "offer_trouble: offered nothing, because it failed: ValueError: no such graph" in told.notes
