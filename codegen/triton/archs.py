"""Architectures by name ("sm_90", "gfx942"), and which line of a table of tiles each takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

import torch

T = TypeVar("T")
#: NVIDIA's, in order: a table that gets a line for one must not change what the next takes.
_NVIDIA = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


def arch_of(device: torch.device) -> str:
    """The architecture of a GPU that is here."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{10 * major + minor}"


def target_arch(target: str) -> str | None:
    """The architecture that a target names: "sm_90" of "cuda:sm_90"; None of "cuda", which takes any."""
    return target.partition(":")[2] or None


def number_of(arch: str) -> int | None:
    """90 of "sm_90"; None for what is not NVIDIA's."""
    return int(arch[3:]) if re.fullmatch(r"sm_\d+", arch) else None


def line_for(table: Mapping[str, T], arch: str) -> T | None:
    """An architecture's line; NVIDIA's that are not named take the last before them, as launchers do."""
    if arch in table:
        return table[arch]
    before = [known for known in table if 0 <= (number_of(known) or -1) <= (number_of(arch) or -1)]
    return table[max(before, key=lambda known: number_of(known) or 0)] if before else None


def with_lines(table: Mapping[str, T], lines: Mapping[str, T]) -> dict[str, T]:
    """A table with ``lines`` in the place of its own. Where one is new, the architecture behind it keeps what it took:
    tiles that one device holds may be too large for the next."""
    found = dict(table)
    for arch, line in lines.items():
        following = next((f"sm_{number}" for number in _NVIDIA if number > (number_of(arch) or 1 << 30)), None)
        kept = None if following is None or arch in found else line_for(found, following)
        if following is not None and kept is not None:
            found[following] = kept
        found[arch] = line
    return {arch: found[arch] for arch in sorted(found, key=lambda arch: (number_of(arch) or 1 << 30, arch))}
