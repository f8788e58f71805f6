"""Classes of inputs and outputs: those that another library registers when it is imported, and named tuples."""

from __future__ import annotations

import importlib
import json
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from regraft.artifact import ArtifactError
from regraft.artifact.trees import decode_tree, encode_tree


class Heads(NamedTuple):
    """Registered nowhere."""

    logits: Tensor
    boxes: list[Tensor]


HEADS = Heads(torch.ones(2), [torch.zeros(1), torch.zeros(3)])


def encoded() -> Any:
    """What a file says of ``HEADS``."""
    return json.loads(json.dumps(encode_tree(pytree.tree_structure(HEADS))))


def test_a_named_tuple_is_the_class_that_is_loaded() -> None:
    leaves, spec = pytree.tree_flatten(HEADS)
    found = decode_tree(encoded())
    assert found == spec and isinstance(pytree.tree_unflatten(leaves, found), Heads)


def test_a_named_tuple_that_no_module_defines_is_made_of_its_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    said = encoded()
    monkeypatch.delitem(globals(), "Heads")
    made = pytree.tree_unflatten([1, 2, 3], decode_tree(said))
    assert type(made).__name__ == "Heads" and (made.logits, made.boxes) == (1, [2, 3])


@pytest.mark.parametrize(
    "other",
    [{"fields": ["logits"]}, {"fields": ["a b", "c"]}, {"fields": None}, {"name": "not a name"}, {"name": 3}],
    ids=str,
)
def test_a_named_tuple_that_cannot_be_is_malformed(other: dict[str, Any]) -> None:
    said = encoded()
    said["context"].update(other)
    with pytest.raises(ArtifactError, match="malformed"):
        decode_tree(said)


def test_another_class_of_that_name_is_not_taken() -> None:
    said = encoded()
    said["context"].update(module="torch", name="Tensor", fields=["logits", "boxes"])
    made = pytree.tree_unflatten([1, 2, 3], decode_tree(said))
    assert type(made).__name__ == "Tensor" and (made.logits, made.boxes) == (1, [2, 3])


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("transformers.modeling_outputs.NoSuchOutput", True),
        ("transformers.models.clip.modeling_clip.NoSuchOutput", True),
        ("transformers.models.clip.NoSuchOutput", False),
        ("transformers.models.../evil.modeling_x.Output", False),
        ("transformers_evil.modeling_outputs.Output", False),
        ("os.path.Output", False),
    ],
)
def test_only_modules_of_outputs_are_imported(name: str, imported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def import_module(module: str) -> Any:
        asked.append(module)
        raise ImportError(module)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ArtifactError, match="import the module that defines it"):
        decode_tree({"class": name, "context": None, "children": []})
    assert asked == ([name.rpartition(".")[0]] if imported else [])
