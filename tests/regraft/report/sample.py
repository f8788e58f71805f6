"""A report with something in every section, made by hand."""

from __future__ import annotations

import math

from regraft.ir.records import Application, Log, Refusal, RuleStatistics
from regraft.report import Environment, Event, OperatorRow, Report
from regraft.report.budget import BudgetPoint, BudgetReport, Decision

LONG = "/home/someone/.local/lib/python3.11/site-packages/transformers/models/llama/modeling_llama.py"


def application(number: int, rule: str, pass_name: str, drift: float | None, line: int = 31) -> Application:
    """One rewrite that recognises an RMS norm."""
    return Application(
        rule=rule,
        pass_name=pass_name,
        exactness="reassociated",
        number=number,
        source_nodes=("pow_1", "mean", "rsqrt"),
        new_nodes=("rms_norm",),
        user_line=f"{LONG}:{line} in forward",
        recognizes="rms_norm",
        drift=drift,
    )


def sample(measured: bool = True) -> Report:
    """Three rewrites, two refusals, four operators, two events."""
    log = Log(
        applications=[
            application(1, "fuse-rms-norm", "recognize", 3e-7),
            application(2, "fuse-rms-norm", "recognize", 4e-7),
            application(3, "merge-linears", "fuse", None, line=88),
        ],
        refusals=[
            Refusal(
                "fuse-attention",
                "recognize",
                "requirement",
                "softmax",
                "softmax runs over dimension -2, attention needs the key dimension -1 <script>alert(1)</script>",
                f"{LONG}:204 in forward",
                "attention",
            ),
            Refusal(
                "fuse-rope",
                "recognize",
                "rolled back",
                "add_3",
                "relative L2 error 2.0e-01 against fp64, the original has 1.0e-07",
                "",
                "rope",
            ),
        ],
        statistics={
            "fuse-rms-norm": RuleStatistics(40, 2, 0, 0, 0.012),
            "fuse-attention": RuleStatistics(12, 0, 1, 0, 0.034),
            "fuse-rope": RuleStatistics(3, 0, 0, 1, 0.001),
        },
    )
    return Report(
        model="tiny & <b>bold</b>",
        target="cpu",
        log=log,
        phases={
            "capture": 1.25,
            "canonicalize": 0.4,
            "recognize": 0.8,
            "lowering": 0.31,
            "verification": 0.09,
        },
        operators_before=[
            row("linear", "linear", 2e9, 1.2e7, 2.0e-3, 2.4e-3 if measured else None),
            row("pow_1", "pow", 1e6, 8e6, 4.0e-4, 6e-4 if measured else None),
            row("softmax", "softmax", 5e6, 2e7, 9e-4, 1.1e-3 if measured else None),
            row("view", "reshape", 0.0, 0.0, 0.0, 2e-6 if measured else None),
        ],
        operators_after=[
            row("linear_fused", "regraft.linear", 2e9, 1.1e7, 1.9e-3, 1.7e-3 if measured else None),
            row("rms_norm", "regraft.rms_norm", 5e6, 4e6, 2e-4, 2.5e-4 if measured else None),
            row("softmax", "softmax", 5e6, 2e7, 9e-4, 1.0e-3 if measured else None),
        ],
        end_to_end_drift=4.2e-7,
        tolerance=1e-5,
        events=[
            Event("recapture", "input 0 has shape [2, 64] where [1, 32] was compiled"),
            Event("fallback", "dtype float64 was not compiled for, so the original model ran"),
        ],
        environment=Environment(
            "Example CPU, 2 threads",
            2,
            "float32",
            1.2e12,
            3e10,
            "measured",
            {"python": "3.11.7", "torch": "2.13.0"},
        ),
        budget=budget(),
    )


def budget() -> BudgetReport:
    """Two lossy rewrites out of four compositions that were tried."""
    names = ("tokens: tome, 8+8 of 64", "tokens: tome, 8+8 of 64; linear layers 0: bf16", "tokens: tome, 16+16 of 64")
    points = [
        BudgetPoint("exact", "exact", 0.0, 4e-3, 1e-14, None, 4e-3, best=True),
        BudgetPoint(names[0], "predicted", 1e-4, 3.5e-3, best=True),
        BudgetPoint(names[0], "tried", 1e-4, 3.5e-3, 5e-4, None, None, best=True),
        BudgetPoint(names[1], "tried", 2e-4, 3.0e-3, 8e-4, 9e-4, 2.9e-3, best=True, chosen=True),
        BudgetPoint(names[2], "tried", 1e-3, 3.2e-3, math.inf),
    ]
    return BudgetReport(
        metric="kl",
        limit=1e-3,
        confidence=0.99,
        decisions=[
            Decision("tokens", "tome, 8+8 of 64", f"{LONG}:31 in forward", 1e-4, 5e-4),
            Decision("linear layers 0", "bf16", "", 1e-4, 5e-4),
        ],
        predicted_loss=2e-4,
        loss=8e-4,
        held_out=9e-4,
        held_out_bound=9.5e-4,
        samples=64,
        looks=2,
        exact_seconds=4e-3,
        predicted_seconds=3.0e-3,
        seconds=2.9e-3,
        points=points,
        notes=["tokens: tome loses least when half go evenly"],
        search_seconds=12.5,
    )


def row(node: str, operator: str, flops: float, moved: float, predicted: float, measured: float | None) -> OperatorRow:
    """One operator at a line of a file that lies deep."""
    provenance = (f"fuse-rms-norm({node})",) if operator.startswith("regraft") else ()
    return OperatorRow(node, operator, f"{LONG}:31 in forward", provenance, flops, moved, predicted, measured)
