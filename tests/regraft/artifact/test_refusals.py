"""Files that are not exactly an artifact are refused with one sentence, before anything in them is used."""

from __future__ import annotations

import json
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from regraft.artifact import FORMAT_VERSION, ArtifactError, Limits, load, save
from tests.regraft.artifact.helpers import craft, members_of, saved, small_program, with_graph


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """The small program, saved."""
    return saved(tmp_path / "model.regraft")


def refused(path: Path, message: str, **options: Any) -> None:
    """Loading fails with one line that names the file and matches ``message``."""
    with pytest.raises(ArtifactError, match=message) as caught:
        load(path, **options)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def with_member(path: Path, name: str, change: Callable[[Any], Any]) -> Path:
    """Change the JSON of one member, with its hash."""
    members = members_of(path)
    members[name] = json.dumps(change(json.loads(members[name]))).encode()
    return craft(path, members)


def add_member(path: Path, info: str | zipfile.ZipInfo, data: bytes = b"x", **options: Any) -> Path:
    """Append a member that the manifest does not know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(info, data, **options)
    return path


# --- the file and its layout


def test_crafting_itself_is_harmless(artifact: Path) -> None:
    load(craft(artifact, members_of(artifact)))
    load(with_graph(artifact, lambda graph: None))


def test_absent_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.regraft", "there is no such file")
    refused(tmp_path, "it is a folder")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04pickle"])
def test_not_a_zip(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.regraft"
    path.write_bytes(content)
    refused(path, "not a zip archive")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated(share: float, artifact: Path) -> None:
    content = artifact.read_bytes()
    artifact.write_bytes(content[: int(len(content) * share)])
    refused(artifact, "truncated")


def test_a_zip_that_is_no_artifact(tmp_path: Path) -> None:
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("plan.json", "{}")
    refused(path, "lacks the member manifest.json; it is not a regraft artifact")


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a\\..\\x", "kernels/../x", "kernels/x", "kernels/a/../../x", "data.pkl", "C:x"],
)
def test_member_names_that_no_artifact_has(name: str, artifact: Path) -> None:
    refused(add_member(artifact, name), "a member named .* do not trust")


def test_a_name_that_hides_behind_a_null_byte(artifact: Path) -> None:
    add_member(artifact, "plan.jsonX../x")
    artifact.write_bytes(artifact.read_bytes().replace(b"plan.jsonX../x", b"plan.json\0../x"))
    refused(artifact, "a member named")


def test_links(artifact: Path) -> None:
    info = zipfile.ZipInfo("plan.json")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    refused(add_member(artifact, info, b"/etc/passwd"), "plan.json is a link")


def test_duplicated_manifest(artifact: Path) -> None:
    refused(add_member(artifact, "manifest.json", b"{}"), "manifest.json twice")


def test_compressed_members_and_bombs(artifact: Path) -> None:
    bomb = add_member(artifact, "plan.json", b"\0" * 10_000_000, compress_type=zipfile.ZIP_DEFLATED)
    refused(bomb, "plan.json is compressed")


def test_absurd_declared_size(artifact: Path) -> None:
    content = bytearray(artifact.read_bytes())
    entry = content.rindex(b"weights.safetensors") - 46  # the central directory's record ends with the name
    content[entry + 20 : entry + 28] = struct.pack("<II", 0xFFFFFF00, 0xFFFFFF00)
    artifact.write_bytes(bytes(content))
    refused(artifact, "claim .* bytes and the file has")


def test_encrypted_member(artifact: Path) -> None:
    content = bytearray(artifact.read_bytes())
    content[content.rindex(b"report.json") - 46 + 8] |= 1
    artifact.write_bytes(bytes(content))
    refused(artifact, "report.json is encrypted")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(members=2), "more than the limit of 2"),
        (Limits(total_bytes=10), "Limits.total_bytes"),
        (Limits(text_bytes=10), "Limits.text_bytes"),
    ],
    ids=["members", "total", "text"],
)
def test_limits_can_be_set(limits: Limits, message: str, artifact: Path) -> None:
    refused(artifact, message, limits=limits)


# --- the manifest


@pytest.mark.parametrize(
    "name", ["graph.json", "weights.safetensors", "weight_ops.json", "report.json", "manifest.json"]
)
def test_missing_member(name: str, artifact: Path) -> None:
    members = members_of(artifact)
    del members[name]
    with zipfile.ZipFile(artifact, "w") as archive:
        for key, text in members.items():
            archive.writestr(key, text)
    refused(artifact, f"lacks the member {name}")


def test_missing_member_that_the_manifest_does_not_list_either(artifact: Path) -> None:
    members = members_of(artifact)
    del members["report.json"]
    refused(craft(artifact, members), "lacks the member report.json")


def test_member_that_the_manifest_does_not_list(artifact: Path) -> None:
    refused(add_member(artifact, "plan.json"), "holds plan.json, which its manifest does not list")


def test_newer_format(artifact: Path) -> None:
    def newer(manifest: Any) -> None:
        manifest["format_version"] = FORMAT_VERSION + 1

    refused(craft(artifact, members_of(artifact), newer), f"format version {FORMAT_VERSION + 1}.*upgrade regraft")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "other"),
        ("format_version", "1"),
        ("format_version", True),
        ("members", []),
        ("targets", 3),
        ("libraries", None),
    ],
)
def test_malformed_manifest(key: str, value: Any, artifact: Path) -> None:
    refused(craft(artifact, members_of(artifact), lambda m: m.__setitem__(key, value)), "manifest.json")


@pytest.mark.parametrize("member", ["manifest.json", "graph.json", "weight_ops.json", "report.json"])
def test_deep_nesting(member: str, artifact: Path) -> None:
    members = members_of(artifact)
    nested = b"[" * 200_000 + b"]" * 200_000
    if member == "manifest.json":
        with zipfile.ZipFile(artifact, "w") as archive:
            for key, text in (members | {member: nested}).items():
                archive.writestr(key, text)
    else:
        craft(artifact, members | {member: nested})
    refused(artifact, f"{member} is nested too deeply")


def test_nesting_that_only_the_graph_reader_meets(artifact: Path) -> None:
    def nest(graph: Any) -> None:
        value: Any = 1
        for _ in range(900):
            value = [value]
        graph["example"] = value
        graph["nodes"][-2][3] = [value]

    refused(with_graph(artifact, nest), "graph.json")


# --- hashes


@pytest.mark.parametrize("member", ["weights.safetensors", "example.safetensors", "graph.json", "weight_ops.json"])
def test_a_flipped_byte(member: str, artifact: Path) -> None:
    data = members_of(artifact)[member]
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    content = artifact.read_bytes()
    artifact.write_bytes(content.replace(data, flipped))
    refused(artifact, f"{member} does not have the size and hash")


def test_a_flipped_byte_with_a_matching_checksum_of_the_zip(artifact: Path) -> None:
    members = members_of(artifact)
    data = members["weights.safetensors"]
    members["weights.safetensors"] = data[:-1] + bytes([data[-1] ^ 1])
    with zipfile.ZipFile(artifact, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    refused(artifact, "weights.safetensors does not have the size and hash")


# --- weights


def _header(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def rewrite(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return rewrite


@pytest.mark.parametrize(
    "change",
    [
        lambda data: struct.pack("<Q", 1 << 60) + data[8:],
        lambda data: data[:4],
        lambda data: struct.pack("<Q", 2) + b"[]",
        lambda data: data + b"more",
        _header(lambda h: h["linear.bias"].update(shape=[1 << 62])),
        _header(lambda h: h["linear.bias"].update(shape=[-3])),
        _header(lambda h: h["linear.bias"].update(dtype="PICKLE")),
        _header(lambda h: h["linear.bias"].update(data_offsets=[4, 16])),
        _header(lambda h: h.update(empty={"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]})),
        _header(lambda h: h.pop("linear.bias")),
    ],
    ids=[
        "header size",
        "no header",
        "list",
        "longer",
        "shape",
        "negative",
        "dtype",
        "overlap",
        "overflow",
        "gap",
    ],
)
def test_malformed_weights(change: Callable[[bytes], bytes], artifact: Path) -> None:
    members = members_of(artifact)
    members["weights.safetensors"] = change(members["weights.safetensors"])
    refused(craft(artifact, members), "weights.safetensors|tensor 'empty'")


@pytest.mark.parametrize(
    "derived",
    [
        {"a": {"op": "system", "inputs": ["linear.bias"], "options": {}}},
        {"a": {"op": "concat", "inputs": ["a"], "options": {"dim": 0}}},
        {"a": {"op": "concat", "inputs": ["absent"], "options": {"dim": 0}}},
        {"a": {"op": "cast", "inputs": ["linear.bias"], "options": {"dtype": "load"}}},
        {"a": {"op": "reshape", "inputs": ["linear.bias"], "options": {"shape": [7]}}},
        {"linear.bias": {"op": "reshape", "inputs": ["linear.weight"], "options": {"shape": [12]}}},
        {
            f"a{n}": {
                "op": "concat",
                "inputs": [f"a{n - 1}" if n else "linear.bias"] * 2,
                "options": {"dim": 0},
            }
            for n in range(40)
        },
    ],
    ids=["unknown", "cycle", "absent", "not a dtype", "impossible", "twice", "exponential"],
)
def test_malformed_weight_operations(derived: Any, artifact: Path) -> None:
    refused(
        with_member(artifact, "weight_ops.json", lambda data: data | {"derived": derived}),
        "weight_ops.json is malformed",
    )


def test_a_weight_of_another_shape(artifact: Path) -> None:
    def swap(data: Any) -> Any:
        tensors = data["tensors"]
        return data | {"tensors": {name: tensors["linear.bias"] for name in tensors}}

    refused(with_member(artifact, "weight_ops.json", swap), r"weight 'linear.weight' is \[3\]")


# --- the graph


def _call(graph: Any) -> Any:
    return next(node for node in graph["nodes"] if node[0] == "call_function")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.os.system",
        "builtins.eval",
        "operator.attrgetter",
        "operator.methodcaller",
        "aten::__class__.default",
        "aten::add.__class__",
        "aten::no_such_operator.default",
        "aten::add.no_such_overload",
        "aten::from_file.default",
        "aten::save.default",
        "aten::add_.Tensor",
        "inductor::resize_storage_bytes_.default",
        "aten::add.Tensor; import os",
        None,
        7,
        ["aten", "add"],
    ],
    ids=str,
)
def test_targets_that_are_not_pure_operators(target: Any, artifact: Path) -> None:
    def change(graph: Any) -> None:
        _call(graph)[2] = target

    refused(with_graph(artifact, change), "the graph calls")


@pytest.mark.parametrize("name", ["x; import os", "a b", "a.b", "", "lambda", "x\n", "\u017f", 3, None], ids=repr)
def test_node_names_that_would_become_code(name: Any, artifact: Path) -> None:
    def change(graph: Any) -> None:
        graph["nodes"][0][1] = name

    refused(with_graph(artifact, change), "names a node")


def test_keyword_names_that_would_become_code(artifact: Path) -> None:
    def change(graph: Any) -> None:
        _call(graph)[4] = {"x=__import__('os').getcwd(), y": 1}

    refused(with_graph(artifact, change), "which has no such argument")


@pytest.mark.parametrize(
    "value",
    [
        {"node": "absent"},
        {"node": ["x"]},
        {"dtype": "load"},
        {"device": "no such device"},
        {"memory_format": "float32"},
        {"object": "os.system"},
        {"float": "1e5"},
        {"slice": [1]},
        {"tuple": 3},
        {"a": 1, "b": 2},
    ],
    ids=str,
)
def test_malformed_arguments(value: Any, artifact: Path) -> None:
    def change(graph: Any) -> None:
        _call(graph)[3][0] = value

    refused(with_graph(artifact, change), "malformed")


@pytest.mark.parametrize(
    "size",
    [
        "s0",
        "__import__('os').system('true')",
        ["system", "ls"],
        ["Pow", 10, 10**9],
        ["Add"],
        ["FloorDiv", 1, 0],
        {},
        2.5,
    ],
    ids=str,
)
def test_malformed_symbolic_sizes(size: Any, artifact: Path) -> None:
    def change(graph: Any) -> None:
        _call(graph)[5]["tensor"][2][0] = size

    load(with_graph(artifact, lambda graph: None))
    if size == ["Add"]:
        return  # the empty sum is the number zero
    refused(with_graph(artifact, change), "symbolic size|graph.json is malformed")


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.pop("symbols"),
        lambda g: g.pop("conditions"),
        lambda g: g.update(conditions=["os"]),
        lambda g: g.update(symbols={"s0; x": {"hint": 1, "range": [0, 1], "positive": True, "nonnegative": True}}),
        lambda g: g.update(symbols={"s0": {"hint": 5, "range": [6, 2], "positive": True, "nonnegative": True}}),
        lambda g: g.update(nodes=[]),
        lambda g: g["nodes"].reverse(),
        lambda g: g["nodes"].append(g["nodes"][-1]),
        lambda g: g["nodes"].insert(0, g["nodes"][0]),
        lambda g: g["nodes"][0].__setitem__(0, "get_attr"),
        lambda g: g["nodes"][-2][6].update(stack_trace=10**9),
        lambda g: g.update(strings=[1]),
        lambda g: g["inputs"].pop(),
        lambda g: g["outputs"].pop(),
        lambda g: g["inputs"][0].__setitem__(2, "absent"),
        lambda g: g["inputs"][0].__setitem__(0, "TOKEN"),
        lambda g: g.update(in_spec={"type": "tuple", "context": None, "children": []}),
        lambda g: g.update(out_spec={"type": "os", "context": None, "children": []}),
        lambda g: g.update(out_spec={"type": "dict", "context": ["a", "b"], "children": [None]}),
        lambda g: g.update(out_spec={"type": "defaultdict", "context": ["eval", []], "children": []}),
        lambda g: g.update(example=[]),
        lambda g: g.update(example=[{"stored": "7"}]),
    ],
)
def test_malformed_graphs(change: Callable[[Any], Any], artifact: Path) -> None:
    def apply(graph: Any) -> None:
        change(graph)

    refused(with_graph(artifact, apply), "graph.json|structure|symbolic")


def test_an_enum_in_a_structure_imports_nothing(artifact: Path) -> None:
    enum = {"__enum__": True, "fqn": "this:x", "name": "y"}
    change = {"out_spec": {"type": "dict", "context": [enum], "children": [None]}}
    refused(with_graph(artifact, lambda graph: graph.update(change)), "malformed")


def test_operators_of_other_libraries_need_permission(tmp_path: Path) -> None:
    with torch.library._scoped_library("regraft_artifact_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        program = small_program()
        node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.gelu.default)
        node.target = torch.ops.regraft_artifact_test.twice.default
        path = tmp_path / "model.regraft"
        save(path, program)
        refused(path, "library 'regraft_artifact_test'; import that library and pass namespaces=")
        loaded = load(path, namespaces=["regraft_artifact_test"]).program
        assert torch.equal(loaded.callable()(*program.example)[0], program.callable()(*program.example)[0])
    refused(path, "not registered in this process", namespaces=["regraft_artifact_test"])
