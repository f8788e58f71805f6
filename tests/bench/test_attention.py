"""The bench of attention at its smallest: every variant is its formula, said alike to all, and records are added to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import attention
from bench.attention import Row, measure, record
from bench.attention_cases import HEADS, VARIANTS, Variant, dense, operands

LENGTH = 128


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.timing._SETTLE", 0.0)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_variant_is_its_formula_and_said_alike_to_its_peers(variant: Variant) -> None:
    row = measure(variant, LENGTH, ("sdpa flag", "sdpa mask", "eager"), rounds=1)
    assert row.passed and "eager" in row.milliseconds
    assert ("sdpa mask" in row.milliseconds) == (variant.sdpa != "" and variant.name != "no mask")
    index = torch.arange(LENGTH)
    seen = variant.visible(LENGTH)(torch.zeros(()), torch.arange(HEADS)[:, None, None], index[:, None], index)
    assert torch.equal(dense(variant, LENGTH).expand(1, HEADS, -1, -1), seen.expand(1, HEADS, LENGTH, LENGTH))
    given = operands(LENGTH)
    wanted = attention._eager(variant, LENGTH, given)()  # type: ignore[operator]
    for name in ("sdpa flag", "sdpa mask"):
        peer = attention._PEERS[name](variant, LENGTH, given)
        if callable(peer):
            torch.testing.assert_close(peer(), wanted, rtol=1e-4, atol=1e-5)


def test_a_record_keeps_what_another_run_measured(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    record([Row("causal", 64, {"regraft": 2.0, "flex": 3.0}, 1e-7, left_out={"eager": "why"})], path)
    record([Row("causal", 64, {}, 0.0, memory=5.0), Row("no mask", 64, {"regraft": 1.0}, 1e-7)], path)
    first, second = json.loads(path.read_text())["rows"]
    assert (first["variant"], second["variant"]) == ("no mask", "causal")
    assert second["best_peer"] == 1.5 and second["memory"] == 5.0 and second["error"] == 1e-7
    assert first["best_peer"] is None
