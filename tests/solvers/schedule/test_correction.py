"""Corrected tables: what whole schedules lost is met, and tells of schedules that were not run."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from regraft.solvers.schedule.correction import corrected
from regraft.solvers.schedule.tokens import TokenTable, solve_tokens

LAYERS, TOKENS, REMOVALS = 3, 16, (0, 2, 4)


def table(factors: tuple[float, ...] = (1.0, 1.0, 1.0), power: float = 1.0) -> TokenTable:
    """Losses that grow with the part that goes; the third layer's are a tenth."""
    loss = np.full((LAYERS, TOKENS + 1, len(REMOVALS)), np.inf)
    loss[:, :, 0] = 0.0
    for layer, left, choice in itertools.product(range(LAYERS), range(1, TOKENS + 1), (1, 2)):
        if REMOVALS[choice] <= left // 2:
            loss[layer, left, choice] = factors[layer] * (0.1 if layer == 2 else 1.0) * (REMOVALS[choice] / left) ** 2
    return TokenTable(REMOVALS, np.tile(np.arange(TOKENS + 1.0), (LAYERS, 1)), np.zeros(LAYERS), loss, power=power)


RUN = [(2, 2, 2), (4, 4, 4), (4, 0, 2), (0, 4, 4), (2, 4, 0), (4, 2, 0), (0, 2, 2)]


@pytest.mark.parametrize(("factors", "power"), [((1.0, 1.0, 1.0), 0.5), ((0.7, 1.0, 2.0), 0.6), ((1.5, 0.5, 4.0), 0.7)])
def test_schedules_that_were_not_run_are_foretold(factors: tuple[float, ...], power: float) -> None:
    real = table(factors, power)
    found = corrected(table(), {schedule: real.cost(schedule)[0] for schedule in RUN})
    for schedule in ((2, 2, 4), (4, 2, 4), (4, 4, 2)):
        before, after, wanted = (made.cost(schedule)[0] for made in (table(), found, real))
        assert abs(math.log(after / wanted)) < 0.5 * abs(math.log(before / wanted))
    assert found.power == pytest.approx(power, abs=0.21)


def test_the_schedule_that_is_chosen_follows_what_was_measured() -> None:
    """By single removals the third layer is the place to remove; behind others it is not."""
    real, limit = table((1.0, 1.0, 200.0)), 0.03
    assert solve_tokens(table(), limit).schedules[-1].removed == (2, 0, 4)
    found = solve_tokens(corrected(table(), {schedule: real.cost(schedule)[0] for schedule in RUN}), limit)
    assert found.schedules[-1].removed[2] == 0


def test_without_anything_to_learn_from_a_table_stays() -> None:
    same = table()
    assert corrected(same, {}) is same
    assert corrected(same, {(0, 0, 0): 1.0, (4, 4, 4): 0.0, (2, 0, 0): math.inf, (4, 4, 16): 1.0}) is same


def test_what_is_not_allowed_stays_so() -> None:
    found = corrected(table(), {(4, 4, 4): 1.0})
    assert math.isinf(found.cost((4, 4, 4))[0]) == math.isinf(table().cost((4, 4, 4))[0])
    assert np.array_equal(np.isinf(found.loss), np.isinf(table().loss)) and (found.loss[:, :, 0] == 0).all()
