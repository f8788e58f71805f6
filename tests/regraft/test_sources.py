"""Naming a model on the command line: three kinds of source, and a sentence for each way to get it wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from regraft.errors import SourceError
from regraft.sources import resolve

_FACTORIES = """
import torch
from torch import nn
model = nn.Linear(2, 2)
def alone(): return nn.Linear(2, 2)
def with_input(): return nn.Linear(2, 2), torch.ones(1, 2)
def with_all(): return nn.Linear(2, 2), (), {"input": torch.ones(1, 2)}
def wrong(): return 3
def raising(): raise ValueError("no weights here")
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "made_models.py").write_text(_FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    return "made_models"


def refusal(text: str, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        resolve(text, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "positional", "named"),
    [("alone", 0, 0), ("with_input", 1, 0), ("with_all", 0, 1), ("model", 0, 0)],
)
def test_a_factory_returns_a_model_with_or_without_inputs(
    factories: str, name: str, positional: int, named: int
) -> None:
    source = resolve(f"{factories}:{name}")
    assert isinstance(source.model, nn.Linear) and not source.model.training
    assert (len(source.args), len(source.kwargs)) == (positional, named)


def test_factories_that_do_not_work(factories: str) -> None:
    assert "raised ValueError: no weights here" in refusal(f"{factories}:raising")
    assert "returned (int)" in refusal(f"{factories}:wrong")
    assert "has no 'absent'" in refusal(f"{factories}:absent")
    assert "cannot be imported" in refusal("no_such_package_at_all:make")


def test_a_pt2_file_brings_its_example(tmp_path: Path) -> None:
    x = torch.randn(2, 3)
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(nn.Linear(3, 3).eval(), (x,), strict=False), path)
    source = resolve(str(path))
    assert torch.equal(source.args[0], x)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "bad.pt2").write_bytes(b"nothing")
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "cannot be loaded" in refusal(str(tmp_path / "bad.pt2"))
    assert "is not a .pt2 file" in refusal(str(tmp_path / "model.onnx"))
    assert "there is no file" in refusal("absent.pt2")
    assert "there is no model 'absent'" in refusal("absent")


def test_inputs_from_a_file_take_the_place_of_the_sources_own(factories: str, tmp_path: Path) -> None:
    save_file({"0": torch.zeros(5, 2), "mask": torch.ones(1)}, tmp_path / "x.safetensors")
    source = resolve(f"{factories}:with_input", tmp_path / "x.safetensors")
    assert source.args[0].shape == (5, 2) and list(source.kwargs) == ["mask"]
    save_file({"1": torch.zeros(1)}, tmp_path / "gap.safetensors")
    assert "without a gap" in refusal(f"{factories}:alone", inputs=tmp_path / "gap.safetensors")
    save_file({"0": torch.zeros(1), "00": torch.zeros(1)}, tmp_path / "twice.safetensors")
    assert "the positions 0, 00; number them" in refusal(f"{factories}:alone", inputs=tmp_path / "twice.safetensors")
    assert "cannot be read" in refusal(f"{factories}:alone", inputs=tmp_path / "absent.safetensors")


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    source = resolve(str(tmp_path))
    assert type(source.model).__name__ == "LlamaForCausalLM" and not source.model.training  # type: ignore[union-attr]
    assert source.kwargs["input_ids"].shape == (2, 16) and source.kwargs["use_cache"] is False
    with torch.no_grad():
        source.model(**source.kwargs)  # type: ignore[operator]


def test_an_image_model_gets_pixels_and_a_sentence_transformers_folder_its_inner_model(
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "0_Transformer")
    (tmp_path / "modules.json").write_text('[{"idx": 0, "path": "0_Transformer"}]')
    assert resolve(str(tmp_path)).kwargs["pixel_values"].shape == (2, 3, 32, 32)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    assert "no JSON object" in refusal(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert "has no weights" in refusal(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    assert "transformers cannot load" in refusal(str(tmp_path))
