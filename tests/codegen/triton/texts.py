"""The text of emitted files beside the one that is kept, which a reader of a change sees change."""

from __future__ import annotations

import os
from pathlib import Path

from regraft.codegen.triton.emit import Kernel


def check_text(kernel: Kernel, path: Path) -> None:
    """Assert that a kernel's text is that of a file; with ``REGRAFT_GOLDEN`` set the file is written anew."""
    if os.environ.get("REGRAFT_GOLDEN"):
        path.write_text(kernel.source, encoding="utf-8")
    assert kernel.source == path.read_text(encoding="utf-8")
