"""Tuning records as lines: written and read back, and refused where they are not what regraft writes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from regraft.codegen.triton.tuning_records import SiteKey, TuningError, TuningRecord, from_lines, to_lines

RECORD = TuningRecord(
    SiteKey("attention_prefill_0123abcd", (2, 32, 8, 4096, 4096), "bfloat16"),
    "sm_90",
    "kernel",
    (64, 128, 8, 3),
    {"kernel": 2e-4, "kernel 64 128 8 3": 1e-4},
    {"cudnn": "No viable backend"},
    "NVIDIA H200",
)


def test_records_come_back_and_equal_ones_give_equal_bytes() -> None:
    other = replace(RECORD, arch="gfx942", choice="flex", config=None)
    assert set(from_lines(to_lines([RECORD, other]))) == {RECORD, other}
    assert to_lines([RECORD, other]) == to_lines([other, RECORD])
    assert from_lines(to_lines([RECORD]))[0].to_json() == RECORD.to_json() and from_lines(b"") == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "record of version 2"),
        ({"operator": "linear"}, "'linear'"),
        ({"choice": "eval"}, "the choice 'eval' is not one of kernel"),
        ({"arch": 'sm_90": (1,), "x'}, "no name of a kernel or an architecture"),
        ({"kernel": "../x"}, "no name of a kernel or an architecture"),
        ({"config": [64, 96, 8, 3]}, "96 is no power of two"),
        ({"config": [64, 64, 8, 900]}, "900 is no whole number from 1 to 8"),
        ({"config": [64, 64, 8]}, "not enough values"),
        ({"config": ["64", 64, 8, 1]}, "64 is no whole number"),
        ({"bucket": [1, 2, 3, 4]}, "malformed record"),
        ({"seconds": None}, "malformed record"),
    ],
)
def test_what_regraft_would_not_write_is_refused(change: dict[str, Any], message: str) -> None:
    line = json.dumps({**RECORD.to_json(), **change}).encode()
    with pytest.raises(TuningError, match=f"its tuning.jsonl has a .*{message}"):
        from_lines(line)


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[" * 100_000])
def test_what_is_not_json_is_refused(line: bytes) -> None:
    with pytest.raises(TuningError, match=r"its tuning.jsonl is not JSON lines"):
        from_lines(line)
