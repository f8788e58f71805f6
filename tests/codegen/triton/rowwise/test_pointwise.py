"""The texts of operators of one element."""

from __future__ import annotations

import re

import pytest

from regraft.codegen.rowwise.primitives import PRIMITIVES
from regraft.codegen.triton.rowwise.helpers import HELPERS
from regraft.codegen.triton.rowwise.pointwise import TEXTS


def test_every_primitive_has_a_text() -> None:
    assert set(TEXTS) == set(PRIMITIVES)


@pytest.mark.parametrize("name", TEXTS)
def test_the_functions_that_a_text_calls_come_with_it(name: str) -> None:
    """Those that it names, and those that these name."""
    text, helpers = TEXTS[name]
    whole = text + "".join(HELPERS[helper] for helper in helpers)
    assert {called for called in re.findall(r"(?<![.\w])(\w+)\(", whole) if called in HELPERS} == set(helpers)
