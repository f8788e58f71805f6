"""A library that export names and never uses is loaded by whoever uses it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from regraft.ir.capture_imports import put_off


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module ``a_library``, and ``its_user``, which names a class of it when it is imported."""
    (tmp_path / "a_library.py").write_text("class Thing: pass\n")
    (tmp_path / "its_user.py").write_text("import a_library\ndef made() -> a_library.Thing: return a_library.Thing()\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("a_library", "its_user"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "a_library"


def test_it_is_loaded_when_it_is_used(library: str) -> None:
    with put_off(library):
        user = importlib.import_module("its_user")
    assert library not in sys.modules
    assert type(user.made()) is importlib.import_module(library).Thing


def test_another_thread_gets_the_real_one_meanwhile(library: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with put_off(library), ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: importlib.import_module(library).Thing).result()
    assert found is importlib.import_module(library).Thing


def test_one_that_is_loaded_stays(library: str) -> None:
    loaded = importlib.import_module(library)
    with put_off(library):
        assert importlib.import_module(library) is loaded
    assert sys.modules[library] is loaded


def test_a_capture_loads_none_and_leaves_it_usable() -> None:
    """In a process of its own: here it may be loaded long since."""
    code = """
import sys, torch
from regraft.ir.capture import capture
capture(torch.nn.Linear(2, 2).eval(), (torch.ones(1, 2),))
assert "networkx" not in sys.modules
import networkx
from torch._functorch._activation_checkpointing import graph_info_provider
assert graph_info_provider.nx.DiGraph is networkx.DiGraph
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
