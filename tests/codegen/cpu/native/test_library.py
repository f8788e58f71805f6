"""The native library: built once, kept, checked before use; without a compiler everything still works."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest

from regraft.codegen.cpu.native import experts
from regraft.codegen.cpu.native.kernels import EXPERTS, FUSED, NATIVE, REVERSED, TOKENS
from regraft.codegen.cpu.native.library import NativeLibrary
from tests.codegen.cpu.support import needs_native

LINEAR = ("product.cpp", "linear.cpp")


def accept(library: ctypes.CDLL) -> str:
    return "" if library.regraft_panel() > 0 else "no panel"


@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="no g++ here")
@pytest.mark.parametrize("library", (NATIVE, EXPERTS, TOKENS, FUSED, REVERSED))
def test_where_there_is_a_compiler_the_kernels_are_there(library: NativeLibrary) -> None:
    """Tests of kernels are skipped where there are none: without this one, all would be where a source is wrong."""
    if os.environ.get("REGRAFT_NATIVE") == "0":
        pytest.skip("the environment wants none")
    assert library.missing() == ""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("REGRAFT_CACHE_DIR", str(folder))
    monkeypatch.delenv("REGRAFT_NATIVE", raising=False)
    return folder


def broken_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """The only compiler on the path is a script."""
    folder.mkdir()
    compiler = folder / "g++"
    compiler.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)


@needs_native
def test_a_library_is_built_once_and_kept(cache: Path) -> None:
    assert NativeLibrary(LINEAR, accept).missing() == ""
    (built,) = cache.iterdir()
    before = built.stat().st_mtime_ns
    assert NativeLibrary(LINEAR, accept).missing() == ""
    assert [entry.stat().st_mtime_ns for entry in cache.iterdir()] == [before]  # nothing half-made is left either


def accept_experts(library: ctypes.CDLL) -> str:
    experts.declare(library)
    return "" if library.regraft_experts_workspace(2, 8, 8) > 0 else "no workspace"


@needs_native
def test_a_library_calls_functions_of_its_base(cache: Path) -> None:
    base = NativeLibrary(LINEAR, accept)
    assert NativeLibrary(("experts.cpp",), accept_experts, base).missing() == ""
    assert len(list(cache.iterdir())) == 2


def test_without_its_base_a_library_is_missing_too(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_compiler(tmp_path / "bin", monkeypatch, "echo 'x.cpp:1: error: bad day' >&2; exit 1")
    base = NativeLibrary(LINEAR, accept)
    assert NativeLibrary(("experts.cpp",), accept_experts, base).missing() == base.missing() != ""


@needs_native
def test_a_damaged_library_is_built_again(cache: Path) -> None:
    assert NativeLibrary(LINEAR, accept).missing() == ""
    (built,) = cache.iterdir()
    built.unlink()  # a new file: the old one is mapped into this process
    built.write_bytes(b"no library")
    assert NativeLibrary(LINEAR, accept).missing() == ""


@needs_native
def test_code_is_not_loaded_from_a_folder_that_others_can_write_to(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO)
    assert NativeLibrary(LINEAR, accept).missing() == ""
    assert not list(cache.iterdir())


@needs_native
def test_what_computes_wrong_numbers_is_not_used(cache: Path) -> None:
    assert "built is wrong: off by one" in NativeLibrary(LINEAR, lambda library: "off by one").missing()


def test_no_compiler_is_told(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler was found" in NativeLibrary(LINEAR, accept).missing()
    assert "no C++ compiler was found" in caplog.text


def test_a_compiler_that_fails_says_why(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_compiler(tmp_path / "bin", monkeypatch, "echo 'x.cpp:1: error: bad day' >&2; exit 1")
    assert NativeLibrary(LINEAR, accept).missing() == "g++ failed: x.cpp:1: error: bad day"
    assert not list(cache.iterdir())


def test_a_compiler_that_writes_nonsense(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"'
    broken_compiler(tmp_path / "bin", monkeypatch, script)
    assert "cannot be loaded" in NativeLibrary(LINEAR, accept).missing()


def test_it_can_be_switched_off(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("REGRAFT_NATIVE", "0")
    library = NativeLibrary(LINEAR, accept)
    assert library.missing() == "the environment has REGRAFT_NATIVE=0"
    with pytest.raises(RuntimeError, match="REGRAFT_NATIVE"):
        library.library()
    assert not os.path.lexists(cache) and not caplog.text
