"""A loaded program is the saved one: same outputs bit by bit, same weights, same symbols, same history."""

from __future__ import annotations

import stat
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from regraft.artifact import ArtifactError, load, save
from regraft.artifact.tensors import _DTYPES
from regraft.artifact.trees import decode_tree, encode_tree
from regraft.guard import SymbolicGuard
from regraft.ir.capture import capture
from regraft.ir.nodes import Builder, user_line
from regraft.ir.program import Program
from regraft.ir.weights import WeightOp
from tests.regraft.artifact.helpers import members_of, same_outputs, saved, small_program
from tests.strategies import canonical_programs

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def round_trip(program: Program, folder: Path) -> Program:
    return load(saved(folder / "model.regraft", program)).program


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=canonical_programs(dtypes=FLOATS))
def test_random_programs_keep_every_bit(program: Program, tmp_path: Path) -> None:
    loaded = round_trip(program, tmp_path)
    assert [n.format_node() for n in loaded.graph.nodes] == [n.format_node() for n in program.graph.nodes]
    assert same_outputs(program, loaded, program.example)


def test_equal_programs_give_equal_bytes(tmp_path: Path) -> None:
    first = saved(tmp_path / "first.regraft", report={"b": 1, "a": 2})
    again = saved(tmp_path / "again.regraft", load(first).program, report={"a": 2, "b": 1})
    assert first.read_bytes() == again.read_bytes()


