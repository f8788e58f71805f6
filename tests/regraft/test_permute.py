"""A checkpoint permuted on disk is the same model; what is wrong is said in a sentence, and nothing is half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft.errors import RegraftError, SourceError
from regraft.passes.experts.errors import PermutationError
from regraft.permute import permute_checkpoint
from regraft.solvers.placement.plan import Plan
from tests.passes.experts.models import (
    FAMILIES,
    LAYERS,
    logits,
    permutations,
    random_order,
    random_plan,
    relative,
    tiny,
)

EXPERTS, HIDDEN, INNER, LAYER_IDS = 4, 6, 3, (0, 2)


def loaded(folder: Path) -> Any:
    """The model that transformers loads from a folder."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="batched_mm").eval()


@pytest.mark.parametrize("shard_size", ["1GB", "30KB"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_loads_the_same_model(kind: str, shard_size: str, tmp_path: Path) -> None:
    tiny(kind).save_pretrained(tmp_path / "in", max_shard_size=shard_size)
    before = logits(loaded(tmp_path / "in"))
    plan = random_plan(kind, 3)
    result = permute_checkpoint(tmp_path / "in", plan, tmp_path / "out")
    model = loaded(tmp_path / "out")
    assert relative(logits(model), before) <= 1e-6
    assert result.layers == LAYERS[kind] and result.untouched == () and result.moved > 0
    sharded = (tmp_path / "in" / "model.safetensors.index.json").exists()
    assert sharded == (shard_size == "30KB")
    names = {path.name for path in (tmp_path / "in").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names:
        if not name.endswith(".safetensors"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    layers = dict(model.named_parameters())
    original = dict(loaded(tmp_path / "in").named_parameters())
    for layer, order in zip(plan.layer_ids, permutations(plan), strict=True):
        name = next(name for name in layers if f"layers.{layer}." in name and name.endswith("experts.gate_up_proj"))
        assert torch.equal(layers[name], original[name][list(order.order)])


def test_a_plan_that_crosses_router_groups_is_refused(tmp_path: Path) -> None:
    tiny("deepseek_v3").save_pretrained(tmp_path / "in")
    with pytest.raises(PermutationError, match="layer 1: the permutation crosses router groups"):
        permute_checkpoint(tmp_path / "in", random_plan("deepseek_v3", 0, groups=1), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_moving_the_experts_alone_would_be_seen(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the equalities above are worth: without the router's rows the outputs differ."""
    tiny(kind).save_pretrained(tmp_path / "in")
    before = logits(loaded(tmp_path / "in"))
    monkeypatch.setattr("regraft.checkpoint.experts._router", lambda *given: [])
    permute_checkpoint(tmp_path / "in", random_plan(kind, 3), tmp_path / "out")
    assert relative(logits(loaded(tmp_path / "out")), before) > 1e-2


def test_crossing_router_groups_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("deepseek_v3").save_pretrained(tmp_path / "in")
    before = logits(loaded(tmp_path / "in"))
    monkeypatch.setattr("regraft.permute.check_groups", lambda config, orders: None)
    permute_checkpoint(tmp_path / "in", random_plan("deepseek_v3", 0, groups=1), tmp_path / "out")
    assert relative(logits(loaded(tmp_path / "out")), before) > 1e-2


# -- a hand-written checkpoint --


def tensors() -> dict[str, Tensor]:
    """Layer 0 holds its experts one by one, layer 2 stacked; the router of each has a bias, a correction and company
    of the same size; layer 3 lies beyond the model's own."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    found = {"embed.weight": draw(5, HIDDEN)}
    for layer in (0, 3):
        for expert in range(EXPERTS):
            found[f"h.{layer}.moe.experts.{expert}.fc.weight"] = draw(INNER, HIDDEN).to(torch.bfloat16)
            found[f"h.{layer}.moe.experts.{expert}.fc.scale"] = draw(1)
    found["h.2.moe.experts.fc"] = draw(EXPERTS, INNER, HIDDEN).to(torch.float8_e4m3fn)
    found["h.2.moe.experts.bias"] = draw(EXPERTS, INNER)
    for layer in (0, 2, 3):
        found[f"h.{layer}.moe.pick.weight"] = draw(EXPERTS, HIDDEN)
        found[f"h.{layer}.moe.pick.bias"] = draw(EXPERTS)
        found[f"h.{layer}.moe.balance.vector"] = draw(1, EXPERTS)
        found[f"h.{layer}.moe.shared_experts.up.weight"] = draw(EXPERTS, HIDDEN)  # as wide as there are experts
        found[f"h.{layer}.moe.shared_experts.down.weight"] = draw(HIDDEN, EXPERTS)
        found[f"h.{layer}.norm.weight"] = draw(HIDDEN)
    return found


def config(**changes: Any) -> dict[str, Any]:
    return {
        "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "hidden_size": HIDDEN, "num_hidden_layers": 3, **changes
    }  # fmt: skip


def write(folder: Path, held: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A checkpoint of two shards, a config and another file."""
    held = tensors() if held is None else held
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("as it is")
    names = sorted(held)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: held[name] for name in part}, folder / file, {"format": "pt"})
    listed = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def plan_of(*orders: tuple[int, ...], layers: tuple[int, ...] = LAYER_IDS) -> Plan:
    return Plan.of_array(np.array(orders), max(max(order) for order in orders) + 1, 2, layers)


def read(folder: Path) -> dict[str, Tensor]:
    return {**load_file(folder / "a.safetensors"), **load_file(folder / "b.safetensors")}


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("seed", range(3))
def test_every_tensor_lies_where_the_plan_says(seed: int, tmp_path: Path) -> None:
    one, other = random_order(EXPERTS, seed), random_order(EXPERTS, seed + 10)
    result = permute_checkpoint(write(tmp_path / "in"), plan_of(one, other), tmp_path / "out")
    old, new = read(tmp_path / "in"), read(tmp_path / "out")
    assert set(old) == set(new) and result.untouched == (3,) and result.layers == LAYER_IDS
    for name, tensor in new.items():
        order = {"0": one, "2": other}.get(name.split(".")[1], tuple(range(EXPERTS)))
        expected = old[name]
        if ".moe.experts.fc" in name or ".moe.experts.bias" in name or ".moe.pick." in name:
            rows = expected.view(torch.uint8).reshape(EXPERTS, -1)[list(order)]
            expected = rows.reshape(-1).view(expected.dtype).view(expected.shape)
        elif ".balance." in name:
            expected = expected[:, list(order)]
        elif ".moe.experts." in name:
            number = int(name.split(".")[4])
            expected = old[name.replace(f"experts.{number}.", f"experts.{order[number]}.")]
        assert same(tensor, expected), name
    for name in ("config.json", "model.safetensors.index.json", "extra/notes.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()


def test_there_and_back(tmp_path: Path) -> None:
    one, other = random_order(EXPERTS, 0), random_order(EXPERTS, 1)
    back = [tuple(int(slot) for slot in np.argsort(order)) for order in (one, other)]
    permute_checkpoint(write(tmp_path / "in"), plan_of(one, other), tmp_path / "out")
    permute_checkpoint(tmp_path / "out", plan_of(*back), tmp_path / "back")
    for file in ("a.safetensors", "b.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "in" / file).read_bytes()


GOOD = ((1, 0, 3, 2), (2, 3, 0, 1))


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors().items() if key != name}


def truncate(folder: Path) -> None:
    path = folder / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def cut_header(folder: Path) -> None:
    (folder / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes()[:5])


def spoil_header(folder: Path) -> None:
    data = bytearray((folder / "b.safetensors").read_bytes())
    data[8:12] = b"????"
    (folder / "b.safetensors").write_bytes(bytes(data))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a truncated shard": (truncate, "b.safetensors has [0-9]+ bytes where its header promises"),
    "a shard of five bytes": (cut_header, "no whole safetensors file"),
    "a header that is no JSON": (spoil_header, "the header of .*b.safetensors cannot be read"),
    "a missing shard": (lambda folder: (folder / "b.safetensors").unlink(), "b.safetensors does not exist"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "there is no .*config.json"),
    "a config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    "a config of a dense model": (
        lambda folder: (folder / "config.json").write_text('{"hidden_size": 6, "num_hidden_layers": 3}'),
        "does not describe routed experts",
    ),
    "weights outside the index": (
        lambda folder: shutil.copy(folder / "a.safetensors", folder / "c.safetensors"),
        "c.safetensors in .* holds weights that are not part",
    ),
    "an index of another checkpoint": (
        lambda folder: shutil.copy(folder / "a.safetensors", folder / "b.safetensors"),
        "is in a.safetensors and in b.safetensors",
    ),
    "an index that is no JSON": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        "the index .* cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_checkpoint_that_is_not_whole(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    damage(write(tmp_path / "in"))
    refused(tmp_path, plan_of(*GOOD), message, SourceError)


def refused(root: Path, plan: Plan, message: str, kind: type[RegraftError]) -> None:
    """One sentence, and nothing written."""
    with pytest.raises(kind, match=message) as caught:
        permute_checkpoint(root / "in", plan, root / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in root.iterdir()] == ["in"]


PLANS: dict[str, tuple[Plan, str]] = {
    "too many experts": (plan_of((1, 0, 3, 2, 4, 5), (0, 1, 2, 3, 4, 5)), "for 6 experts and the model has 4"),
    "a missing layer": (plan_of(GOOD[0], layers=(0,)), "no entry for expert layer 2 of the model"),
    "a layer too many": (plan_of(*GOOD, GOOD[0], layers=(0, 1, 2)), "places experts in layer 1, where the model has"),
    "the number among expert layers": (plan_of(*GOOD, layers=(0, 1)), "no entry for expert layer 2"),
    "replicas": (plan_of((0, 1, 2, 3, 0, 1), (0, 1, 2, 3, 0, 1)), "2 copies of expert 0 in layer 0"),
    "an empty slot": (plan_of((0, 1, 2, 3, -1, -1), (0, 1, 2, 3, -1, -1)), "leaves 2 slots of layer 0 empty"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_of_another_model(name: str, tmp_path: Path) -> None:
    write(tmp_path / "in")
    refused(tmp_path, PLANS[name][0], PLANS[name][1], PermutationError)


CONTENT: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "an expert is missing": (lambda: without("h.0.moe.experts.2.fc.weight"), "see expert 2"),
    "no router": (lambda: without("h.2.moe.pick.weight"), "the router of h.2.moe is not understood"),
    "two routers": (lambda: {**tensors(), "h.0.moe.other.weight": torch.ones(4, 6)}, "found 2 tensors of that shape"),
    "experts of unequal shape": (
        lambda: {**tensors(), "h.0.moe.experts.1.fc.weight": torch.ones(2, 6)},
        "differ in shape or element type",
    ),
    "experts on another dim": (
        lambda: {**tensors(), "h.2.moe.experts.fc": torch.ones(3, 4, 6)},
        "expected 4 experts on the first dim",
    ),
    "a table of expert numbers": (
        lambda: {**tensors(), "h.0.moe.table.ids": torch.ones(9, 2, dtype=torch.int64)},
        "whole numbers beside the experts",
    ),
    "no experts": (lambda: {"h.0.mlp.weight": torch.ones(2, 2), "x": torch.ones(1)}, "no tensor of a module called"),
    "two blocks in a layer": (
        lambda: {**tensors(), "h.2.other.experts.fc": torch.ones(4, 2)},
        "both expert blocks of layer 2",
    ),
}


@pytest.mark.parametrize("name", CONTENT)
def test_a_structure_that_is_not_understood(name: str, tmp_path: Path) -> None:
    make, message = CONTENT[name]
    write(tmp_path / "in", make())
    refused(tmp_path, plan_of(*GOOD), message, PermutationError)


def test_as_many_experts_as_features(tmp_path: Path) -> None:
    write(tmp_path / "in", hidden_size=EXPERTS)
    refused(tmp_path, plan_of(*GOOD), "as many experts as hidden features", PermutationError)


@pytest.mark.parametrize("changes", [{"n_group": 2, "topk_group": 1}, {"num_expert_group": 2}])
def test_groups_of_the_config(changes: dict[str, int], tmp_path: Path) -> None:
    write(tmp_path / "in", **changes)
    permute_checkpoint(tmp_path / "in", plan_of(*GOOD), tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    refused(tmp_path, plan_of((0, 2, 1, 3), GOOD[1]), "layer 0: .* crosses router groups", PermutationError)


def test_groups_that_limit_nothing(tmp_path: Path) -> None:
    write(tmp_path / "in", n_group=2, topk_group=2)
    assert permute_checkpoint(tmp_path / "in", plan_of((0, 2, 1, 3), GOOD[1]), tmp_path / "out").moved == 6


def test_the_output_is_a_new_folder_elsewhere(tmp_path: Path) -> None:
    folder = write(tmp_path / "in")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for target, message in (
        (folder, "lies in the checkpoint"),
        (folder / "inner", "lies in the checkpoint"),
        (tmp_path / "full", "exists already"),
        (tmp_path / "nowhere" / "out", "does not exist; create it first"),
    ):
        with pytest.raises(SourceError, match=message):
            permute_checkpoint(folder, plan_of(*GOOD), target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "in"]


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    write(tmp_path / "in")
    written: list[int] = []

    def interrupt(nbytes: int) -> None:
        written.append(nbytes)
        if len(written) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        permute_checkpoint(tmp_path / "in", plan_of(*GOOD), tmp_path / "out", interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_tensors_larger_than_a_piece_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.checkpoint.copy.CHUNK", 5)
    permute_checkpoint(write(tmp_path / "in"), plan_of(*GOOD), tmp_path / "out")
    old, new = read(tmp_path / "in"), read(tmp_path / "out")
    assert torch.equal(new["h.2.moe.experts.bias"], old["h.2.moe.experts.bias"][list(GOOD[1])])
