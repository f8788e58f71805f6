"""The bench of token reduction: what it compares, what it keeps, and the trained models that it brings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.digits.model import SEEDS, Split, data, trained, weights_of
from bench.digits.train import accuracy, shifted
from bench.tokens import merged
from bench.tokens_legality import ROWS, check
from bench.tokens_quality import (
    VARIANTS,
    Setting,
    beats,
    compare_embeddings,
    compare_logits,
    even,
    macs,
    matched,
    recommended,
    reduced,
)
from bench.topics import batch_of_paragraphs, passages


def test_weights_are_small_and_know_the_digits() -> None:
    pytest.importorskip("sklearn")
    assert sum(weights_of(seed).stat().st_size for seed in SEEDS) < 2e6
    held = data()[1]
    some = Split(held.images[:200], held.labels[:200])
    assert all(accuracy(trained(seed), some) > 0.95 for seed in SEEDS)


def test_images_move_by_a_pixel_at_most_and_nothing_wraps() -> None:
    images = torch.zeros(50, 1, 8, 8)
    images[:, 0, 4, 4] = 1
    found = shifted(images, torch.Generator().manual_seed(0))
    places = found[:, 0].flatten(1).argmax(-1)
    assert set((places // 8).tolist()) == set((places % 8).tolist()) == {3, 4, 5} and (found.sum((1, 2, 3)) == 1).all()


def test_equal_outputs_are_as_faithful_as_can_be() -> None:
    logits = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    same = compare_logits(logits, logits.clone())
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["agreement"] == 1
    assert compare_logits(logits, logits.flip(-1))["kl"] > 0.1
    found = compare_embeddings(logits, 2 * logits)
    assert found["recall@10"] == 1 and found["least_cosine"] == pytest.approx(1)
    assert compare_embeddings(logits, torch.randn(20, 10))["recall@10"] < 1


def test_every_method_has_a_baseline_that_looks_at_nothing() -> None:
    assert {variant.baseline for variant in VARIANTS.values()} == {
        "merge-random",
        "prune-random",
        "fuse-random",
        "bracket-random",
    }
    assert beats([{"kl": 0.1}], [{"kl": 0.2}], "kl") and not beats([{"cosine": 0.1}], [{"cosine": 0.2}], "cosine")


def test_a_method_is_recommended_where_it_wins_everywhere() -> None:
    rows = [
        {"method": "tome", "beats_random": True},
        {"method": "tome", "beats_random": True},
        {"method": "evit", "beats_random": True},
        {"method": "evit", "beats_random": False},
        {"method": "merge-random", "beats_random": True},
    ]
    assert recommended(rows) == ["tome"]


def test_methods_are_compared_at_as_many_products() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    model = Pooled(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))
    setting = Setting.of(model, torch.randn(2, 33, 16), compare_logits, 0)
    target = macs(reduced(setting, VARIANTS["tome"], (6, 6, 6)))
    for name in ("pitome", "divprune", "grid", "prune-random"):
        schedule = matched(setting, VARIANTS[name], target)
        assert abs(macs(reduced(setting, VARIANTS[name], schedule)) / target - 1) <= 0.01
    assert sum(matched(setting, VARIANTS["divprune"], target)) > sum(matched(setting, VARIANTS["grid"], target))
    assert even(8, 3) == (3, 3, 2)


class Pooled(nn.Module):
    """An encoder and the mean of its tokens."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).mean(1)  # type: ignore[no-any-return]


def test_rows_that_were_not_measured_again_stay_in_the_record(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(merged(path, "speed", {"rows": [{"row": "a", "x": 1}, {"row": "b", "x": 1}]})))
    rows = merged(path, "speed", {"rows": [{"row": "b", "x": 2}]})["parts"]["speed"]["rows"]
    assert [(row["row"], row["x"]) for row in rows] == [("a", 1), ("b", 2)]
    assert "speed" in merged(path, "quality", {"rows": []})["parts"]


def test_prose_is_long_enough_and_always_the_same() -> None:
    assert len(passages(100)) >= 150 and all(len(text.split()) >= 100 for text in passages(100))
    assert batch_of_paragraphs(5, 0) == batch_of_paragraphs(5, 0) != batch_of_paragraphs(5, 1)


@pytest.mark.parametrize("name", ["u-net block", "dit block, attention alone"])
def test_a_block_is_reduced_and_right(name: str) -> None:
    assert check(next(row for row in ROWS if row.name == name))["right"]
