"""Rows that nobody reads are not computed: behind the keys and values of the last attention those read alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.nodes import arguments, shape
from regraft.ir.program import Program
from regraft.passes.pipeline import DropUnread, default_pipeline, recognising
from regraft.passes.tokens.reduce import ReduceTokens
from tests.ir.graphs import numbers
from tests.support import captured, needs_symbols_that_merge, run

LENGTH = 9
Q, K, V = numbers(2, 4, LENGTH, 8, seed=1), numbers(2, 2, LENGTH, 8, seed=2), numbers(2, 2, LENGTH, 6, seed=3)
THERE = torch.tensor([[1] * LENGTH, [0, 0, 0, 1, 1, 1, 0, 1, 1]])
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 2, 2, 3]])
CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "the first": lambda y: y[:, :, 0],
    "the last": lambda y: y[:, :, -1],
    "some": lambda y: y[:, :, 3:7],
    "the last two": lambda y: y[:, :, -2:],
}
#: The operands after query, key and value, and the options, of an attention.
SITES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "all": (([],), {}),
    "causal": (([],), {"mask": "band(None,0)"}),
    "aligned to the end": (([],), {"mask": "band(None,key_len - query_len)"}),
    "window and sink": (([],), {"mask": "band(-2,0) | prefix(2)"}),
    "chunks": (([],), {"mask": "chunk(4) & band(None,0)"}),
    "padding": (([THERE],), {"mask": "keys(0) & band(None,0)", "empty_rows": "zero"}),
    "rows": (([THERE],), {"mask": "rows(0) | band(0,0)"}),
    "documents": (([THERE, DOCUMENTS],), {"mask": "same(1,1) & keys(0)", "mask_fill": -1e4}),
    "heads": (([],), {"mask": "(band(-1,1) & heads(0,2)) | heads(2,4)"}),
    "dense": (([numbers(2, 4, LENGTH, LENGTH) > 0],), {"mask": "dense(0) | band(0,0)"}),
    "bias and sinks": (([], numbers(1, 4, LENGTH, LENGTH), None, numbers(4)), {"softcap": 5.0}),
    "bias of all rows": (([], numbers(2, 1, 1, LENGTH)), {}),
}


def queries(program: Program) -> list[Any]:
    """How many queries each attention has."""
    return [shape(arguments(node)["query"])[2] for node in program.graph.nodes if node.target is ops.attention]


def dropped(program: Program) -> Program:
    assert DropUnread().run(program, Session()) > 0
    return program


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", SITES)
def test_an_attention_has_the_queries_that_are_read(name: str, cut: str) -> None:
    operands, options = SITES[name]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return CUTS[cut](ops.attention(q, k, v, *operands, scale=0.4, **options))

    program = dropped(captured(attend, (Q, K, V)))
    result, expected = run(program, (Q, K, V)), attend(Q, K, V)
    assert queries(program) == [expected.shape[2] if expected.dim() == 4 else 1]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_masks_say_the_least_that_is_true_of_the_rows() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        whole: Tensor = ops.attention(q, k, v, [THERE, DOCUMENTS], scale=1.0, mask="same(1,1) & band(None,0)")
        return whole[:, :, -1]

    program = dropped(captured(attend, (Q, K, V)))
    (site,) = [arguments(node) for node in program.graph.nodes if node.target is ops.attention]
    assert site["mask"] == "same(1,0)" and [shape(t) for t in site["mask_tensors"]] == [(2, LENGTH), (2, 1)]


@pytest.mark.parametrize(
    ("operands", "options"),
    [(([], None, numbers(4)), {}), (([torch.ones(1, LENGTH, 1, dtype=torch.int64)],), {"mask": "bits(0)"})],
)
def test_what_counts_places_keeps_its_queries(operands: tuple[Any, ...], options: dict[str, Any]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        whole: Tensor = ops.attention(q, k, v, *operands, scale=0.4, **options)
        return whole[:, :, -1]

    program = captured(attend, (Q, K, V))
    assert DropUnread().run(program, Session()) == 0 and queries(program) == [LENGTH]


class Encoder(nn.Module):
    """Two pre-norm blocks, of whose last hidden state ``read`` takes what it wants."""

    def __init__(self, read: Callable[[Tensor], Any], causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True, activation="gelu")
        self.parts = nn.ModuleList(
            nn.ModuleList(
                (layer.norm1, nn.Linear(16, 48), layer.self_attn.out_proj, layer.norm2, layer.linear1, layer.linear2)
            )
            for _ in range(2)
        )
        self.final = nn.LayerNorm(16)
        self.read, self.causal = read, causal

    def forward(self, x: Tensor) -> Any:
        for norm, packed, out, second, up, down in self.parts:
            heads = [part.unflatten(-1, (2, 8)).transpose(1, 2) for part in packed(norm(x)).chunk(3, -1)]
            y = F.scaled_dot_product_attention(*heads, is_causal=self.causal)
            x = x + out(y.transpose(1, 2).flatten(2))
            x = x + down(F.gelu(up(second(x))))
        return self.read(self.final(x))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("read", "left"), [(lambda h: h[:, 0], 1), (lambda h: h[:, -1:], 1), (lambda h: h[:, 1:4].mean(1), 3)]
)
def test_a_block_computes_the_tokens_that_are_read(read: Callable[[Tensor], Tensor], left: int, causal: bool) -> None:
    model, x = Encoder(read, causal).eval(), numbers(2, LENGTH, 16)
    program = captured(model, (x,))
    default_pipeline().run(program, Session())
    assert queries(program) == [LENGTH, left]
    torch.testing.assert_close(run(program, (x,)), model(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("read", "left"),
    [
        (lambda h: (h[:, 0], h[:, 1]), 2),
        (lambda h: (h[:, 2], h[:, 2:3], h[:, 4:6]), 4),
        (lambda h: torch.cat((h[:, -1], h[:, -3]), -1), 3),
        (lambda h: (h[:, 0], h[:, -1]), LENGTH),
        (lambda h: (h[:, 0], h[1:]), LENGTH),
    ],
)
def test_of_several_cuts_the_rows_around_them_are_computed(read: Callable[[Tensor], Any], left: int) -> None:
    model, x = Encoder(read).eval().requires_grad_(False), numbers(2, LENGTH, 16)
    program = captured(model, (x,))
    default_pipeline().run(program, Session())
    assert queries(program) == [LENGTH, left]
    torch.testing.assert_close(run(program, (x,)), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_layer_of_torch_s_own_computes_the_tokens_that_are_read(norm_first: bool) -> None:
    """Its output layer reads all tokens of all samples in one dim."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    encoder, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), numbers(3, LENGTH, 16)
    program = captured(lambda x: encoder(x)[:, 0], (x,))
    default_pipeline().run(program, Session())
    assert queries(program) == [LENGTH, 1]
    torch.testing.assert_close(run(program, (x,)), encoder(x)[:, 0].detach(), rtol=1e-5, atol=1e-5)


