"""What tests share: capturing small functions, and running one set of rules on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from regraft.ir.capture import capture
from regraft.ir.driver import Driver, Session
from regraft.ir.program import Program
from regraft.ir.rule import Rule
from regraft.passes.canonicalize.pipeline import canonicalize


def needs_symbols_that_merge() -> None:
    """Skip on a torch whose export refuses a symbolic size that is merged with another dimension (heads that are
    repeated or flattened): it does not see that ``min(8 * n, 32 * n)`` is ``8 * n``."""
    if torch.__version__ < "2.13":
        pytest.skip("this torch.export refuses symbolic sizes that are merged with others")


class AsModule(nn.Module):
    """A function as a module, so that ``torch.export`` takes it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def captured(model: Callable[..., Any], args: tuple[Any, ...], dynamic: Any = None) -> Program:
    """The canonical program of a module or function."""
    module = model if isinstance(model, nn.Module) else AsModule(model)
    program = capture(module.eval(), args, dynamic=dynamic)
    canonicalize(program, Session())
    return program


def apply(program: Program, rules: Sequence[Rule], verify: str = "each") -> Session:
    """Run ``rules`` over ``program`` until none fires; returns the session with its log."""
    session = Session(verify=verify)
    Driver(program, rules, session, "test").run()
    return session


def run(program: Program, args: tuple[Any, ...]) -> Any:
    """The program's output on ``args``, in the user's structure."""
    return program.user_outputs(program.callable()(*torch.utils._pytree.tree_leaves((args, {}))))


def most_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that tensors made by ``call`` take at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
