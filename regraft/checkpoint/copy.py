"""Writing a checkpoint whose tensors have the same names, types and shapes, and data that come from other places.

Since nothing but the data changes, every header and the index stay byte for byte as they were. Data are copied in
pieces of at most ``CHUNK`` bytes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from regraft.checkpoint.shards import Shard, Stored
from regraft.errors import SourceError

CHUNK = 1 << 22


@dataclass(frozen=True)
class Piece:
    """Bytes of a file."""

    path: Path
    start: int
    nbytes: int


def whole(tensor: Stored) -> list[Piece]:
    """All of a tensor."""
    return [Piece(tensor.path, tensor.start, tensor.nbytes)]


def rows(tensor: Stored, order: Sequence[int]) -> list[Piece]:
    """The entries of a tensor along its first dim that is not one, in another order."""
    size = tensor.nbytes // len(order)
    return [Piece(tensor.path, tensor.start + size * at, size) for at in order]


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` that becomes it when the block ends well, and is removed when it fails.

    Raises ``SourceError`` where ``folder`` exists and is not empty, or its parent does not exist.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SourceError(f"{folder} exists already; give a new folder to write to")
    if not folder.absolute().parent.is_dir():
        raise SourceError(f"the folder {folder.parent} of {folder.name} does not exist; create it first")
    temporary = folder.absolute().parent / f".regraft.{secrets.token_hex(8)}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_shard(
    shard: Shard, target: Path, sources: Mapping[str, Sequence[Piece]], done: Callable[[int], None]
) -> None:
    """Write ``shard`` with the data of each tensor in ``sources`` taken from there; ``done`` hears of bytes written."""
    with contextlib.ExitStack() as files, target.open("xb") as out:
        opened: dict[Path, BinaryIO] = {}
        out.write(shard.head)
        for tensor in shard.tensors:
            for piece in sources.get(tensor.name) or whole(tensor):
                if piece.path not in opened:
                    opened[piece.path] = files.enter_context(piece.path.open("rb"))
                _copy(opened[piece.path], piece, out)
            done(tensor.nbytes)
        out.flush()
        os.fsync(out.fileno())


def _copy(source: BinaryIO, piece: Piece, out: BinaryIO) -> None:
    source.seek(piece.start)
    left = piece.nbytes
    while left:
        data = source.read(min(left, CHUNK))
        if not data:
            raise SourceError(f"{piece.path} ended while it was read; it must not change meanwhile")
        out.write(data)
        left -= len(data)
