"""English prose that every machine with regraft has: docstrings of Python's library and of packages, as passages."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("numpy", "networkx")
_PROSE = 0.85  # the part of the words that must be words
_SKIPPED = frozenset({"site-packages", "test", "tests", "idlelib", "turtledemo", "__pycache__", "testing", "_vendor"})


def passages(count: int, seed: int = 0, words: int = 90) -> list[str]:
    """``count`` different passages of so many words, drawn by ``seed``; raises ``RuntimeError`` when there are not as
    many. A long docstring gives several."""
    texts = sorted({text for root in _roots() for path in _files(root) for text in _docstrings(path)})
    found = sorted({passage for text in texts for passage in _cut(text, words)})
    if len(found) < count:
        raise RuntimeError(f"there are {len(found)} passages of {words} words, and {count} were asked for")
    return random.Random(seed).sample(found, count)


def _roots() -> Iterator[Path]:
    yield Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin).parent


def _files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED & set(path.relative_to(root).parts):
            yield path


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield " ".join(text.split())


def _cut(text: str, words: int) -> Iterator[str]:
    parts = text.split()
    for start in range(0, len(parts) - words + 1, words):
        piece = parts[start : start + words]
        plain = sum(part.strip(".,;:()'\"`!?").replace("-", "").isalpha() for part in piece)
        if plain >= _PROSE * words:
            yield " ".join(piece)
