"""``manifest.json``: what an artifact holds, with the size and SHA-256 of every other member."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from regraft.artifact.errors import ArtifactError, brief

FORMAT = "regraft-artifact"
FORMAT_VERSION = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Member:
    """Size in bytes and hex SHA-256 of one member."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The manifest as data.

    ``targets`` are the devices that the artifact was compiled for; ``operator_libraries`` the operator
    namespaces that the graph calls; ``libraries`` the versions that wrote it.
    """

    targets: tuple[str, ...]
    operator_libraries: tuple[str, ...]
    members: dict[str, Member]
    regraft: str = field(default_factory=lambda: installed_version("regraft"))
    libraries: dict[str, str] = field(
        default_factory=lambda: {"python": platform.python_version(), "torch": torch.__version__}
    )
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``manifest.json``."""
        return {
            "format": FORMAT,
            "format_version": self.format_version,
            "regraft": self.regraft,
            "libraries": self.libraries,
            "operator_libraries": list(self.operator_libraries),
            "targets": list(self.targets),
            "members": {name: {"size": m.size, "sha256": m.sha256} for name, m in self.members.items()},
        }

    @staticmethod
    def parse(text: bytes) -> Manifest:
        """Inverse of :meth:`to_json`; raises ``ArtifactError`` without a file name, which the caller adds."""
        data = parse_json(text, "manifest.json")
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ArtifactError('manifest.json does not say "format": "regraft-artifact"; it is not a regraft artifact')
        version = data.get("format_version")
        if type(version) is not int or version < 1:
            raise ArtifactError("manifest.json has no valid format_version; save the model again")
        if version > FORMAT_VERSION:
            raise ArtifactError(
                f"it has format version {version}, written by regraft {data.get('regraft')}, and this regraft reads "
                f"up to version {FORMAT_VERSION}; upgrade regraft to load it"
            )
        try:
            return Manifest(
                targets=_texts(data["targets"]),
                operator_libraries=_texts(data["operator_libraries"]),
                members={str(name): _member(entry) for name, entry in data["members"].items()},
                regraft=str(data["regraft"]),
                libraries={str(name): str(value) for name, value in data["libraries"].items()},
                format_version=version,
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ArtifactError(f"manifest.json is malformed ({brief(error)}); save the model again") from error


def parse_json(text: bytes, member: str) -> Any:
    """JSON of a member; raises ``ArtifactError`` for text that is not JSON or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ArtifactError(f"{member} is nested too deeply to be an artifact's; do not trust this file") from error
    except ValueError as error:
        raise ArtifactError(f"{member} is not valid JSON ({brief(error)}); save the model again") from error


def dump_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, so that equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def installed_version(distribution: str) -> str:
    """Version of an installed distribution, or "unknown" when it runs from a source tree."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("a list of strings was expected")
    return tuple(values)


def _member(entry: Any) -> Member:
    size, digest = entry["size"], entry["sha256"]
    if type(size) is not int or size < 0 or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError("a member needs a size and a SHA-256")
    return Member(size, digest)
