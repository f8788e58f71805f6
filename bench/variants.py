"""``python -m bench.variants``: spellings of attention that compilers miss, and near misses that none may take.

The thirteen hand-written variants on which PyTorch's own patterns were measured (it fuses four of them), then graphs
that look like attention and differ: each must be refused with its reason, or found with its meaning kept. The error is
the relative L2 distance of the compiled outputs from the formula in fp64, with the model's own beside it, on the
example and on other inputs of the same shapes (other padding among them). Exit status 1 when a row is not as expected.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.timing import write_record

BATCH, HEADS, KV_HEADS, LENGTH, SIZE = 2, 4, 2, 8, 8
TOLERANCE = 1e-5
SCALE = 1 / math.sqrt(SIZE)
LOWEST = torch.finfo(torch.float32).min


def _causal(like: Tensor, nearly: bool = False) -> Tensor:
    """True where a key lies ahead of its query; ``nearly``: but for one key that is let through."""
    ahead = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=like.device).triu(1)
    return ahead & ~torch.eye(LENGTH, dtype=torch.bool).roll(3, 1).triu(3) if nearly else ahead


def _additive(like: Tensor, nearly: bool = False) -> Tensor:
    return torch.zeros(LENGTH, LENGTH, dtype=like.dtype).masked_fill(_causal(like, nearly), -math.inf)


def _repeated(x: Tensor) -> Tensor:
    return x[:, :KV_HEADS, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).reshape(BATCH, HEADS, LENGTH, SIZE)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def _wide(scores: Tensor) -> Tensor:
    """The softmax of Hugging Face's eager attention: in fp32, then back; in fp64 it stays."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).to(scores.dtype)


def _used_elsewhere(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    weights = (_scores(q, k) * SCALE).softmax(-1)
    return weights @ v, weights


def _padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, fill: float) -> Tensor:
    return (_scores(q, k) * SCALE).masked_fill(keep[:, None, None] == 0, fill).softmax(-1) @ v


@dataclass(frozen=True)
class Variant:
    """A function of query, key, value ``[batch, heads, length, size]`` and a padding mask ``[batch, length]``;
    whether it is attention, and a word of the mask or of the reason that is expected."""

    name: str
    function: Callable[..., Any]
    found: bool
    word: str = ""


VARIANTS = (
    Variant("divided by sqrt(d)", lambda q, k, v, keep: (_scores(q, k) / math.sqrt(SIZE)).softmax(-1) @ v, True),
    Variant("times a scale", lambda q, k, v, keep: (_scores(q, k) * SCALE).softmax(-1) @ v, True),
    Variant(
        "divided, then mask added",
        lambda q, k, v, keep: (_scores(q, k) / math.sqrt(SIZE) + _additive(q)).softmax(-1) @ v,
        True,
    ),
    Variant(
        "grouped queries", lambda q, k, v, keep: (_scores(q, _repeated(k)) * SCALE).softmax(-1) @ _repeated(v), True
    ),
    Variant(
        "times a scale, then mask added",
        lambda q, k, v, keep: (_scores(q, k) * SCALE + _additive(q)).softmax(-1) @ v,
        True,
    ),
    Variant("mask + scores", lambda q, k, v, keep: (_additive(q) + _scores(q, k) * SCALE).softmax(-1) @ v, True),
    Variant("softmax in fp32", lambda q, k, v, keep: _wide(_scores(q, k) * SCALE) @ v, True),
    Variant("scale on the query", lambda q, k, v, keep: _scores(q * SCALE, k).softmax(-1) @ v, True),
    Variant(
        "grouped queries, mask, softmax in fp32",
        lambda q, k, v, keep: _wide(_scores(q, _repeated(k)) * SCALE + _additive(q)) @ _repeated(v),
        True,
    ),
    Variant(
        "where",
        lambda q, k, v, keep: torch.where(_causal(q), -math.inf, _scores(q, k) * SCALE).softmax(-1) @ v,
        True,
    ),
    Variant("softcap", lambda q, k, v, keep: (torch.tanh(_scores(q, k) * SCALE / 5) * 5).softmax(-1) @ v, True),
    Variant(
        "einsum",
        lambda q, k, v, keep: torch.einsum(
            "bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE).softmax(-1), v
        ),
        True,
    ),
    Variant(
        "keys permuted beforehand", lambda q, k, v, keep: (q @ k.permute(0, 1, 3, 2) * SCALE).softmax(-1) @ v, True
    ),
    Variant("SDPA", lambda q, k, v, keep: nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), True),
    Variant("padding, minus infinity", lambda q, k, v, keep: _padded(q, k, v, keep, -math.inf), True, "keys"),
    Variant("padding, lowest number", lambda q, k, v, keep: _padded(q, k, v, keep, LOWEST), True, "keys"),
    Variant("padding, -1e4", lambda q, k, v, keep: _padded(q, k, v, keep, -1e4), True, "keys"),
    Variant("padding, -3", lambda q, k, v, keep: _padded(q, k, v, keep, -3.0), True, "keys"),
)
"""Attention, in many spellings."""