class Everything(nn.Module):
    """Tied weights, a mutated buffer, a constant, None and numbers among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.table = torch.tensor([True, False])

    def forward(self, ids: Tensor) -> dict[str, Any]:
        self.count += 1
        hidden = self.embedding(ids) * self.table[0]
        return {"logits": self.head(hidden), "nothing": None, "parts": (hidden, 3, ids.shape[1])}


def test_symbolic_shapes_tied_weights_and_mutated_buffers(tmp_path: Path) -> None:
    ids = torch.arange(10).reshape(2, 5)
    program = capture(Everything().eval(), (ids,), dynamic={"ids": {1: Dim("length", min=2, max=64)}})
    loaded = round_trip(program, tmp_path)
    assert loaded.range_constraints == program.range_constraints
    assert [str(n.meta.get("val")) for n in loaded.user_inputs()] == [
        str(n.meta.get("val")) for n in program.user_inputs()
    ]
    assert loaded.weights.originals["embedding.weight"] is loaded.weights.originals["head.weight"]
    assert loaded.mutated() == program.mutated() and "count" in loaded.mutated().values()
    longer = torch.arange(18).reshape(2, 9) % 11
    assert same_outputs(program, loaded, [longer])
    assert loaded.user_outputs(loaded.callable()(longer))["nothing"] is None


def test_a_derived_dimension_keeps_its_symbol(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0] * x.shape[1] // 2, -1)

    half = Dim("half", min=1, max=30)
    program = capture(Halves(), (torch.randn(4, 6, 8),), dynamic={"x": {1: 2 * half}})
    loaded = round_trip(program, tmp_path)
    assert loaded.range_constraints == program.range_constraints
    assert same_outputs(program, loaded, [torch.randn(4, 14, 8)])


def test_conditions_on_sizes_are_kept_and_kept_again(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            even = x.sin() if x.shape[0] % 2 == 0 else x.cos()
            return even.sum() + (y.sum() if x.shape[0] > y.shape[0] else y.prod())

    program = capture(Halves(), (torch.randn(4, 3), torch.randn(2, 3)), dynamic=True)
    loaded = round_trip(round_trip(program, tmp_path), tmp_path)
    for rows, fits in (((6, 3), True), ((5, 3), False), ((4, 6), False)):
        leaves = [torch.randn(size, 3) for size in rows]
        assert SymbolicGuard(program).fits(leaves) is SymbolicGuard(loaded).fits(leaves) is fits


def test_a_loaded_program_can_be_rewritten(tmp_path: Path) -> None:
    program = capture(Everything().eval(), (torch.zeros(2, 5, dtype=torch.int64),), dynamic={"ids": {1: Dim("n")}})
    loaded = round_trip(program, tmp_path)
    hidden = next(n for n in loaded.graph.nodes if n.target is torch.ops.aten.embedding.default)
    build = Builder(loaded.graph, loaded.output_node, loaded.fake_mode)
    size = build.size(hidden, 1)
    assert (
        str(size.meta["val"]) == str(hidden.meta["val"].shape[1])
        and build.call(torch.ops.aten.mul.Tensor, hidden, 2.0).meta["val"].shape == hidden.meta["val"].shape
    )


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3, 2), (0, 4)], ids=str)
def test_every_element_type_keeps_its_bits(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    program = small_program()
    count = torch.empty(shape, dtype=dtype).nbytes
    raw = torch.arange(1, count + 1, dtype=torch.uint8) % (2 if dtype == torch.bool else 251)
    value = raw.view(dtype).reshape(shape)
    name = program.weight_name(program.add_constant("constant", value))
    assert name is not None
    loaded = round_trip(program, tmp_path).weights.get(name)
    assert loaded.dtype == dtype and loaded.shape == value.shape
    assert loaded.reshape(-1).view(torch.uint8).tolist() == raw.tolist()


def test_memory_layouts_come_back(tmp_path: Path) -> None:
    program = small_program()
    values = {
        "transposed": torch.randn(3, 5).t(),
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "expanded": torch.randn(3, 1).expand(3, 7),
    }
    names = {hint: program.weight_name(program.add_constant(hint, value)) for hint, value in values.items()}
    loaded = round_trip(program, tmp_path)
    for hint, value in values.items():
        found = loaded.weights.get(str(names[hint]))
        assert torch.equal(found, value) and found.stride() == value.stride(), hint


def test_derived_weights_are_stored_as_operations(tmp_path: Path) -> None:
    program = small_program()
    source = "linear.weight"
    node = program.derive_weight("merged", WeightOp("concat", (source, source), {"dim": 0}))
    name = str(program.weight_name(node))
    path = saved(tmp_path / "model.regraft", program)
    assert set(load_safetensors(members_of(path)["weights.safetensors"])) == {source, "linear.bias"}
    loaded = load(path).program
    assert torch.equal(loaded.weights.get(name), program.weights.get(name))


def test_weights_that_no_placeholder_needs_are_left_out(tmp_path: Path) -> None:
    program = small_program()
    program.weights.add_constant("orphan", torch.zeros(5))
    assert "orphan" not in round_trip(program, tmp_path).weights


def test_history_of_nodes_is_kept(tmp_path: Path) -> None:
    program = small_program()
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.gelu.default)
    node.meta["provenance"] = ("some-rule(gelu)",)
    found = next(n for n in round_trip(program, tmp_path).graph.nodes if n.name == node.name)
    assert found.meta["provenance"] == ("some-rule(gelu)",)
    assert user_line(found) == user_line(node) != ""


def test_examples_are_kept_or_replaced_by_zeros(tmp_path: Path) -> None:
    program = small_program()
    kept = load(saved(tmp_path / "kept.regraft", program)).program.example[0]
    assert torch.equal(kept, program.example[0])
    bare = load(saved(tmp_path / "bare.regraft", program, keep_example=False)).program.example[0]
    assert bare.shape == kept.shape and bare.dtype == kept.dtype and not bare.any()


def test_loaded_weights_are_plain_and_writable(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.regraft")
    before = path.read_bytes()
    weight = load(path).program.weights.originals["linear.weight"]
    weight.add_(1)
    assert weight.device.type == "cpu" and not weight.requires_grad and path.read_bytes() == before


def test_report_members_and_manifest(tmp_path: Path) -> None:
    report = {"rules": [{"name": "a", "drift": 1e-7}]}
    extra = {"plan.json": b"{}", "tuning.jsonl": b"", "kernels/gelu/source.py": b"x = 1"}
    path = saved(tmp_path / "model.regraft", report=report, target=("cpu", "cuda:sm_90"), members=extra)
    loaded = load(path)
    assert loaded.report == report and loaded.members == {"plan.json": b"{}", "tuning.jsonl": b""}
    assert loaded.manifest.targets == ("cpu", "cuda:sm_90") and loaded.manifest.operator_libraries == ("aten",)


def test_kernels_are_handed_out_only_when_trusted(tmp_path: Path) -> None:
    source, binary = "kernels/gelu/source.py", "kernels/gelu/sm90.cubin"
    path = saved(tmp_path / "model.regraft", members={source: b"x = 1", binary: b"\x7fELF"})
    digest = load(path).manifest.members[source].sha256
    assert load(path).kernels == {}
    assert load(path, known_kernels=[digest]).kernels == {source: b"x = 1"}
    assert load(path, trust_kernels=True).kernels == {source: b"x = 1", binary: b"\x7fELF"}


Point = namedtuple("Point", "x y")
pytree._register_namedtuple(Point, serialized_type_name="tests.Point")


@pytest.mark.parametrize(
    "value",
    [
        (1, [2, {"a": 3, 4: 5}], None),
        OrderedDict(b=1, a=2),
        defaultdict(list, {"a": 1}),
        Point(1, (2, 3)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_structures_come_back(value: Any) -> None:
    leaves, spec = pytree.tree_flatten(value)
    found = decode_tree(encode_tree(spec))
    assert found == spec and pytree.tree_unflatten(leaves, found) == value


class Result:
    """An output class as libraries define them."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def _register(name: str | None) -> None:
    pytree.register_pytree_node(
        Result, lambda r: ([r.value], ["value"]), lambda v, _: Result(*v), serialized_type_name=name
    )


