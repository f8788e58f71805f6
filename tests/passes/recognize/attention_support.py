"""Recognising attention in a function, and the formula that it must agree with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.nodes import arguments
from regraft.ir.program import Program
from regraft.ir.records import Refusal
from regraft.passes.canonicalize.cleanup import DropDeadCode
from regraft.passes.recognize.attention import RecognizeAttention
from regraft.passes.recognize.sdpa import RecognizeSdpa
from tests.ir.graphs import numbers
from tests.support import apply, captured, run

RULES = (RecognizeAttention(), RecognizeSdpa())
BATCH, HEADS, LENGTH, KEYS, DIM = 2, 4, 5, 5, 8
SCALE = 1 / math.sqrt(DIM)
LOWEST = torch.finfo(torch.float32).min
Q = numbers(BATCH, HEADS, LENGTH, DIM, seed=1)
K = numbers(BATCH, HEADS, KEYS, DIM, seed=2)
V = numbers(BATCH, HEADS, KEYS, DIM, seed=3)
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = SCALE,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    fill: float = -math.inf,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention in fp64, heads repeated as the query needs; ``allowed`` is true where a key is visible."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(groups, 1), value.double().repeat_interleave(groups, 1)
    scores = q @ k.mT * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias.double()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, fill)
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None, None]
    return weights / total @ v


def recognized(function: Callable[..., Any], args: tuple[Tensor, ...], dynamic: Any = None) -> tuple[Program, Session]:
    """The program after recognition, and what happened."""
    program = captured(function, args, dynamic=dynamic)
    session = apply(program, RULES)
    DropDeadCode().run(program, session)
    return program, session


def sites(program: Program) -> list[dict[str, Any]]:
    """Arguments of each attention operator."""
    return [arguments(node) for node in program.graph.nodes if node.target is ops.attention]


def found(
    function: Callable[..., Any],
    args: tuple[Tensor, ...] = (Q, K, V),
    dynamic: Any = None,
    expected: Tensor | None = None,
) -> dict[str, Any]:
    """The one attention of ``function``, after checking its numbers against ``expected`` and the function itself."""
    program, session = recognized(function, args, dynamic)
    (site,) = sites(program) or [refusals(session)]
    assert isinstance(site, dict), site
    assert not any(
        node.target in (torch.ops.aten.softmax.int, torch.ops.aten.scaled_dot_product_attention.default)
        for node in program.graph.nodes
    )
    result = run(program, args)
    torch.testing.assert_close(result, function(*args), rtol=1e-5, atol=1e-5, equal_nan=True)
    if expected is not None:
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    return site


def refused(function: Callable[..., Any], args: tuple[Tensor, ...] = (Q, K, V)) -> str:
    """The reason why ``function`` holds no attention; its numbers must stay the same."""
    program, session = recognized(function, args)
    assert not sites(program), "an attention was found"
    torch.testing.assert_close(run(program, args), function(*args), equal_nan=True)
    (reason,) = {refusal.reason for refusal in refusals(session)}
    return reason


def refusals(session: Session) -> list[Refusal]:
    """What was refused as attention."""
    return [refusal for refusal in session.log.refusals if refusal.recognizes == "attention"]


class Module(nn.Module):
    """A function of tensors with parameters: ``forward(*inputs)`` calls ``function(self, *inputs)``."""

    def __init__(self, function: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def attend(scores: Tensor, value: Tensor) -> Tensor:
    """softmax(scores) @ value."""
    return scores.softmax(-1) @ value


def places(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of queries, as a column, and of keys, as a row."""
    return torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]


def causal_of(q: Tensor, k: Tensor) -> Tensor:
    """True where a query sees a key of its own place or before."""
    rows, columns = places(q, k)
    return columns <= rows


def window(q: Tensor, k: Tensor) -> Tensor:
    """True where a query sees its own key and the two before."""
    rows, columns = places(q, k)
    return (columns <= rows) & (columns > rows - 3)


def additive(allowed: Tensor, fill: float = LOWEST) -> Tensor:
    """Zero where a key is seen, ``fill`` elsewhere."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, fill)
