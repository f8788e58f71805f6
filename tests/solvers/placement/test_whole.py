"""Files appear whole or not at all, and a failure leaves nothing beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from regraft.solvers.placement.whole import replacing, write_text


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_text(path, "before")
    with pytest.raises(RuntimeError, match="midway"), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError("midway")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