class ReturnsResult(nn.Module):
    """Returns an object of a registered class."""

    def forward(self, x: Tensor) -> Result:
        return Result(x + 1)


def test_a_registered_class_must_be_registered_when_loading(tmp_path: Path) -> None:
    _register("tests.Result")
    try:
        path = saved(tmp_path / "model.regraft", capture(ReturnsResult(), (torch.zeros(2),)))
        loaded = load(path).program
        assert isinstance(loaded.user_outputs(loaded.callable()(torch.zeros(2))), Result)
    finally:
        pytree._deregister_pytree_node(Result)
    with pytest.raises(ArtifactError, match=r"class tests.Result, which is not registered.*import the module"):
        load(path)


def test_a_class_without_a_name_is_refused_when_saving(tmp_path: Path) -> None:
    _register(None)
    try:
        program = capture(ReturnsResult(), (torch.zeros(2),))
        with pytest.raises(ArtifactError, match=r"class Result .* serialized_type_name"):
            saved(tmp_path / "model.regraft", program)
    finally:
        pytree._deregister_pytree_node(Result)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.regraft")
    before = path.read_bytes()
    program = small_program()
    program.weights.originals["linear.bias"] = torch.empty(3, device="meta")
    with pytest.raises(ArtifactError, match=r"model.regraft was not saved: tensor 'linear.bias' .* has no data"):
        save(path, program)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.regraft"]


def test_an_error_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ArtifactError, match="No space left on device"):
        saved(tmp_path / "model.regraft")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "message"), [("absent/model.regraft", "does not exist"), (".", "it is a folder")], ids=str
)
def test_a_place_that_cannot_be_written(place: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        saved(tmp_path / place)


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"report is not plain data"):
        saved(tmp_path / "model.regraft", report={"x": object()})
    with pytest.raises(ArtifactError, match=r"'../x' is not a member"):
        saved(tmp_path / "model.regraft", members={"../x": b""})


def test_saved_files_follow_the_umask(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    path = saved(tmp_path / "model.regraft")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
