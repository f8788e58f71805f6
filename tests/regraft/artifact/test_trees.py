"""Classes of outputs that another library registers when it is imported."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from regraft.artifact import ArtifactError
from regraft.artifact.trees import decode_tree


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