NEAR_MISSES = (
    Variant(
        "softmax over the queries",
        lambda q, k, v, keep: (_scores(q, k) * SCALE).softmax(-2) @ v,
        False,
        "softmax runs over",
    ),
    Variant(
        "keys with heads and positions swapped",
        lambda q, k, v, keep: (q @ k.permute(0, 2, 3, 1)[:, :HEADS] * SCALE).softmax(-1) @ v[:, :, :HEADS],
        True,
    ),
    Variant("keys not transposed", lambda q, k, v, keep: (q @ k * SCALE).softmax(-1) @ v, True),
    Variant("weights used elsewhere", _used_elsewhere, False, "used outside"),
    Variant(
        "a mask that is only nearly causal",
        lambda q, k, v, keep: (_scores(q, k) * SCALE + _additive(q, nearly=True)).softmax(-1) @ v,
        True,
        "!band(None,0)",
    ),
    Variant(
        "scaled after a finite mask",
        lambda q, k, v, keep: (_scores(q, k).masked_fill(keep[:, None, None] == 0, -3.0) * SCALE).softmax(-1) @ v,
        False,
        "finite mask",
    ),
    Variant(
        "softcap after the mask",
        lambda q, k, v, keep: (torch.tanh((_scores(q, k) + _additive(q)) / 5) * 5).softmax(-1) @ v,
        False,
        "softcap comes after",
    ),
    Variant("no softmax", lambda q, k, v, keep: torch.sigmoid(_scores(q, k) * SCALE) @ v, False),
)
"""What looks like it. Where the difference is one of operands or masks, the site is found and says so."""


@dataclass(frozen=True)
class Row:
    """What became of one variant."""

    name: str
    expected: str
    outcome: str
    detail: str
    error: float
    own_error: float
    passed: bool


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Any:
        return self.function(query, key, value, keep)


def measure(variant: Variant) -> Row:
    """Compile one variant and compare it with its formula in fp64."""
    import regraft

    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(4, BATCH, HEADS, LENGTH, SIZE, generator=generator) for _ in range(2)]
    full, padded = torch.ones(BATCH, LENGTH), torch.ones(BATCH, LENGTH)
    padded[1, 5:] = 0
    fast = regraft.compile(_Function(variant.function).eval(), (*drawn[0][:3], full))
    error = own = 0.0
    for values, keep in ((drawn[0], full), (drawn[1], full), (drawn[1], padded)):
        exact = variant.function(*(value.double() for value in values[:3]), keep)
        error = max(error, _distance(fast(*values[:3], keep), exact))
        own = max(own, _distance(variant.function(*values[:3], keep), exact))
    report = fast._report  # the property would measure the processor
    sites = [node for node in fast.entries[0].program.graph.nodes if str(node.target) == "regraft.attention.default"]
    reasons = [refusal.reason for refusal in report.refusals if refusal.recognizes == "attention"]
    if sites:
        detail = str(sites[0].kwargs.get("mask", "all"))
    else:
        detail = reasons[0] if reasons else "nothing there to recognise"
    word = variant.word.removeprefix("!")
    as_told = (word != detail) if variant.word.startswith("!") else (word in detail)
    events = [event.reason for event in report.events]
    passed = bool(sites) == variant.found and as_told and error <= TOLERANCE and not events
    expected = "found" if variant.found else "refused"
    return Row(variant.name, expected, "found" if sites else "refused", detail, error, own, passed)


def _distance(given: Any, exact: Any) -> float:
    pairs = zip(_tensors(given), _tensors(exact), strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def show(title: str, rows: list[Row]) -> Table:
    """The table of some rows."""
    table = Table(title=title)
    for column in ("variant", "outcome", "mask, or why not", "error", "the model's own", ""):
        table.add_column(column)
    for row in rows:
        verdict = "ok" if row.passed else f"expected {row.expected}"
        numbers = f"{row.error:.1e}", f"{row.own_error:.1e}"
        table.add_row(row.name, row.outcome, row.detail, *numbers, verdict)
    return table


def main() -> int:
    """Measure, print, and with ``--json`` record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="where to write the record")
    options = parser.parse_args()
    logging.getLogger("regraft").setLevel(logging.ERROR)
    with torch.no_grad():
        variants, misses = ([measure(item) for item in group] for group in (VARIANTS, NEAR_MISSES))
    console = Console(width=150)
    console.print(show("spellings of attention", variants))
    console.print(show("near misses", misses))
    rows = [*variants, *misses]
    passed = sum(row.passed for row in rows)
    print(f"{passed} of {len(rows)} as expected")
    if options.json is not None:
        write_record("variants", {"passed": passed, "rows": [asdict(row) for row in rows]}, options.json)
    return 0 if passed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
