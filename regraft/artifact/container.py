"""The zip around an artifact: written atomically, and read only after its layout is checked.

Members are stored, not compressed: the weights hardly compress, and a stored member cannot be a decompression
bomb, because it cannot be larger than the file that holds it.
"""

from __future__ import annotations

import hashlib
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from regraft.artifact.errors import ArtifactError
from regraft.artifact.manifest import Manifest, Member, dump_json
from regraft.files import replacing

MANIFEST = "manifest.json"
REQUIRED = ("graph.json", "weights.safetensors", "weight_ops.json", "report.json")
EXAMPLE = "example.safetensors"
OPTIONAL = ("tuning.jsonl", "plan.json")
_KERNEL = re.compile(r"kernels/[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_TIME = (1980, 1, 1, 0, 0, 0)
_CHUNK = 1 << 20
_ENCRYPTED = 0x1


@dataclass(frozen=True)
class Limits:
    """What a file may ask of the loader. Raise a limit to load a larger model than anyone had in mind."""

    members: int = 10_000
    total_bytes: int = 1 << 40
    text_bytes: int = 1 << 28


def is_optional(name: str) -> bool:
    """Whether ``name`` is a reserved name of a member that an artifact may hold beside the required ones."""
    return name in OPTIONAL or _KERNEL.fullmatch(name) is not None


class Writer:
    """Adds members to a new artifact and remembers their sizes and hashes for the manifest."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self.members: dict[str, Member] = {}

    def add(self, name: str, size: int, chunks: Iterable[bytes | memoryview]) -> None:
        """Write one member from ``chunks``, which together have ``size`` bytes."""
        info = zipfile.ZipInfo(name, _TIME)
        info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o644) << 16
        info.file_size = size
        digest, written = hashlib.sha256(), 0
        with self._archive.open(info, "w") as stream:
            for chunk in chunks:
                digest.update(chunk)
                stream.write(chunk)
                written += len(chunk)
        if written != size:
            raise ArtifactError(f"member {name} was announced with {size} bytes and has {written}")
        self.members[name] = Member(size, digest.hexdigest())

    def add_bytes(self, name: str, data: bytes) -> None:
        """Write one small member."""
        self.add(name, len(data), [data])


@contextmanager
def writing(path: Path, manifest: Callable[[dict[str, Member]], Manifest]) -> Iterator[Writer]:
    """A writer for ``path``: the file appears there complete, or not at all.

    ``manifest`` makes the manifest from the members' sizes and hashes once all are written.
    """
    try:
        if path.is_dir():
            raise ArtifactError("it is a folder; give the path of the file to write")
        if not path.parent.is_dir():
            raise ArtifactError(f"the folder {path.parent} does not exist; create it before saving {path.name}")
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            writer = Writer(archive)
            yield writer
            writer.add_bytes(MANIFEST, dump_json(manifest(dict(writer.members)).to_json()))
    except OSError as error:
        raise ArtifactError(f"it cannot be written ({error.strerror or error}); choose another place") from error


class Reader:
    """An artifact whose layout and manifest have been checked; use it as a context manager.

    Raises ``ArtifactError`` for anything that is not exactly an artifact. Messages here speak of "it":
    the caller puts the path in front.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self.limits = limits
        try:
            if path.is_dir():
                raise ArtifactError("it is a folder; give the path of a saved artifact")
            if not path.is_file():
                raise ArtifactError("there is no such file; give the path of a saved artifact")
            self._archive = zipfile.ZipFile(path)
        except ArtifactError:
            raise
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ArtifactError(_not_a_zip(path, error)) from error
        try:
            self._infos = _check_layout(self._archive.infolist(), path.stat().st_size, limits)
            self.manifest = Manifest.parse(self._read_text(MANIFEST, None))
            self._check_members()
        except BaseException:
            self._archive.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._archive.close()

    def names(self) -> list[str]:
        """Names of the members, the manifest left out."""
        return [name for name in self._infos if name != MANIFEST]

    def read(self, name: str) -> bytes:
        """A small member, checked against its hash."""
        return self._read_text(name, self.manifest.members[name])

    @contextmanager
    def stream(self, name: str) -> Iterator[CheckedStream]:
        """A large member: reads are hashed, and leaving the block checks that all was read."""
        try:
            with self._archive.open(self._infos[name]) as raw:
                checked = CheckedStream(raw, name, self.manifest.members[name])
                yield checked
                checked.finish()
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise damaged(name) from error

    def _read_text(self, name: str, expected: Member | None) -> bytes:
        info = self._infos[name]
        if info.file_size > self.limits.text_bytes:
            raise ArtifactError(
                f"member {name} has {info.file_size} bytes, more than the limit of {self.limits.text_bytes}; "
                "raise Limits.text_bytes if you trust this file"
            )
        try:
            data = self._archive.read(info)
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
            raise damaged(name) from error
        if len(data) != info.file_size or (expected and hashlib.sha256(data).hexdigest() != expected.sha256):
            raise damaged(name)
        return data

    def _check_members(self) -> None:
        declared, present = set(self.manifest.members), set(self.names())
        if declared != present:
            absent, extra = sorted(declared - present), sorted(present - declared)
            what = f"lacks the member {absent[0]}" if absent else f"holds {extra[0]}, which its manifest does not list"
            raise ArtifactError(f"it {what}; it is incomplete or was changed, save or copy it again")
        for name in REQUIRED:
            if name not in present:
                raise ArtifactError(f"it lacks the member {name}; it is incomplete, save the model again")
        for name, member in self.manifest.members.items():
            if member.size != self._infos[name].file_size:
                raise damaged(name)


class CheckedStream:
    """Reads one member forwards and hashes what it reads."""

    def __init__(self, raw: IO[bytes], name: str, expected: Member) -> None:
        self._raw, self._name, self._expected = raw, name, expected
        self._digest = hashlib.sha256()
        self.left = expected.size

    def read(self, count: int) -> bytes:
        """Exactly ``count`` bytes."""
        buffer = bytearray(count)
        self.read_into(memoryview(buffer))
        return bytes(buffer)

    def read_into(self, target: memoryview) -> None:
        """Fill ``target``; raises ``ArtifactError`` when the member ends before."""
        if len(target) > self.left:
            raise damaged(self._name)
        for start in range(0, len(target), _CHUNK):
            part = target[start : start + _CHUNK]
            data = self._raw.read(len(part))
            if len(data) != len(part):
                raise damaged(self._name)
            part[:] = data
            self._digest.update(data)
        self.left -= len(target)

    def finish(self) -> None:
        """Check that the whole member was read and that its hash is the manifest's."""
        if self.left or self._digest.hexdigest() != self._expected.sha256 or self._raw.read(1):
            raise damaged(self._name)


def damaged(name: str) -> ArtifactError:
    """The error for a member whose bytes are not those that were saved."""
    return ArtifactError(
        f"member {name} does not have the size and hash that were saved; the file is damaged or was changed, "
        "copy or save it again"
    )


def _check_layout(infos: list[zipfile.ZipInfo], file_size: int, limits: Limits) -> dict[str, zipfile.ZipInfo]:
    """The members by name, when all are plain stored files with allowed names and honest sizes."""
    if len(infos) > limits.members:
        raise ArtifactError(f"it has {len(infos)} members, more than the limit of {limits.members}; do not trust it")
    by_name: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        _check_member(info)
        if info.filename in by_name:
            raise ArtifactError(f"it holds the member {info.filename} twice; do not trust this file")
        by_name[info.filename] = info
    total = sum(info.file_size for info in infos)
    if total > file_size:
        raise ArtifactError(
            f"its members claim {total} bytes and the file has {file_size}; it is truncated or was changed, "
            "copy it again"
        )
    if total > limits.total_bytes:
        raise ArtifactError(
            f"it holds {total} bytes, more than the limit of {limits.total_bytes}; raise Limits.total_bytes to load it"
        )
    if MANIFEST not in by_name:
        raise ArtifactError(f"it lacks the member {MANIFEST}; it is not a regraft artifact, give one saved by regraft")
    return by_name


def _check_member(info: zipfile.ZipInfo) -> None:
    name = info.orig_filename
    if name not in (MANIFEST, EXAMPLE, *REQUIRED) and not is_optional(name):
        raise ArtifactError(f"it holds a member named {name!r}, which no artifact has; do not trust this file")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise ArtifactError(f"its member {name} is a link or a special file; do not trust this file")
    if info.flag_bits & _ENCRYPTED:
        raise ArtifactError(f"its member {name} is encrypted, and artifacts never are; do not trust this file")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise ArtifactError(
            f"its member {name} is compressed, and artifacts store their members as they are; save the model again "
            "instead of repacking the file"
        )


def _not_a_zip(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        return f"it cannot be read ({error})"
    if start == b"PK\x03\x04":
        return "it is truncated: its table of contents is missing; copy or save it again"
    return "it is not a zip archive, and so not a regraft artifact; give a file written by save()"