def test_rows_are_copied_for_no_calls_that_leave_few_out() -> None:
    x = numbers(2, 32, 16)
    program = captured(Encoder(lambda h: h[:, 1:]), (x,))
    default_pipeline().run(program, Session())
    assert queries(program) == [32, 32]


def test_a_block_of_which_all_tokens_are_read_keeps_them() -> None:
    program = captured(Encoder(lambda h: (h[:, 0], h.mean(1))), (numbers(2, LENGTH, 16),))
    default_pipeline().run(program, Session())
    assert queries(program) == [LENGTH, LENGTH]


def test_a_reduction_behind_which_protected_tokens_alone_are_read_is_none() -> None:
    """The second one, behind the last attention."""
    program, x = captured(Encoder(lambda h: h[:, 0]), (numbers(2, LENGTH, 16),)), numbers(2, LENGTH, 16)
    default_pipeline(tokens=(ReduceTokens((2, 2)),)).run(program, Session())
    assert queries(program) == [LENGTH, 1]
    assert sum(node.target is ops.merge_tokens for node in program.graph.nodes) == 1
    reduced = captured(Encoder(lambda h: h[:, 0]), (x,))
    recognising().run(reduced, Session())
    assert ReduceTokens((2, 2)).run(reduced, Session()) == 2
    torch.testing.assert_close(run(program, (x,)), run(reduced, (x,)), rtol=1e-5, atol=1e-5)


def test_the_last_token_of_any_number() -> None:
    needs_symbols_that_merge()
    model = Encoder(lambda h: h[:, -1], causal=True).eval()
    program = captured(model, (numbers(2, LENGTH, 16),), dynamic=True)
    default_pipeline().run(program, Session())
    assert queries(program)[1] == 1 and not isinstance(queries(program)[0], int)
    for batch, length in ((2, LENGTH), (3, 5), (2, 31)):
        x = numbers(batch, length, 16)
        torch.testing.assert_close(run(program, (x,)), model(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("read", "rows"),
    [
        (lambda y: y.reshape(2, 3, 4, 8)[:, 1:], (2, 2, 32)),  # a dim behind is split
        (lambda y: y.reshape(6, 32)[1:3], (2, 3, 32)),  # rows of two samples in one dim
    ],
)
def test_reshapes_carry_rows_where_their_dim_stays(read: Callable[[Tensor], Tensor], rows: tuple[int, ...]) -> None:
    def function(x: Tensor) -> Tensor:
        return read(F.gelu(x))

    x = numbers(2, 3, 32)
    program = captured(function, (x,))
    DropUnread().run(program, Session())
    (activation,) = [node for node in program.graph.nodes if node.target is torch.ops.aten.gelu.default]
    assert shape(activation) == rows
    torch.testing.assert_close(run(program, (x,)), function(x))
