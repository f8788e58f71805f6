"""TidalDecode on a decode step over static caches: equal to its formula, the selection an edge of the graph."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from regraft.codegen.cpu.lower import lower
from regraft.ir import ops
from regraft.ir.ops.select_keys import reference
from regraft.passes.attention.errors import AttentionError
from regraft.passes.attention.tidal import TidalDecode
from tests.passes.attention.models import WIDTH, after, output, recognised

LAYERS, HEADS, KV_HEADS, SIZE, KEYS = 6, 4, 2, 8, 30


class Step(nn.Module):
    """One token through layers whose caches ``[layers, batch, kv_heads, keys, size]`` are inputs; ``there`` says which
    keys are filled."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries = nn.ModuleList(nn.Linear(WIDTH, HEADS * SIZE) for _ in range(LAYERS))
        self.outs = nn.ModuleList(nn.Linear(HEADS * SIZE, WIDTH) for _ in range(LAYERS))

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, there: Tensor, chosen: dict[int, int] | None = None,
        count: int = 0,
    ) -> Tensor:  # fmt: skip
        """``chosen``: layer -> the layer whose selection it attends to, as the formula has it."""
        best: dict[int, Tensor] = {}
        for layer, (query_of, out_of) in enumerate(zip(self.queries, self.outs, strict=True)):
            query = query_of(x).reshape(x.shape[0], 1, HEADS, SIZE).transpose(1, 2)
            key, value = (cache[layer].repeat_interleave(HEADS // KV_HEADS, 1) for cache in (keys, values))
            scores = (query @ key.mT / math.sqrt(SIZE)).masked_fill(~there[:, None, None], -math.inf)
            if chosen is not None:
                group = scores.reshape(x.shape[0], KV_HEADS, -1, KEYS).amax(2)
                best[layer] = torch.zeros_like(group, dtype=torch.bool).scatter(-1, group.topk(count).indices, True)
                if layer in chosen:
                    kept = best[chosen[layer]].repeat_interleave(HEADS // KV_HEADS, 1)[:, :, None]
                    scores = scores.masked_fill(~kept, -math.inf)
            x = x + out_of((scores.softmax(-1) @ value).transpose(1, 2).reshape(x.shape[0], 1, -1))
        return x


def inputs(filled: tuple[int, int] = (KEYS, 17)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1, WIDTH, generator=generator)
    keys, values = (torch.randn(LAYERS, 2, KV_HEADS, KEYS, SIZE, generator=generator) for _ in range(2))
    return x, keys, values, torch.arange(KEYS) < torch.tensor(filled)[:, None]


@pytest.mark.parametrize("again", [None, 4])
@pytest.mark.parametrize("filled", [(KEYS, 17), (KEYS, 4)])
def test_layers_behind_a_selection_read_its_keys_alone(again: int | None, filled: tuple[int, int]) -> None:
    """Also where a sequence has fewer keys than are selected."""
    model, given = Step(), inputs(filled)
    program = recognised(model, *given)
    session = after(program, TidalDecode(8, 1, again))
    chosen = {layer: 4 if again is not None and layer > 4 else 1 for layer in range(2, LAYERS) if layer != again}
    wanted = model(*given, chosen, 8)
    torch.testing.assert_close(output(program), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lower(program)(*given)[0], wanted, rtol=1e-5, atol=1e-5)
    assert len(session.log.applications) == len(chosen)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(ops.select_keys) == (1 if again is None else 2)
    other = inputs((20, 9))  # the edge carries this step's selection, not that of the capture
    torch.testing.assert_close(output(program, *other), model(*other, chosen, 8), rtol=1e-5, atol=1e-5)


def test_what_is_no_decode_step_or_has_few_keys_stays_dense() -> None:
    model, given = Step(), inputs()
    program = recognised(model, *given)
    before = output(program)
    session = after(program, TidalDecode(KEYS))
    assert torch.equal(output(program), before)
    assert session.log.refusals[0].reason == "30 keys are no more than the 30 to select"
    x = torch.randn(2, 5, WIDTH)

    class Prefill(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x + (x @ x.mT).softmax(-1) @ x
            return x

    session = after(recognised(Prefill(), x), TidalDecode(2, 0))
    assert {refusal.reason for refusal in session.log.refusals} == {"5 queries: no decode step"}


def test_knobs_that_make_no_sense_are_told() -> None:
    with pytest.raises(AttentionError, match="behind the first"):
        TidalDecode(4, 3, 3)
    with pytest.raises(AttentionError, match="the program has 6"):
        after(recognised(Step(), *inputs()), TidalDecode(4, 6))


def test_the_selection_is_the_highest_score_of_a_group() -> None:
    query, key = torch.zeros(1, 2, 1, 2), torch.zeros(1, 1, 5, 2)
    query[0, 0, 0, 0] = query[0, 1, 0, 1] = 1.0
    key[0, 0, :, 0] = torch.tensor([5.0, 0, 1, 0, 0])
    key[0, 0, :, 1] = torch.tensor([0.0, 4, 0, 0, 3])
    index, seen = reference(query, key, [], 1.0, "all", 3)
    assert index.tolist() == [[[0, 1, 4]]] and bool(seen.all())
    index, seen = reference(query, key, [], 1.0, "prefix(2)", 3)
    assert index[0, 0, :2].tolist() == [0, 1] and seen.tolist() == [[[True, True, False]]]
    with pytest.raises(ValueError, match="from 1 to 5"):
        reference(query, key, [], 1.0, "all", 6)
