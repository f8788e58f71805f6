"""Tuning records of a GPU as data: for an attention site and an architecture, what runs it, with which tiles, and the
times that say so.

A record is one line of an artifact's ``tuning.jsonl``. The lines are part of the artifact, whose hashes are checked;
here they are read as if anyone could have written them, because tiles end up in the text of a kernel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from regraft.codegen.triton.attention_configs import Config
from regraft.ir.errors import RegraftError

#: Of the lines; one of another version is not read.
VERSION = 1
OPERATOR = "gpu attention"
#: What can run a site: the emitted kernel, PyTorch's attention by back end, FlexAttention, the definition.
CHOICES = ("kernel", "flash", "cudnn", "efficient", "math", "flex", "definition")
_ARCH = re.compile(r"sm_\d{2,3}|gfx[0-9a-f]{3,4}")
_NAME = re.compile(r"attention_\w{1,60}")
_LARGEST_TILE, _MOST_WARPS, _MOST_STAGES = 1024, 32, 8


class TuningError(RegraftError, ValueError):
    """A line that is not a tuning record."""


@dataclass(frozen=True)
class SiteKey:
    """What a decision holds for. ``kernel`` is the name of the kernel that regraft emits for the site with its default
    tiles: the hash of its text stands at the end, so that another text is another key. ``bucket``: batch, heads, heads
    of keys, queries and keys, the lengths and the batch rounded up to powers of two."""

    kernel: str
    bucket: tuple[int, int, int, int, int]
    dtype: str


@dataclass(frozen=True)
class TuningRecord:
    """One decision. ``config`` are the tiles of the fastest kernel that was tried, whatever was chosen; ``seconds``
    those of each candidate; ``left_out`` says of others why they were not timed; ``device`` is its marketed name."""

    key: SiteKey
    arch: str
    choice: str
    config: Config | None
    seconds: dict[str, float] = field(default_factory=dict, hash=False)
    left_out: dict[str, str] = field(default_factory=dict, hash=False)
    device: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data for a line."""
        data = asdict(self)
        return {"version": VERSION, "operator": OPERATOR, **data.pop("key"), **data}

    @staticmethod
    def from_json(data: Any) -> TuningRecord:
        """Inverse of :meth:`to_json`; raises ``TuningError``."""
        try:
            if data["version"] != VERSION or data["operator"] != OPERATOR:
                found = f"version {str(data['version'])[:20]} of {str(data['operator'])[:40]!r}"
                raise TuningError(
                    f"its tuning.jsonl has a record of {found}, and this regraft reads version {VERSION} of "
                    f"{OPERATOR!r}; save the model again"
                )
            key = SiteKey(_matched(_NAME, data["kernel"]), _bucket(data["bucket"]), str(data["dtype"]))
            return TuningRecord(
                key,
                _matched(_ARCH, data["arch"]),
                _known(data["choice"]),
                None if data["config"] is None else _config(data["config"]),
                {str(name): float(seconds) for name, seconds in data["seconds"].items()},
                {str(name): str(reason) for name, reason in data["left_out"].items()},
                str(data["device"]),
            )
        except TuningError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise TuningError(
                f"its tuning.jsonl has a malformed record ({type(error).__name__}: {str(error)[:80]}); do not trust it"
            ) from error


def to_lines(records: Iterable[TuningRecord]) -> bytes:
    """Records as JSON lines, in an order of their own: equal records give equal bytes."""
    lines = sorted(json.dumps(record.to_json(), sort_keys=True, allow_nan=False) for record in records)
    return "".join(f"{line}\n" for line in lines).encode()


def from_lines(lines: bytes) -> tuple[TuningRecord, ...]:
    """Inverse of :func:`to_lines`; raises ``TuningError``."""
    try:
        return tuple(TuningRecord.from_json(json.loads(line)) for line in lines.splitlines())
    except (ValueError, RecursionError) as error:
        if isinstance(error, TuningError):
            raise
        raise TuningError(f"its tuning.jsonl is not JSON lines ({str(error)[:80]}); do not trust it") from error


def _matched(pattern: re.Pattern[str], value: Any) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{str(value)[:40]!r} is no name of a kernel or an architecture")
    return value


def _known(choice: Any) -> str:
    if choice not in CHOICES:
        raise ValueError(f"the choice {str(choice)[:40]!r} is not one of {', '.join(CHOICES)}")
    return str(choice)


def _bucket(value: Any) -> tuple[int, int, int, int, int]:
    batch, heads, kv_heads, queries, keys = (_number(size, 1 << 48) for size in value)
    return batch, heads, kv_heads, queries, keys


def _config(value: Any) -> Config:
    rows, keys, warps, stages = value
    for size, most in ((rows, _LARGEST_TILE), (keys, _LARGEST_TILE), (warps, _MOST_WARPS)):
        if _number(size, most) & (size - 1):
            raise ValueError(f"{size} is no power of two")
    return int(rows), int(keys), int(warps), _number(stages, _MOST_STAGES)


def _number(value: Any, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{str(value)[:40]} is no whole number from 1 to {most}")
    return value
