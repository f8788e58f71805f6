"""A rewrite of a large batch is checked on a part of it, where the nodes allow that; the whole decides otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder
from regraft.ir.probe import Pool, Probe, Sample
from regraft.ir.verify import Checked, Verdict, Verifier
from tests.ir.graphs import numbers, program_of, root_of

aten = torch.ops.aten
WHOLE = (128, 96, 64)  # 786,432 numbers
KEPT = 43  # samples, of 6,144 numbers each: the first that are 262,144 together
FLAGS = (torch.arange(96) < torch.arange(1, 129)[:, None]).float()

Rewrite = Callable[[Builder, fx.Node], fx.Node]


def checked(
    function: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    rewrite: Rewrite,
    monkeypatch: pytest.MonkeyPatch,
    reused: bool = True,
) -> tuple[Verdict, list[int]]:
    """The verdict on a rewrite of what ``function`` does to an activation, and the batches that were drawn."""
    program = program_of(lambda x, *more: function(x.relu(), *more), *inputs)
    build = Builder(program.graph, program.output_node, program.fake_mode)
    activation = next(node for node in program.graph.nodes if node.target is aten.relu.default)
    new = rewrite(build, activation)
    drawn: list[int] = []
    take = Pool.take

    def record(self: Pool, size: list[int], dtype: torch.dtype, offset: int) -> Tensor:
        drawn.append(size[0])
        return take(self, size, dtype, offset)

    monkeypatch.setattr(Pool, "take", record)
    verifier = Verifier(program, Checked(reused=reused))
    return verifier.check({root_of(program): new}, build.made, Exactness.REASSOCIATED), drawn


def twice(build: Builder, x: fx.Node) -> fx.Node:
    return build.call(aten.add.Tensor, x, x)


def test_a_part_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, drawn = checked(lambda x: x * 2, (numbers(*WHOLE),), twice, monkeypatch)
    assert verdict.accepted and set(drawn) == {KEPT}


def test_sizes_that_begin_with_the_batch_are_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def flat_twice(build: Builder, x: fx.Node) -> fx.Node:
        return twice(build, build.call(aten.view.default, x, [128, 6144]))

    verdict, drawn = checked(lambda x: x.view(128, 6144) * 2, (numbers(*WHOLE),), flat_twice, monkeypatch)
    assert verdict.accepted and set(drawn) == {KEPT}


def test_places_of_the_batch_are_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def picked(x: Tensor, flags: Tensor) -> Tensor:
        return x * flags[torch.arange(128)[:, None], torch.arange(96)][..., None]

    def plain(build: Builder, x: fx.Node) -> fx.Node:
        flags = next(
            node for node in build.graph.nodes if node.op == "placeholder" and len(node.meta["val"].shape) == 2
        )
        return build.call(aten.mul.Tensor, x, build.call(aten.unsqueeze.default, flags, 2))

    verdict, drawn = checked(picked, (numbers(*WHOLE), FLAGS), plain, monkeypatch)
    assert verdict.accepted and set(drawn) == {KEPT}


def test_a_small_batch_is_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, drawn = checked(lambda x: x * 2, (numbers(4, 96, 64),), twice, monkeypatch)
    assert verdict.accepted and set(drawn) == {4}


def test_every_check_takes_the_whole_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, drawn = checked(lambda x: x * 2, (numbers(*WHOLE),), twice, monkeypatch, reused=False)
    assert verdict.accepted and set(drawn) == {128}


def test_inputs_are_cut_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def masked(x: Tensor, flags: Tensor) -> Tensor:
        return x * flags[:, :, None] * 2

    def rewrite(build: Builder, x: fx.Node) -> fx.Node:
        flags = next(
            node for node in build.graph.nodes if node.op == "placeholder" and len(node.meta["val"].shape) == 2
        )
        doubled = build.call(aten.mul.Tensor, build.call(aten.unsqueeze.default, flags, 2), 2)
        return build.call(aten.mul.Tensor, x, doubled)

    verdict, drawn = checked(masked, (numbers(*WHOLE), FLAGS), rewrite, monkeypatch)
    assert verdict.accepted and set(drawn) == {KEPT}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(12288, 64) * 2,
        lambda x: (x * 2).view(64, -1),
        lambda x: torch.select_scatter(x, x[0], 0, 127) * 2,
    ],
    ids=["size", "size beside -1", "place"],
)
def test_nodes_that_name_the_whole_batch_are_checked_on_it(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of(lambda x: function(x.relu()), numbers(*WHOLE))
    calls = [node for node in program.graph.nodes if node.op == "call_function"][1:]

    def again(build: Builder, x: fx.Node) -> fx.Node:
        made: dict[fx.Node, fx.Node] = {}
        for node in calls:
            read = fx.map_arg(node.args, lambda source: made.get(source, x))
            made[node] = build.call(node.target, *read)
        return made[calls[-1]]

    verdict, drawn = checked(function, (numbers(*WHOLE),), again, monkeypatch)
    assert verdict.accepted and drawn[-1] == 128


def test_a_wrong_rewrite_is_refused_by_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(build: Builder, x: fx.Node) -> fx.Node:
        return build.call(aten.mul.Tensor, x, 2.001)

    verdict, drawn = checked(lambda x: x * 2, (numbers(*WHOLE),), wrong, monkeypatch)
    assert not verdict.accepted and "against fp64" in verdict.reason and drawn[-1] == 128


def test_what_is_right_on_the_whole_alone_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(build: Builder, x: fx.Node) -> fx.Node:
        return build.call(aten.div.Tensor, build.call(aten.sum.dim_IntList, x, [0]), 128)

    verdict, drawn = checked(lambda x: x.mean(0), (numbers(*WHOLE),), counted, monkeypatch)
    assert verdict.accepted and drawn[-1] == 128


def test_a_symbolic_batch_is_cut_too() -> None:
    batch = torch.export.Dim("batch")
    program = program_of(lambda x: x.relu() * 2, numbers(*WHOLE), dynamic=(({0: batch},),))
    activation = next(node for node in program.graph.nodes if node.target is aten.relu.default)
    probe = Probe(program, [activation], Pool(), program.example)
    assert probe.worthwhile_sample() == Sample(128, KEPT)
