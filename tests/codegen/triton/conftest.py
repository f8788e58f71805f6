"""The interpreter's process, one for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import pytest
from packaging.version import Version

from tests.codegen.triton.interpreted import Run, interpreter, runner


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """Runs an emitted kernel on CPU tensors: ``run(kernel, operands, config=…)``."""
    if Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4"):
        pytest.skip("the interpreter of this triton needs numpy below 2.4")
    with interpreter() as pool:
        yield runner(pool)
