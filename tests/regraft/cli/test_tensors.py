"""Outputs are named by their place in the structure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.modeling_outputs import BaseModelOutput

from regraft.cli.common import Refused
from regraft.cli.tensors import name_tensors, write_outputs

ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (ONE, ["output"]),
        ((ONE, ONE), ["0", "1"]),
        ({"a": ONE, "past": ((ONE, ONE),)}, ["a", "past.0.0", "past.0.1"]),
        (BaseModelOutput(last_hidden_state=ONE), ["last_hidden_state"]),
        ([ONE, 3, None], ["0"]),
    ],
)
def test_names(outputs: object, names: list[str]) -> None:
    assert list(name_tensors(outputs)) == names


def test_outputs_that_share_memory_are_written(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    assert write_outputs(tmp_path / "y", (base, base.T)) == {"0": [2, 3], "1": [3, 2]}
    assert torch.equal(load_file(tmp_path / "y")["1"], base.T)


def test_no_tensor_no_file(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no tensor"):
        write_outputs(tmp_path / "y", {"a": 1})
    assert list(tmp_path.iterdir()) == []
