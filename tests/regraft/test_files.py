"""Files are written whole or not at all, whatever stands in their place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import regraft
from regraft.errors import ArtifactError, RegraftError
from regraft.files import replacing, write_text
from tests.regraft.artifact.helpers import saved, with_graph

X = torch.ones(2, 4)


@pytest.fixture
def fast() -> regraft.CompiledModule:
    torch.manual_seed(0)
    return regraft.compile(torch.nn.Linear(4, 3).eval(), X)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_devices_and_pipes_stay(tmp_path: Path, fast: regraft.CompiledModule) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a folder or a device"), replacing(tmp_path / "pipe"):
        pass
    with pytest.raises(ArtifactError, match=r"pipe was not saved: .*a folder or a device"):
        fast.save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("name", ["x" * 247 + ".regraft", "with space\nand line", "модель"])
def test_odd_names_are_names(name: str, tmp_path: Path, fast: regraft.CompiledModule) -> None:
    fast.save(os.fsencode(tmp_path / name))
    assert torch.equal(regraft.load(os.fsencode(tmp_path / name))(X), fast(X))


@pytest.mark.parametrize("name", ["x" * 300, "nul\0nul", ""])
def test_what_is_no_name_is_refused(name: str, tmp_path: Path, fast: regraft.CompiledModule) -> None:
    path = f"{tmp_path}/{name}" if name else name
    for action in (fast.save, regraft.load):
        with pytest.raises(ArtifactError, match=r"was not saved|cannot be loaded"):
            action(path)
    assert issubclass(ArtifactError, RegraftError) and list(tmp_path.iterdir()) == []


def test_a_damaged_report_or_graph_with_right_hashes_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.regraft", report={"schema": "something else"})
    with pytest.raises(ArtifactError, match=r"m.regraft cannot be loaded: this JSON is not a report"):
        regraft.load(path)
    empty = with_graph(saved(tmp_path / "n.regraft"), lambda graph: graph["nodes"][-2][3].clear())
    with pytest.raises(
        ArtifactError, match=r"n.regraft cannot be loaded: graph.json does not pass 'self' to aten.gelu"
    ):
        regraft.load(empty)
    odd = with_graph(saved(tmp_path / "o.regraft"), lambda graph: graph["nodes"][-3][3].__setitem__(0, 7))
    with pytest.raises(ArtifactError, match=r"o.regraft cannot be loaded: its graph cannot be lowered"):
        regraft.load(odd)


def test_a_loaded_report_is_the_saved_one(tmp_path: Path, fast: regraft.CompiledModule) -> None:
    fast.save(tmp_path / "m.regraft")
    again = regraft.load(tmp_path / "m.regraft")
    assert again.report.to_json() == fast.report.to_json() and "attention" in again.report.recognized
    again.save(tmp_path / "n.regraft")
    assert (tmp_path / "m.regraft").read_bytes() == (tmp_path / "n.regraft").read_bytes()
