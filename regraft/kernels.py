"""Emitted kernels in an artifact: ``kernels/<name>/source.py`` for each that its graph is lowered to.

They are never run from there. Loading lowers the graph again, and the text that this regraft emits must be the one
that was saved, byte for byte; what another version emitted under other names is left alone, and said so.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from regraft.artifact.errors import ArtifactError
from regraft.artifact.manifest import Member

if TYPE_CHECKING:
    from regraft.codegen.triton.emit import Kernel

_SOURCE = re.compile(r"kernels/([^/]+)/source\.py")


def kernels_of(executable: Any) -> tuple[Kernel, ...]:
    """The emitted kernels that a lowered program calls; none on a CPU."""
    found: tuple[Kernel, ...] = getattr(executable, "kernels", ())
    return found


def notes_of(executable: Any) -> tuple[str, ...]:
    """What a lowering for a GPU has to tell about its choices."""
    found: tuple[str, ...] = getattr(executable, "notes", ())
    return found


def kernel_members(executable: Any) -> dict[str, bytes]:
    """The members of an artifact that hold a lowered program's kernels."""
    return {f"kernels/{kernel.name}/source.py": kernel.source.encode() for kernel in kernels_of(executable)}


def check_kernels(executable: Any, saved: Mapping[str, Member]) -> str | None:
    """Compare what was emitted now with what was saved. Returns what to tell where other kernels run than the saved
    ones; raises ``ArtifactError``, without the file's name, for a text that was changed."""
    emitted = {name: hashlib.sha256(text).hexdigest() for name, text in kernel_members(executable).items()}
    sources = {name: member.sha256 for name, member in saved.items() if _SOURCE.fullmatch(name)}
    for name in sorted(emitted.keys() & sources.keys()):
        if emitted[name] != sources[name]:
            raise ArtifactError(
                f"its member {name} is not the text that regraft emits for its graph; do not trust this file, save "
                "the model again"
            )
    if emitted.keys() == sources.keys():
        return None
    return (
        f"{len(sources.keys() - emitted.keys())} of {len(sources)} saved kernels were emitted by another version of "
        "regraft, or chosen on another architecture; what this version chooses here runs instead"
    )
