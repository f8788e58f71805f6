"""What the kernels and models are to reach on a GPU, line by line, and what the records of ``make gpu`` say of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Target:
    """A line: its words, and the part whose rows speak of it."""

    text: str
    part: str


#: Name -> line. A row says under these names whether it met them (``Outcome.met``).
TARGETS: dict[str, Target] = {
    "numbers": Target("every kernel as near to fp64 as its element type allows, bf16 among them", "tests"),
    "prefill 128": Target("prefill in bf16 without a mask, heads of 128: 475 TFLOP/s (H200)", "attention"),
    "prefill 64": Target("prefill in bf16 without a mask, heads of 64: 400 TFLOP/s (H200)", "attention"),
    "masked": Target("masked prefill: 85% of the rate without a mask, on live tiles", "attention"),
    "flex": Target("masked prefill: 1.1 times as fast as FlexAttention with the building of its mask", "attention"),
    "lengths": Target("ten lengths: nothing is built after the first", "attention"),
    "decode": Target("decoding: 75% of a copy's bandwidth, odd groups and masks by head among them", "decode"),
    "norms": Target("norms and activations: 85% of a copy's bandwidth", "norms"),
    "experts, many tokens": Target("routed experts, many tokens: 35% of the device's peak", "moe"),
    "experts, few tokens": Target("routed experts, few tokens: 70% of a copy's bandwidth", "moe"),
    "models": Target("whole models: as fast as torch.compile(mode='max-autotune'), and exact", "models"),
    "cold compile": Target("whole models: compiled in a fifth of its time, cold", "models"),
    "tokens, share of what is saved": Target("fewer tokens: 90% of what is saved, from batch 8 on", "tokens"),
    "tokens, never slower": Target("fewer tokens: never slower than the exact model with torch.compile", "tokens"),
}


@dataclass(frozen=True)
class Verdict:
    """What was found of a line: "met", "not met", "met so far" (some rows are missing) or "not measured"; the rows that
    missed it, and those that said nothing although they were to run."""

    name: str
    text: str
    word: str
    missed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def verdicts(records: Sequence[Mapping[str, Any] | None]) -> list[Verdict]:
    """One for each line of a part that was asked for; ``records`` as parts leave them, None for one without any."""
    by_part = {record["part"]: record for record in records if record is not None}
    return [_verdict(name, target, by_part[target.part]) for name, target in TARGETS.items() if target.part in by_part]


def _verdict(name: str, target: Target, record: Mapping[str, Any]) -> Verdict:
    said = {label: row["met"][name] for label, row in record["rows"].items() if name in row["met"]}
    broken = [label for label, row in record["rows"].items() if isinstance(row["figures"].get("error"), str)]
    missed = tuple(label for label, met in said.items() if not met)
    missing = (*broken, *record["missing"])
    word = "not met" if missed else "not measured" if not said else "met so far" if missing else "met"
    return Verdict(name, target.text, word, missed, missing)


def show(found: Sequence[Verdict]) -> Table:
    """A line each."""
    table = Table(title="targets")
    for column in ("target", "verdict", "rows that missed it", "rows without a word"):
        table.add_column(column)
    for verdict in found:
        table.add_row(verdict.text, verdict.word, ", ".join(verdict.missed), ", ".join(verdict.missing))
    return table


def to_json(found: Sequence[Verdict]) -> list[dict[str, Any]]:
    """As plain data."""
    return [asdict(verdict) for verdict in found]
