"""Which line of a table of tiles an architecture takes."""

from __future__ import annotations

import pytest

from regraft.codegen.triton.archs import line_for, target_arch, with_lines

TABLE = {"sm_80": 1, "sm_90": 2, "gfx942": 3}


@pytest.mark.parametrize(
    ("arch", "line"), [("sm_80", 1), ("sm_89", 1), ("sm_103", 2), ("gfx942", 3), ("sm_75", None), ("gfx90a", None)]
)
def test_an_architecture_without_a_line_takes_the_last_before_it(arch: str, line: int | None) -> None:
    assert line_for(TABLE, arch) == line


def test_a_new_line_changes_no_other_architecture() -> None:
    found = with_lines(TABLE, {"sm_86": 7, "sm_90": 8})
    before = {arch: line_for(TABLE, arch) for arch in ("sm_80", "sm_87", "sm_89", "gfx942")}
    assert {arch: line_for(found, arch) for arch in before} == before
    assert line_for(found, "sm_86") == 7 and line_for(found, "sm_100") == 8
    assert list(found) == ["sm_80", "sm_86", "sm_87", "sm_90", "gfx942"]
    assert with_lines(TABLE, {}) == TABLE


def test_a_target_names_an_architecture_or_none() -> None:
    assert target_arch("cuda:sm_90") == "sm_90" and target_arch("cuda") is None
