"""Rewrites and refusals joined where a reader would see the same line many times, one for each layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from regraft.ir.records import Application, Refusal


@dataclass(frozen=True)
class FiredRow:
    """Rewrites of one rule at one line; ``drift`` is the largest."""

    rule: str
    pass_name: str
    exactness: str
    line: str
    number: int
    drift: float | None
    recognizes: str | None


def fired_rows(applications: Iterable[Application]) -> list[FiredRow]:
    """Rewrites with the same rule, pass and line once: recognised sites, then the rest, most frequent first."""
    groups: dict[tuple[str, str, str], list[Application]] = {}
    for item in applications:
        groups.setdefault((item.rule, item.pass_name, item.user_line), []).append(item)
    made = [
        FiredRow(
            rule,
            pass_name,
            group[0].exactness,
            line,
            len(group),
            max((item.drift for item in group if item.drift is not None), default=None),
            group[0].recognizes,
        )
        for (rule, pass_name, line), group in groups.items()
    ]
    return sorted(made, key=lambda row: (row.recognizes is None, -row.number))


def refusal_groups(refusals: Iterable[Refusal]) -> list[tuple[Refusal, int]]:
    """Refusals with the same rule, kind, reason and line once, with their number, most frequent first."""
    groups: dict[tuple[str, str, str, str], list[Refusal]] = {}
    for refusal in refusals:
        key = refusal.rule, refusal.kind, refusal.reason, refusal.user_line
        groups.setdefault(key, []).append(refusal)
    return sorted(((group[0], len(group)) for group in groups.values()), key=lambda pair: -pair[1])
