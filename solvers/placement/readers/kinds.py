"""Which form a trace is of, told by its content: names say little, and the same ending stands for several forms."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from regraft.solvers.placement.errors import PlacementError

#: Our own two, TensorRT-LLM's folder, vLLM's JSON lines, recorded counts as JSON, and torch files (SGLang).
KINDS = ("npz", "safetensors", "trtllm", "vllm", "counts", "torch")
_ARCHIVE = b"PK\x03\x04"
#: A safetensors file begins with the length of its JSON header, eight bytes, little-endian.
_LONGEST_HEADER = 1 << 32


def kind_of(path: Path | str) -> str:
    """One of ``KINDS``. Raises ``PlacementError`` for what is missing, empty, cut off, or none of them."""
    path = Path(path)
    if path.is_dir():
        if (path / "meta_info.json").exists():
            return "trtllm"
        raise PlacementError(
            f"folder {path.name!r} has no meta_info.json; expected TensorRT-LLM's statistics folder, or a trace file"
        )
    try:
        with path.open("rb") as file:
            start = file.read(64)
            file.seek(0)
            first_line = file.readline() if start.lstrip()[:1] == b"{" else b""
    except OSError as error:
        raise PlacementError(f"trace {path.name!r} cannot be read: {error.strerror or error}") from error
    if start.startswith(_ARCHIVE):
        return _kind_of_archive(path)
    if start[8:9] == b"{" and 0 < int.from_bytes(start[:8], "little") < _LONGEST_HEADER:
        return "safetensors"
    if first_line:
        return "vllm" if isinstance(_parsed(first_line), dict) and "record_type" in _parsed(first_line) else "counts"
    raise PlacementError(
        f"{path.name!r} is {'empty' if not start else 'of no known form'}; expected a trace as .npz or .safetensors, "
        "TensorRT-LLM's folder, vLLM's JSON lines, recorded counts as JSON, or SGLang's .pt"
    )


def _kind_of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise PlacementError(f"{path.name!r} is cut off or damaged: {error}; copy or record it again") from error
    return "torch" if any(name.endswith("data.pkl") for name in names) else "npz"


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
