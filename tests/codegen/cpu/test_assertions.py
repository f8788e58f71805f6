"""What a model asserts of its values is asked when lowered code runs, though nothing reads the answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from regraft.codegen.cpu.lower import lower
from regraft.ir.driver import Session
from regraft.ir.errors import FailedAssertion
from regraft.passes.pipeline import default_pipeline
from tests.support import captured

X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def with_a_message(x: Tensor) -> Tensor:
    torch._assert_async((x > 0).all(), "all must be positive")
    return x.exp() + 1


def without(x: Tensor) -> Tensor:
    torch._assert_async((x > 0).all())
    return x.exp() + 1


@pytest.mark.parametrize(
    ("function", "message"), [(with_a_message, "all must be positive"), (without, "an assertion on .* failed")]
)
def test_it_holds_or_says_so(function: Callable[[Tensor], Tensor], message: str) -> None:
    program = captured(function, (X,))
    default_pipeline("cpu").run(program, Session())
    executable = lower(program)
    torch.testing.assert_close(executable(X)[0], X.exp() + 1)
    with pytest.raises(FailedAssertion, match=message):
        executable(-X)
