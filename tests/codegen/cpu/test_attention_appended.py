"""Attention to a cache and what is appended to it: the native kernel reads both where they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from regraft.codegen.cpu import attention as lowering
from regraft.codegen.cpu.lower import lower
from regraft.codegen.cpu.native_operators import attend_native
from regraft.ir.ops import attention, attention_mapped
from regraft.ir.verify import relative_l2
from tests.codegen.cpu.support import needs_native
from tests.support import captured

aten = torch.ops.aten
pytestmark = needs_native

HEADS, NEW, SIZE = 4, 5, 16


@pytest.fixture(autouse=True)
def natively(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not measured: any kernel may win."""
    monkeypatch.setattr(lowering, "measurable", lambda context, given: False)


def draw(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def inputs(before: int, kv_heads: int = 2) -> tuple[Tensor, ...]:
    """A query, then cache and new tokens of keys and of values, as a projection leaves these."""
    query = draw(1, NEW, HEADS, SIZE).transpose(1, 2)
    cached = (draw(1, kv_heads, before, SIZE, seed=1), draw(1, kv_heads, before, SIZE, seed=2))
    new = (draw(1, NEW, kv_heads, SIZE, seed=3).transpose(1, 2), draw(1, NEW, kv_heads, SIZE, seed=4).transpose(1, 2))
    return query, cached[0], new[0], cached[1], new[1]


def step(mask: str) -> Callable[..., Tensor]:
    def attend(query: Tensor, keys: Tensor, key: Tensor, values: Tensor, value: Tensor) -> Tensor:
        joined = torch.cat([keys, key], 2), torch.cat([values, value], -2)
        found: Tensor = attention(query, *joined, [], mask=mask, scale=0.3)
        return found

    return attend


def nodes(function: Callable[..., Any], *given: Tensor) -> list[fx.Node]:
    """Those of the lowered graph, whose result is compared with the function's."""
    executable = lower(captured(function, given))
    (found, *_) = executable(*given)
    wanted = function(*(tensor.double() for tensor in given))
    assert relative_l2(found.double(), wanted[0] if isinstance(wanted, tuple) else wanted) < 2e-6
    return list(executable.module.graph.nodes)


@pytest.mark.parametrize("before", [1, 40, 512, 700])
@pytest.mark.parametrize(
    "mask", ["all", "band(None,key_len - query_len)", "prefix(3) | band(key_len - query_len - 9,None)"]
)
def test_cache_and_new_keys_are_not_joined(before: int, mask: str) -> None:
    found = nodes(step(mask), *inputs(before))
    assert not [node for node in found if node.target is aten.cat.default]
    assert [node for node in found if node.target is attend_native]


def test_many_new_tokens_are_packed_from_both() -> None:
    query, keys, key, values, value = inputs(90)
    more = [torch.cat([tensor] * 14, 2) for tensor in (query, key, value)]
    found = nodes(step("all"), more[0], keys, more[1], values, more[2])
    assert not [node for node in found if node.target is aten.cat.default]


def test_a_map_of_scores_takes_both_too() -> None:
    def attend(query: Tensor, keys: Tensor, key: Tensor, values: Tensor, value: Tensor) -> Tensor:
        joined = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        found: Tensor = attention_mapped(query, *joined, [], weight="sigmoid", normaliser="none", scale=0.3)
        return found

    assert not [node for node in nodes(attend, *inputs(40)) if node.target is aten.cat.default]


def test_a_cache_that_the_model_returns_is_joined_once() -> None:
    def attend(query: Tensor, keys: Tensor, key: Tensor, values: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        joined = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return attention(query, *joined, [], scale=0.3), *joined

    (call,) = [node for node in nodes(attend, *inputs(40)) if node.target is attend_native]
    assert [node.target for node in call.args[1:3] if isinstance(node, fx.Node)] == [aten.cat.default] * 2


def test_pieces_of_another_length_than_their_values_are_joined() -> None:
    query, keys, key, values, value = inputs(40)
    moved = torch.cat([value[:, :, :1], values], 2), value[:, :, 1:]
    found = nodes(step("all"), query, keys, key, *moved)
    assert [node for node in found if node.target is aten.cat.default]


def test_a_cache_that_grows() -> None:
    """A symbolic length: the mask follows the sum of both."""
    size = torch.export.Dim("before", min=2, max=4096)
    longer = {2: size}
    shapes = (None, longer, None, longer, None)
    mask = "band(None,key_len - query_len)"
    executable = lower(captured(step(mask), inputs(40), dynamic=(shapes,)))
    for before in (40, 77, 600):
        given = inputs(before)
        (found,) = executable(*given)
        assert relative_l2(found.double(), step(mask)(*(tensor.double() for tensor in given))) < 2e-6
