"""Saving a program to one file, and loading it without running or unpickling anything from that file.

Members: ``manifest.json``, ``graph.json`` (see ``graph.py``), ``weights.safetensors`` with
``weight_ops.json`` (see ``weights.py``), ``report.json``, ``example.safetensors``, and when given
``tuning.jsonl``, ``plan.json`` and ``kernels/<name>/<file>``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from regraft.artifact.container import EXAMPLE, Limits, Reader, is_optional, writing
from regraft.artifact.errors import ArtifactError
from regraft.artifact.example import split_example
from regraft.artifact.graph import decode_graph, encode_graph, namespaces_of
from regraft.artifact.manifest import Manifest, dump_json, parse_json
from regraft.artifact.targets import NAMESPACES
from regraft.artifact.tensors import read_tensors, write_tensors
from regraft.artifact.weights import join_weights, split_weights
from regraft.ir.program import Program
from regraft.ir.weights import WeightStore


@dataclass
class Loaded:
    """What an artifact holds.

    ``members`` has ``tuning.jsonl`` and ``plan.json`` where present, and ``kernels`` the files of kernels
    that may be run, both by member name.
    """

    program: Program
    manifest: Manifest
    report: dict[str, Any] | None
    members: dict[str, bytes] = field(default_factory=dict)
    kernels: dict[str, bytes] = field(default_factory=dict)


def save(
    path: str | os.PathLike[str],
    program: Program,
    *,
    report: dict[str, Any] | None = None,
    target: str | Collection[str] = "cpu",
    members: Mapping[str, bytes] | None = None,
    keep_example: bool = True,
) -> None:
    """Write ``program`` to ``path``, whole or not at all; equal programs give equal bytes.

    ``members`` are optional members by name (``tuning.jsonl``, ``plan.json``, ``kernels/<name>/<file>``).
    The example inputs go into the file unless ``keep_example`` is false; zeros of the same shape then
    take their place. Raises ``ArtifactError`` with the reason when the program holds something that an
    artifact cannot store or the file cannot be written.
    """
    try:
        _save(_path(path), program, report, target, dict(members or {}), keep_example)
    except ArtifactError as error:
        raise ArtifactError(f"{_shown(path)} was not saved: {error}") from error


def load(
    path: str | os.PathLike[str],
    *,
    trust_kernels: bool = False,
    known_kernels: Collection[str] = (),
    namespaces: Collection[str] = (),
    limits: Limits | None = None,
) -> Loaded:
    """Read an artifact; weights come to the CPU, tied ones tied again.

    The layout of the zip, sizes and hashes are checked before anything in it is used, and nothing is unpickled or
    evaluated. The only modules imported are those of an installed transformers that define the outputs of its
    models. Operators come from ``aten``, ``prims``, ``regraft`` and the libraries in ``namespaces``. Kernels are
    handed out with ``trust_kernels``, or, sources only, when ``known_kernels`` has their SHA-256 (those that the
    installed regraft would emit). Raises
    ``ArtifactError`` for any file that is not exactly an artifact.
    """
    try:
        with Reader(_path(path), limits or Limits()) as reader:
            return _load(reader, trust_kernels, known_kernels, namespaces)
    except ArtifactError as error:
        raise ArtifactError(f"{_shown(path)} cannot be loaded: {error}") from error


def _shown(path: str | os.PathLike[str]) -> str:
    return os.fsdecode(path) or "''"


def _path(path: str | os.PathLike[str]) -> Path:
    name = os.fsdecode(path)
    if not name or "\0" in name:
        raise ArtifactError("it is not the name of a file; give another path")
    return Path(name)


def _save(
    path: Path,
    program: Program,
    report: dict[str, Any] | None,
    target: str | Collection[str],
    members: dict[str, bytes],
    keep_example: bool,
) -> None:
    for name in members:
        if not is_optional(name):
            raise ArtifactError(f"{name!r} is not a member; use tuning.jsonl, plan.json or kernels/<name>/<file>")
    used = WeightStore(program.weights.originals)
    used.derived = dict(program.weights.derived)
    used.keep_only({spec.target for spec in program.signature.input_specs if spec.target is not None})
    tensors, weight_data = split_weights(used)
    example, example_data = split_example(program, keep_example)
    graph = encode_graph(program)
    try:
        report_text = dump_json(report)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the report is not plain data ({error}); pass a dict of JSON values") from error
    targets = (target,) if isinstance(target, str) else tuple(target)
    with writing(path, lambda written: Manifest(targets, namespaces_of(graph), written)) as writer:
        writer.add_bytes("graph.json", dump_json({**graph, "example": example_data}))
        writer.add_bytes("weight_ops.json", dump_json(weight_data))
        writer.add_bytes("report.json", report_text)
        for name in sorted(members):
            writer.add_bytes(name, members[name])
        write_tensors(writer, EXAMPLE, example)
        write_tensors(writer, "weights.safetensors", tensors)


def _load(reader: Reader, trust_kernels: bool, known_kernels: Collection[str], namespaces: Collection[str]) -> Loaded:
    _check_libraries(reader.manifest, namespaces)
    texts = {name: reader.read(name) for name in reader.names() if not name.endswith(".safetensors")}
    tensors = _tensors(reader, "weights.safetensors")
    example = _tensors(reader, EXAMPLE) if EXAMPLE in reader.names() else {}
    graph = parse_json(texts.pop("graph.json"), "graph.json")
    weights = join_weights(tensors, parse_json(texts.pop("weight_ops.json"), "weight_ops.json"))
    report = parse_json(texts.pop("report.json"), "report.json")
    if not isinstance(graph, dict) or not isinstance(report, (dict, type(None))):
        raise ArtifactError("graph.json or report.json is not an object; save the model again")
    kernels = {name: texts.pop(name) for name in list(texts) if name.startswith("kernels/")}
    return Loaded(
        program=decode_graph(graph, weights, example, namespaces),
        manifest=reader.manifest,
        report=report,
        members=texts,
        kernels=kernels if trust_kernels else _known(kernels, known_kernels),
    )


def _tensors(reader: Reader, member: str) -> dict[str, Tensor]:
    with reader.stream(member) as stream:
        return read_tensors(stream, member)


def _known(kernels: dict[str, bytes], known: Collection[str]) -> dict[str, bytes]:
    """Sources that the caller knows by hash; a binary beside one could still be anything."""
    return {name: data for name, data in kernels.items() if hashlib.sha256(data).hexdigest() in known}


def _check_libraries(manifest: Manifest, namespaces: Collection[str]) -> None:
    for name in manifest.operator_libraries:
        if name not in (*NAMESPACES, *namespaces):
            raise ArtifactError(
                f"it calls operators of the library {name!r}; import that library and pass namespaces=({name!r},) to "
                "load() if you trust it"
            )
