"""From cuts to tables: exact where times are linear and losses follow a power, sensible between and beyond."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.passes.budget.token_sites import TokenSites, find_token_sites
from regraft.passes.budget.token_table import Cut, table
from regraft.passes.pipeline import recognising
from regraft.passes.refused import Refused
from regraft.passes.tokens.reduce import ReduceTokens
from regraft.solvers.schedule.tokens import TokenTable

SITES = TokenSites(32, 0, {"tome": (True, True, True, False)}, (0, 2, 4, 8, 16), "model.py:1 in forward")
EXACT, SLOPE, COST = 1.0, 0.005, 0.01
WORK = {layer: SLOPE * (4 - layer) / EXACT for layer in (0, 2)}


def seconds_of(removed: tuple[int, ...]) -> float:
    """Every layer behind a reduction saves the same for each token; a reduction costs by itself."""
    gone, seconds = 0, EXACT
    for number in removed:
        gone += number
        seconds += COST * (number > 0) - SLOPE * gone
    return seconds


def cut(layer: int, removed: int) -> tuple[int, ...]:
    return tuple(removed if at == layer else 0 for at in range(4))


@pytest.fixture
def made() -> TokenTable:
    timed = {cut(layer, number): seconds_of(cut(layer, number)) for layer in (0, 2) for number in (2, 8, 16)}
    losses = {Cut(layer, number): (layer + 1) * 1e-4 * number**2 for layer in (0, 1, 2) for number in (2, 8, 16)}
    return table(SITES, "tome", losses, timed, WORK, EXACT)


@pytest.mark.parametrize(
    "removed", [(0, 0, 0, 0), (8, 0, 0, 0), (0, 4, 0, 0), (8, 8, 4, 0), (16, 8, 4, 0), (2, 2, 2, 0)]
)
def test_the_time_of_any_schedule_follows_from_that_of_cuts(made: TokenTable, removed: tuple[int, ...]) -> None:
    assert made.cost(removed)[1] == pytest.approx(seconds_of(removed), rel=1e-6)


def test_a_cost_that_cuts_overstate_is_put_right_by_an_even_schedule() -> None:
    timed = {cut(layer, number): seconds_of(cut(layer, number)) for layer in (0, 2) for number in (8, 16)}
    noisy = {removed: seconds + 0.002 for removed, seconds in timed.items()}
    even = {(4, 4, 4, 4): seconds_of((4, 4, 4, 4))}
    alone = table(SITES, "tome", {}, noisy, WORK, EXACT).overhead[0]
    both = table(SITES, "tome", {}, {**noisy, **even}, WORK, EXACT).overhead[0]
    assert abs(both - COST) < 0.5 * abs(alone - COST)


def test_a_reduction_that_saves_nothing_is_not_said_to_save_by_costing_less_than_nothing() -> None:
    found = table(SITES, "tome", {}, {cut(0, 8): EXACT - 0.3, cut(0, 16): EXACT - 0.35}, WORK, EXACT)
    assert found.overhead[0] == 0.0 and found.cost((0, 0, 0, 0))[1] == pytest.approx(EXACT)


def test_losses_follow_the_part_of_the_tokens_that_goes(made: TokenTable) -> None:
    assert made.cost((4, 0, 0, 0))[0] == pytest.approx(16e-4)
    assert made.cost((0, 0, 4, 0))[0] == pytest.approx(48e-4)
    assert made.cost((16, 4, 0, 0))[0] == pytest.approx(256e-4 + 2 * 64e-4)


def test_what_is_not_legal_or_not_possible_is_not_allowed(made: TokenTable) -> None:
    assert np.isinf(made.cost((0, 0, 0, 2))[0])
    assert np.isinf(made.cost((16, 16, 0, 0))[0])


def test_a_loss_that_falls_with_more_tokens_is_noise() -> None:
    losses = {Cut(0, 2): 1e-3, Cut(0, 16): 1e-5}
    found = table(SITES, "tome", losses, {cut(0, 16): 0.9}, WORK, EXACT)
    assert found.cost(cut(0, 16))[0] >= found.cost(cut(0, 2))[0] == pytest.approx(1e-3)


class Classifier(nn.Module):
    """Two blocks over tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.encoder(x).mean(1)
        return out


def test_the_sites_of_a_program_are_those_where_its_tokens_can_go() -> None:
    program = capture(Classifier().eval(), (torch.randn(2, 16, 32),))
    recognising().run(program, Session(verify="off"))
    sites = find_token_sites(program)
    assert (sites.tokens, sites.layers, sites.protected) == (16, 2, 0)
    assert {"tome", "pitome"} <= set(sites.legal) and not {"grid", "prune-random", "merge-random"} & set(sites.legal)
    assert sites.legal["tome"] == (True, True) and sites.removals == (0, 1, 2, 3, 4, 5, 6, 7, 8)
    assert sites.uniform("tome", 6) == (6, 5) and not sites.is_possible("tome", (8, 8))
    candidate = sites.candidate("tome", (4, 2))
    assert candidate.rewrite.run(program.copy(), Session(verify="off")) == 2
    assert candidate.rewrite == ReduceTokens((4, 2), "tome")
    coarse = TokenSites(16, 0, {"tome": (True, True, True)}, (0, 2, 4, 6), "")
    assert coarse.uniform("tome", 6) == (6, 4, 2)  # of 10 tokens 5 may go, of 6 three: what is offered is less


@pytest.mark.parametrize(
    ("model", "x", "dynamic", "reason"),
    [
        (nn.Linear(4, 4), torch.randn(2, 4), None, "no self-attention was recognised"),
        (Classifier(), torch.randn(2, 4, 32), None, "4 of 4 tokens may go, and this begins at 8"),
        (Classifier(), torch.randn(2, 16, 32), True, "the number of tokens is a symbol"),
    ],
)
def test_a_program_whose_tokens_cannot_go_says_why(
    model: nn.Module, x: Tensor, dynamic: bool | None, reason: str
) -> None:
    program = capture(model.eval(), (x,), dynamic=dynamic)
    recognising().run(program, Session(verify="off"))
    with pytest.raises(Refused, match=reason):
        find_token_sites(program)


class Towers(nn.Module):
    """A tower over the tokens of each input: what meets is their means or, where tokens see none that are later, all of
    them."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.causal = Classifier().encoder, Classifier().encoder, causal

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        if not self.causal:
            return (self.first(x).mean(1) * self.second(y).mean(1),)
        masks = [torch.ones(z.shape[1], z.shape[1], dtype=torch.bool).triu(1) for z in (x, y)]
        return self.first.layers[0](x, src_mask=masks[0]), self.second(y, mask=masks[1])


def towers(model: nn.Module, *lengths: int) -> Program:
    program = capture(model.eval(), tuple(torch.randn(2, length, 32) for length in lengths))
    recognising().run(program, Session(verify="off"))
    return program


@pytest.mark.parametrize(
    ("lengths", "legal"),
    [((4, 16), (False, False, True, True)), ((32, 16), (True, True, False, False))],
)
def test_of_several_sequences_the_one_is_taken_on_which_most_work_hangs(
    lengths: tuple[int, int], legal: tuple[bool, ...]
) -> None:
    sites = find_token_sites(towers(Towers(), *lengths))
    assert sites.tokens == max(lengths) and sites.legal["tome"] == sites.legal["dart"] == legal


def test_each_sequence_says_its_own_reason() -> None:
    with pytest.raises(Refused, match="every token is an output"):
        find_token_sites(towers(Towers(causal=True), 16, 16))
