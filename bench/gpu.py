"""``make gpu``: what regraft does on a GPU so far, in one call that needs no network and no Hugging Face.

There is no GPU lowering yet. Captured there, rewritten by the pipeline for that target and run operator by operator,
models must still give their outputs: that is what later kernels will be compared with. Beside it stand the times of
the model itself and of ``torch.compile``, the peers that those kernels will have to meet. ``--device cpu`` rehearses
it. Exit status 1 when an output is off, or a rewrite was taken back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.decoder import PlainDecoder
from bench.timing import time_in_turn, write_record

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def _encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(8, 256, 512)


def _decoder() -> tuple[nn.Module, Tensor]:
    return PlainDecoder(8, hidden=512, heads=8, kv_heads=2), torch.randint(0, 256, (4, 512))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"encoder": _encoder, "decoder": _decoder}


@dataclass(frozen=True)
class Row:
    """One model in one element type: milliseconds, the error of the rewritten graph, and what was recognised."""

    model: str
    dtype: str
    error: float
    attention: int
    rolled_back: list[str]
    milliseconds: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether the outputs agree, attention was found, and no rewrite was taken back."""
        return self.error <= TOLERANCE[self.dtype] and self.attention > 0 and not self.rolled_back


def measure(name: str, dtype_name: str, device: str, rounds: int, peers: bool = True) -> Row:
    """Capture, rewrite, run and time one model."""
    from regraft.ir import ops
    from regraft.ir.capture import capture
    from regraft.ir.driver import Session
    from regraft.ir.verify import relative_l2
    from regraft.passes.pipeline import default_pipeline

    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, dtype_name)
    model, x = MODELS[name]()
    model = model.to(device, dtype).eval()
    x = x.to(device, dtype) if x.is_floating_point() else x.to(device)
    program, session = capture(model, (x,)), Session()
    default_pipeline(device).run(program, session)
    rewritten = program.callable()

    def timed(run: Callable[[Tensor], Any]) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                run(x)
            if device != "cpu":
                torch.cuda.synchronize()

        return call

    with torch.no_grad():
        error = relative_l2(rewritten(x)[0], model(x))
    runs: dict[str, Callable[[Tensor], Any]] = {"model": model, "rewritten, operator by operator": rewritten}
    if peers:
        runs["torch.compile"] = torch.compile(model)
    times = time_in_turn({label: timed(run) for label, run in runs.items()}, rounds=rounds)
    sites = sum(node.target is ops.attention for node in program.graph.nodes)
    undone = sorted({f"{r.rule}: {r.reason}" for r in session.log.refusals if r.kind == "rolled back"})
    return Row(name, dtype_name, error, sites, undone, {label: timing.median for label, timing in times.items()})


def show(rows: list[Row]) -> Table:
    """The table of all rows."""
    table = Table(title="on the device, captured and rewritten there (milliseconds: medians, called in turn)")
    for column in ("model", "dtype", "error", "attention", *(rows[0].milliseconds if rows else ()), ""):
        table.add_column(column)
    for row in rows:
        times = (f"{value:.2f}" for value in row.milliseconds.values())
        verdict = "ok" if row.passed else "; ".join(row.rolled_back) or "FAILS"
        table.add_row(row.model, row.dtype, f"{row.error:.1e}", str(row.attention), *times, verdict)
    return table


def main() -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=None, help="where to write the record")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        print(f"PyTorch finds no device {options.device!r} here; --device cpu rehearses this bench without one")
        return 2
    rows = [
        measure(name, dtype, options.device, options.rounds) for name in MODELS for dtype in options.dtypes.split(",")
    ]
    Console(width=150).print(show(rows))
    if options.json is not None:
        write_record("gpu", {"rows": [{**asdict(row), "passed": row.passed} for row in rows]}, options.json)
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
