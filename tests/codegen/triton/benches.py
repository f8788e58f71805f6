"""A bench without a GPU: candidates run on the CPU as their definitions, and a test says how long each takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from regraft.codegen.triton.workbench import Workbench


def bench(seconds: Mapping[str, float], arch: str = "sm_90") -> Workbench:
    """A device of ``arch`` on which the candidates named take ``seconds``, and all others one second."""

    def clock(name: str, run: Callable[[], Any]) -> float:
        run()
        return seconds.get(name, 1.0)

    return Workbench(torch.device("cpu"), arch, f"a {arch} of a test", clock)
