"""One cold compile in this process: `python -m bench.cold ROW PEER` prints its seconds and memory as JSON.

`bench.cpu_peers` runs it in a fresh process with empty caches: a compiler that ran before is never cold. With
`--loaded` the peer builds a small layer first, so that the memory is the model's and not that of the compiler's code.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from typing import Any

import torch

from bench.models import ROWS, Case
from bench.peers import FREED, PEERS, build
from regraft.ir.memory import give_back

PAGE = 4096
PACKAGES = ("regraft", "regraft.ir", "regraft.passes", "regraft.codegen", "regraft.solvers")
_MEMORY = os.open("/proc/self/statm", os.O_RDONLY)  # kept open: it is read 200 times a second beside what is timed


class PeakMemory:
    """The highest resident memory above where it began, sampled by a thread.

    The process's own high-water mark would not do: loading the model raises it before the compile begins.
    """

    def __init__(self, interval: float = 0.005) -> None:
        self.interval = interval
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.base = resident_bytes()
        self.peak = self.base

    def __enter__(self) -> PeakMemory:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.thread.join()
        self.peak = max(self.peak, resident_bytes())

    @property
    def added(self) -> int:
        """The bytes added at the highest point."""
        return self.peak - self.base

    def _sample(self) -> None:
        while not self.stopped.wait(self.interval):
            self.peak = max(self.peak, resident_bytes())


def resident_bytes() -> int:
    """The resident memory of this process."""
    return int(os.pread(_MEMORY, 128, 0).split()[1]) * PAGE


def weight_bytes(case: Case) -> int:
    """The bytes of the module's parameters and buffers, shared ones counted once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*case.module.parameters(), *case.module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def small_layer() -> Case:
    """A linear layer with an activation."""
    return Case(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()).eval(), (torch.ones(4, 64),), {})


def write_bytecode() -> None:
    """Compile regraft's modules as its installation does, and as PyTorch's are. From a checkout that was never
    imported, or where Python writes no bytecode, a quarter of a second of each run would be the compilation of Python.
    """
    folders = [folder for name in PACKAGES for folder in find_spec(name).submodule_search_locations or ()]
    subprocess.run([sys.executable, "-m", "compileall", "-q", *folders], check=True)


def measure(row: str, peer: str, loaded: bool = False) -> dict[str, Any]:
    """Build one peer of one row, with its first call, and return what it took."""
    case = ROWS[row]()
    if loaded:
        build(peer, small_layer())
    with torch.no_grad():
        # Threads, oneDNN and the allocator start here, so that they are not counted as the compile's.
        case.module(*case.args, **case.kwargs)
    weights = weight_bytes(case)
    give_back()  # what that call left is free, and must not count as there before
    with PeakMemory() as memory:
        start = time.perf_counter()
        built = build(peer, case, compare=False)  # a call of the original would take memory of its own
        elapsed = time.perf_counter() - start
    if built.call is None:
        return {"reason": built.reason}
    return {
        "seconds": round(built.compile_seconds, 3),
        "elapsed": round(elapsed, 3),
        "weight_bytes": weights,
        "peak_bytes": memory.added,
        # The model itself is resident all along: a compile that added nothing has a ratio of 1.
        "peak_over_weights": round((weights + memory.added) / weights, 3),
    }


def main() -> int:
    """Read the row and the peer, measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", choices=list(ROWS))
    parser.add_argument("peer", choices=[*PEERS, FREED])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loaded", action="store_true", help="build a small layer before, so that code is loaded")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    write_bytecode()
    print(json.dumps(measure(options.row, options.peer, options.loaded)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
