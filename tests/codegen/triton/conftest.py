"""The interpreter's process, one for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.codegen.triton.interpreted import Run, interpreter, runner


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """Runs an emitted kernel on CPU tensors: ``run(kernel, operands, config=…)``."""
    with interpreter() as pool:
        yield runner(pool)
