"""The house rules that a machine can check: imports flow one way, every folder is a package, files stay short."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Folder -> which of our packages its files may import (DESIGN section 2). The face is ``regraft`` itself.
MAY_IMPORT = {
    "solvers": {"solvers"},
    "ir": {"ir"},
    "passes": {"passes", "ir", "solvers"},
    "codegen": {"codegen", "ir"},
}
#: Folder of codegen -> folders beside it that its files may not import: what both back ends use is neither's.
APART = {"rowwise": {"cpu", "triton"}, "cpu": {"triton"}}
#: Modules of the face, the highest first; a module imports from its own layer and those below.
FACE_LAYERS = (("cli",), ("api", "dynamo"), ("compiled",), ("report", "artifact", "sources"))
LONGEST_FILE = 450
LONGEST_TEST_FILE = 650  # a list of cases reads well at a length where code does not
FOLDERS = (*MAY_IMPORT, "regraft", "tests", "bench")


def files(*folders: str) -> list[Path]:
    """Python files of the tree; the links in ``regraft`` are not followed."""
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in found if not any(part.is_symlink() for part in path.parents)]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports anywhere in it, by its full name, with the line."""
    package = ("regraft", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_package_imports_only_what_lies_below_it(folder: str) -> None:
    allowed = MAY_IMPORT[folder]
    wrong = []
    for path in files(folder):
        for line, name in imported(path):
            parts = name.split(".")
            if parts[0] in (*MAY_IMPORT, "tests", "bench"):  # the folders are packages of regraft only
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
            if parts[0] == "regraft" and len(parts) > 1 and parts[1] not in allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", APART)
def test_a_back_end_keeps_to_itself(folder: str) -> None:
    barred = {f"regraft.codegen.{other}" for other in APART[folder]}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files(f"codegen/{folder}")
        for line, name in imported(path)
        if ".".join(name.split(".")[:3]) in barred
    ]
    assert not wrong, "\n".join(wrong)


def test_solvers_know_nothing_of_torch() -> None:
    wrong = [path for path in files("solvers") for _, name in imported(path) if name.split(".")[0] == "torch"]
    assert not wrong


def test_the_face_does_not_import_tests_or_benches() -> None:
    roots = {"tests", "bench", *MAY_IMPORT}
    wrong = [(path, name) for path in files("regraft") for _, name in imported(path) if name.split(".")[0] in roots]
    assert not wrong


def test_within_the_face_imports_go_down() -> None:
    level = {module: number for number, modules in enumerate(FACE_LAYERS) for module in modules}
    wrong = []
    for path in files("regraft"):
        own = path.relative_to(ROOT / "regraft").parts[0].removesuffix(".py")
        for line, name in imported(path):
            parts = name.split(".")
            if own in level and parts[0] == "regraft" and len(parts) > 1 and level.get(parts[1], 99) < level[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_folder_with_modules_is_a_package() -> None:
    """What is no package is left out of the wheel."""
    missing = {path.parent for path in files(*FOLDERS) if not (path.parent / "__init__.py").exists()}
    assert not missing


def test_files_stay_short() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in files(*FOLDERS)}
    limits = {path: LONGEST_TEST_FILE if path.parts[0] == "tests" else LONGEST_FILE for path in lengths}
    assert not {path: length for path, length in lengths.items() if length > limits[path]}


def test_no_file_names_a_place_of_one_machine() -> None:
    """The tree's own place, the home folder and work folders are nobody else's."""
    place = re.compile("|".join((re.escape(f"{ROOT}/"), re.escape(f"{Path.home()}/"), r"/work/\w+")))
    known = {".py", ".md", ".toml", ".j2", ".json", ".txt", ".cfg", ".yml", ".yaml"}
    found = []
    for folder in (*FOLDERS, "docs", ".ci", "."):
        paths = (ROOT / folder).glob("*") if folder == "." else (ROOT / folder).rglob("*")
        for path in paths:
            ours = path.suffix in known or path.name in ("Makefile", "run")
            if not path.is_file() or not ours or path == Path(__file__) or "__pycache__" in path.parts:
                continue
            match = place.search(path.read_text(encoding="utf-8"))
            if match:
                found.append(f"{path.relative_to(ROOT)}: {match.group()}")
    assert not found, "\n".join(found)
