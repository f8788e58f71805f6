"""Real ranks: a command under torchrun, one process of one thread each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONFAULTHANDLER": "1"}


def torchrun(ranks: int, *command: Any) -> subprocess.CompletedProcess[str]:
    """The command, run as each of ``ranks`` ranks in the repository's root."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    root = Path(__file__).parents[1]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(root)}
    return subprocess.run(
        [*launch, *command], env=environment, cwd=root, capture_output=True, text=True, timeout=600, check=False
    )
