"""Crafting archives by hand, and comparing programs bit by bit."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.artifact import save
from regraft.ir.capture import capture
from regraft.ir.program import Program


class Small(nn.Module):
    """One linear layer: the smallest model with weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(self.linear(x))


def small_program() -> Program:
    """``Small`` as a program."""
    return capture(Small().eval(), (torch.linspace(-1, 1, 8).reshape(2, 4),))


def saved(path: Path, program: Program | None = None, **options: Any) -> Path:
    """Save a program (the small one) and return the path."""
    save(path, program if program is not None else small_program(), **options)
    return path


def members_of(path: Path) -> dict[str, bytes]:
    """Every member of a zip."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def craft(path: Path, members: dict[str, bytes], manifest: Callable[[Any], None] | None = None) -> Path:
    """Write a zip whose manifest lists ``members`` with their true sizes and hashes."""
    contents = dict(members)
    data = json.loads(contents.pop("manifest.json"))
    data["members"] = {
        name: {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()} for name, text in contents.items()
    }
    if manifest is not None:
        manifest(data)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in contents.items():
            archive.writestr(name, text)
        archive.writestr("manifest.json", json.dumps(data))
    return path


def with_graph(path: Path, change: Callable[[Any], None]) -> Path:
    """Rewrite ``graph.json`` of a saved artifact, with its hash."""
    members = members_of(path)
    graph = json.loads(members["graph.json"])
    change(graph)
    members["graph.json"] = json.dumps(graph).encode()
    return craft(path, members)


def same_bits(left: Any, right: Any) -> bool:
    """Whether two outputs are the same, NaN bits included."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.shape != right.shape or left.dtype != right.dtype:
            return False
        copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in (left, right)]  # strides of one
        raw = [copy.reshape(-1).view(torch.uint8) for copy in copies]
        return torch.equal(*raw)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same_bits(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def same_outputs(program: Program, other: Program, inputs: list[Any]) -> bool:
    """Whether two programs give the same bits on the same flat inputs."""
    return same_bits(program.callable()(*inputs), other.callable()(*inputs))
