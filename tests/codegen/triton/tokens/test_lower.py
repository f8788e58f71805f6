"""Reduced programs lowered for a GPU, run here on CPU tensors: which sites have a kernel, and what others say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.codegen.triton.lower import KernelExecutable, lower
from regraft.ir import ops
from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.ir.records import Log
from regraft.passes.pipeline import default_pipeline
from regraft.passes.tokens.reduce import ReduceTokens
from tests.passes.tokens.models import IMAGE_KINDS, images, outputs, relative, texts, tiny
from tests.passes.tokens.test_reduce import ClassToken, MeanOfTokens
from tests.support import captured


def reduced(kind: str, method: str = "tome") -> Program:
    """A tiny encoder with two tokens fewer behind each attention. Of images the class token is read: behind the last of
    three attentions, no other token is computed."""
    image = kind in IMAGE_KINDS
    model = ClassToken(tiny(kind)) if image else MeanOfTokens(tiny(kind))
    program = capture(model, tuple((images() if image else texts()).values()))
    default_pipeline("cuda", tokens=(ReduceTokens(2, method),)).run(program, Session(verify="off"))
    return program


def names(executable: KernelExecutable) -> list[str]:
    """The kernels that a program calls, in order, without the digests of their texts."""
    called = [str(node.target) for node in executable.module.graph.nodes if "regraft_kernels" in str(node.target)]
    return [name.removeprefix("regraft_kernels.").rsplit("_", 1)[0] for name in called]


def test_a_reduction_is_two_launches() -> None:
    """The mean over heads in front of a plan, the log of sizes and the norm behind a merge are in them."""
    program, log = reduced("vit"), Log()
    executable = lower(program, log)
    called = names(executable)
    assert called.count("token_plan") == called.count("token_merge") == 2
    left = [node.target for node in executable.module.graph.nodes if node.op == "call_function"]
    aten = torch.ops.aten
    assert not {ops.plan_merge, ops.merge_tokens, aten.mean.dim, aten.log.default} & set(left)
    assert relative(executable(*program.example)[0], outputs(program)[0]) <= 1e-5
    plans = [row for row in log.applications if row.new_nodes[0].startswith("token_plan")]
    assert len(plans) == 2 and all(len(row.source_nodes) == 2 and row.user_line for row in plans)


@pytest.mark.parametrize(("kind", "merges"), [("beit", 2), ("bert", 3), ("modernbert", 3)])
def test_a_reduced_program_computes_the_same_lowered(kind: str, merges: int) -> None:
    program = reduced(kind)
    executable = lower(program)
    assert names(executable).count("token_merge") >= merges
    assert relative(executable(*program.example)[0], outputs(program)[0]) <= 1e-5


@pytest.mark.parametrize("method", ["tome-stream", "pitome", "evit", "prune-flow", "dart"])
def test_methods(method: str) -> None:
    program = reduced("vit", method)
    executable = lower(program)
    assert names(executable).count("token_plan") == 2
    assert relative(executable(*program.example)[0], outputs(program)[0]) <= 1e-5


def test_a_matching_without_a_kernel_says_why() -> None:
    program, log = reduced("vit", "divprune"), Log()
    executable = lower(program, log)
    assert "token_plan" not in names(executable) and "token_merge" in names(executable)
    assert sum("one token after the other" in refusal.reason for refusal in log.refusals) == 2


def test_tokens_put_back_have_a_kernel() -> None:
    program = capture(tiny("vit"), (), images())
    default_pipeline("cuda", tokens=(ReduceTokens(3),)).run(program, Session(verify="off"))
    executable = lower(program)
    assert names(executable).count("token_unmerge") == 1
    assert relative(executable(*program.example)[0], outputs(program)[0]) <= 1e-5


@pytest.mark.parametrize(
    ("call", "args", "reason"),
    [
        (lambda x: ops.plan_merge(x, remove=2)[0], (torch.randn(2, 8, 4).double(),), "a metric in torch.float64"),
        (
            lambda x, keep: ops.plan_merge(x, None, keep, remove=2)[0],
            (torch.randn(2, 8, 4), torch.ones(2, 8)),
            "keep is torch.float32",
        ),
        (
            lambda x, kept, sources, slots: ops.merge_tokens(x, None, kept, sources, slots)[0],
            (torch.randn(2, 3, 4).double(), *(torch.tensor([row, row]) for row in ([0, 1], [2], [0, 1, 0]))),
            "tokens in torch.float64",
        ),
    ],
)
def test_a_site_without_a_kernel_says_why(call: Any, args: tuple[Tensor, ...], reason: str) -> None:
    log = Log()
    executable = lower(captured(call, args), log)
    assert not executable.kernels and any(reason in refusal.reason for refusal in log.refusals)
    torch.testing.assert_close(executable(*args)[0], call(*args))


def test_the_same_program_gives_the_same_texts() -> None:
    first, second = (lower(reduced("vit")) for _ in range(2))
    assert [kernel.source for kernel in first.kernels] == [kernel.source for kernel in second.kernels]
