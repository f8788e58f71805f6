"""The benches of systems and of what lossy attention keeps: peers compute the same, chance chooses as many."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.attention_quality import random_keys, random_run
from bench.decoder import DecodeStep, PlainDecoder, caches
from bench.systems import Row, record
from bench.systems_cases import attend_sdpa, attending
from tests.zoo.compiled import draw, seeded
from tests.zoo.long_short import LongShortByMask
from tests.zoo.parts import causal


def _picked(pick: object) -> tuple[Tensor, Tensor, Tensor]:
    visible = causal(9).expand(1, 2, 9, 9)
    count = (torch.arange(9) // 2 + 1).reshape(1, 1, 9, 1)
    return pick(visible, count, torch.Generator().manual_seed(0)), visible, count  # type: ignore[operator]


def test_random_keys_are_as_many_as_asked_for_and_visible() -> None:
    for pick in (random_keys, random_run):
        seen, visible, count = _picked(pick)
        assert torch.equal(seen.sum(-1, keepdim=True), count.expand(1, 2, 9, 1)) and not (seen & ~visible).any()


def test_a_random_run_has_no_gap() -> None:
    seen, _, count = _picked(random_run)
    last = 8 - seen.flip(-1).int().argmax(-1, keepdim=True)
    assert torch.equal(last - seen.int().argmax(-1, keepdim=True) + 1, count.expand(1, 2, 9, 1))


def test_a_step_behind_caches_gives_the_decoders_last_logits() -> None:
    torch.manual_seed(0)
    model, tokens = PlainDecoder(2).eval(), torch.randint(0, 256, (2, 7))
    step = DecodeStep(model)(tokens[:, -1:], *caches(model, tokens[:, :-1]))
    torch.testing.assert_close(step[:, 0], model(tokens)[:, -1], rtol=1e-5, atol=1e-5)


def test_a_peer_attends_in_the_models_place() -> None:
    model, x = seeded(LongShortByMask), draw(1, 24, 32)
    calls = []

    def counted(*args: Tensor) -> Tensor:
        calls.append(args)
        return attend_sdpa(*args)

    with attending(counted):
        found = model(x)
    torch.testing.assert_close(found, model(x))
    assert len(calls) == 1


def test_a_record_keeps_what_was_not_measured_again(tmp_path: object) -> None:
    path = tmp_path / "systems.json"  # type: ignore[operator]
    record([Row("a", {"regraft": 1.0, "eager": 2.0}, 0.0, "reassociated")], path)
    record([Row("b", {"regraft": 1.0, "eager": 3.0}, 0.0, "reassociated")], path)
    text = path.read_text()
    assert '"a"' in text and '"b"' in text and '"best_peer": 3.0' in text
