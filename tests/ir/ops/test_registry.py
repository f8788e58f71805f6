"""How an operator's schema and its definition fit together."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from regraft.ir import ops
from regraft.ir.nodes import schema_defaults
from regraft.ir.ops import OPERATORS


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_a_definition_takes_the_arguments_of_the_schema(operator: Any) -> None:
    """Options may stand in another order; what is given by place may not."""
    expected = operator._schema.arguments
    taken = list(inspect.signature(OPERATORS[operator].reference).parameters)
    placed = [argument.name for argument in expected if not argument.kwarg_only]
    assert taken[: len(placed)] == placed and set(taken) == {argument.name for argument in expected}


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_a_default_that_a_definition_has_is_that_of_the_schema(operator: Any) -> None:
    parameters = inspect.signature(OPERATORS[operator].reference).parameters.values()
    own = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    assert own.items() <= schema_defaults(operator).items()


def test_arguments_are_given_by_place_or_by_name_and_left_out_where_there_is_a_default() -> None:
    x, weight = torch.linspace(-1, 1, 8), torch.linspace(1, 2, 8)
    wanted = OPERATORS[ops.rms_norm].reference(x, weight, 1e-6, 0.0, "before_weight")
    assert torch.equal(ops.rms_norm(x, weight, 1e-6), wanted)
    assert torch.equal(ops.rms_norm(eps=1e-6, weight=weight, x=x), wanted)
    with pytest.raises(RuntimeError, match="eps"):
        ops.rms_norm(x, weight)
