"""The bench of budgets: data that are fresh share nothing with what was calibrated, and equal time means equal time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bench.budget import added, mean_kl, placed
from bench.budget_systems import Retrieval, System
from bench.budget_uniform import Point, at, monotone, summary
from bench.prose import passages


class Encoder(nn.Module):
    """Ids to vectors, as an encoder of transformers returns them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(16, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> nn.Module:
        found = nn.Module()
        found.last_hidden_state = self.table(input_ids)
        return found


def system() -> System:
    ids = torch.arange(40)[:, None] % 16
    return System("s", nn.Identity(), (ids, torch.arange(40)[:, None]), batch=4, calibration=5, fresh=4, limit=0.1)


def test_calibration_and_fresh_batches_share_no_sample_and_depend_on_the_seed() -> None:
    calibration, fresh = system().data(0)
    seen, new = (torch.cat([batch[1] for batch in part]).flatten().tolist() for part in (calibration, fresh))
    assert len(seen) == 20 and len(new) == 16 and not set(seen) & set(new) and len(set(seen)) == 20
    assert system().data(1)[0][0][1].tolist() != calibration[0][1].tolist()


def test_padding_plays_no_part_in_retrieval() -> None:
    model = Retrieval(Encoder(), nn.functional.normalize(torch.randn(3, 4), dim=-1))
    ids, there = torch.tensor([[1, 2, 7], [1, 2, 9]]), torch.tensor([[1, 1, 0], [1, 1, 0]])
    first, second = model(ids, there)
    assert torch.equal(first, second)
    assert not torch.equal(model(ids, torch.ones_like(there))[0], first)


def test_the_loss_on_fresh_data_is_a_mean_over_samples() -> None:
    batches = [(torch.zeros(1, 2),), (torch.zeros(3, 2),)]
    made = System("s", nn.Identity(), (torch.zeros(8, 2),), 4, 1, 1, 0.1)
    moved = torch.tensor([0.0, 1.0])
    expected = 0.5 * math.log(0.5 / (1 / (1 + math.e))) + 0.5 * math.log(0.5 / (math.e / (1 + math.e)))
    assert mean_kl(lambda x: x + moved, made, batches) == pytest.approx(expected, rel=1e-6)


def test_the_loss_at_equal_time_lies_between_the_schedules_around_it() -> None:
    uniform = [(4, 1e-4, 0.9), (8, 1e-2, 0.8), (16, 1.0, 0.7)]
    assert at(uniform, 0.85) == pytest.approx(1e-3)
    assert at(uniform, 0.8) == pytest.approx(1e-2)
    assert at(uniform, 0.95) is None and at(uniform, 0.65) is None
    assert Point("s", 0, "time", 0.1, "", 5e-4, 0.85, uniform, 1e-3).ratio == pytest.approx(2.0)
    assert Point("s", 0, "time", 0.1, "", 5e-4, 0.95, uniform, None).ratio is None


def test_more_tokens_that_go_do_not_take_longer_and_of_equally_fast_ones_the_least_loss_counts() -> None:
    pytest.importorskip("sklearn")
    places = monotone([(2, 1e-4, 0.9), (4, 1e-3, 0.8), (6, 1e-2, 0.84), (8, 1e-1, 0.7)])
    assert [place for _, _, place in places] == pytest.approx([0.9, 0.82, 0.82, 0.7])
    assert at(places, 0.82) == pytest.approx(1e-3)


def test_ratios_are_averaged_as_factors() -> None:
    rows = [{"system": "s", "by": "work", "ratio": ratio} for ratio in (4.0, 1.0, 0.5, None)]
    (row,) = summary(rows)
    assert row["ratio"] == pytest.approx(2 ** (1 / 3)) and (row["better"], row["worse"], row["points"]) == (1, 1, 3)


def test_schedules_are_placed_anew_system_by_system() -> None:
    rows = [
        {"system": system, "seed": seed, "by": by, "limit": limit}
        for limit in (0.1, 0.2)
        for system, seed, by in (("a", 0, "time"), ("a", 1, "time"), ("a", 0, "work"), ("b", 0, "time"))
    ]
    found = list(placed(rows, ["a"], ["time"]))
    assert [part[:3] for part in found] == [("a", 0, "time"), ("a", 1, "time")]
    assert [row["limit"] for row in found[0][3]] == [0.1, 0.2]


def test_rows_are_added_to_a_record_and_replace_those_of_the_same_run() -> None:
    def row(system: str, seed: int, fresh: float, by: str = "") -> dict[str, object]:
        return {"system": system, "seed": seed, "fresh": fresh, "limit": 0.1, **({"by": by} if by else {})}

    rows = [row("a", 0, 1.0), row("a", 1, 1.0), row("b", 0, 1.0, "work")]
    assert added(rows, row("a", 1, 2.0)) == [rows[0], row("a", 1, 2.0), rows[2]]
    assert added(rows, row("b", 0, 3.0, "time")) == [*rows[:2], row("b", 0, 3.0, "time"), rows[2]]


@pytest.mark.slow
def test_passages_are_prose_all_different_and_drawn_by_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.prose.PACKAGES", ())
    found = passages(20, seed=1, words=40)
    assert len(set(found)) == 20 and all(len(text.split()) == 40 for text in found)
    assert passages(20, seed=1, words=40) == found != passages(20, seed=2, words=40)
    with pytest.raises(RuntimeError, match="were asked for"):
        passages(10**6, words=40)
