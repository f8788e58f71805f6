"""Operators that move data: one spelling each, and nothing that moves nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.passes.canonicalize.pipeline import canonicalize
from tests.ir.graphs import numbers
from tests.passes.canonicalize.support import canonical
from tests.support import AsModule, run

X = numbers(2, 6, 4)

Case = tuple[str, Callable[[Tensor], object], str]

RESHAPES: list[Case] = [
    ("view", lambda x: x.view(2, 24), "reshape(x0, [2, 24])"),
    ("view with -1", lambda x: x.view(2, -1), "reshape(x0, [2, 24])"),
    ("reshape with -1", lambda x: x.reshape(-1, 4), "reshape(x0, [12, 4])"),
    ("flatten", lambda x: x.flatten(1), "reshape(x0, [2, 24])"),
    ("flatten leading", lambda x: x.flatten(0, -2), "reshape(x0, [12, 4])"),
    ("unflatten", lambda x: x.unflatten(-1, (2, 2)), "reshape(x0, [2, 6, 2, 2])"),
    ("view_as", lambda x: x.view_as(torch.empty(12, 4)), "reshape(x0, [12, 4])"),
    ("nested", lambda x: x.view(12, 4).view(3, 16), "reshape(x0, [3, 16])"),
    ("back and forth", lambda x: x.view(12, 4).view(2, 6, 4).sin(), "sin(x0)"),
    ("squeeze of unsqueeze", lambda x: x.unsqueeze(1).squeeze(1).sin(), "sin(x0)"),
    ("squeeze of all", lambda x: x[:, :1].sin().squeeze(), "slice.Tensor(x0, -2, 0, 1); sin(0); reshape(1, [2, 4])"),
    ("same shape", lambda x: x.reshape(2, 6, 4).sin(), "sin(x0)"),
]

PERMUTES: list[Case] = [
    ("transpose", lambda x: x.transpose(1, 2), "permute(x0, [0, 2, 1])"),
    ("transpose, negative", lambda x: x.transpose(-1, 0), "permute(x0, [2, 1, 0])"),
    ("mT", lambda x: x.mT, "permute(x0, [0, 2, 1])"),
    ("permute, negative", lambda x: x.permute(-1, 0, -2), "permute(x0, [2, 0, 1])"),
    ("movedim", lambda x: x.movedim(0, -1), "permute(x0, [1, 2, 0])"),
    ("movedim of several", lambda x: x.movedim((0, 1), (1, 0)), "permute(x0, [1, 0, 2])"),
    ("swapaxes", lambda x: x.swapaxes(0, 2), "permute(x0, [2, 1, 0])"),
    ("t", lambda x: x[0].t(), "select.int(x0, -3, 0); permute(0, [1, 0])"),
    ("T", lambda x: x[0].T, "select.int(x0, -3, 0); permute(0, [1, 0])"),
    ("composed", lambda x: x.transpose(0, 1).transpose(1, 2), "permute(x0, [1, 2, 0])"),
    ("twice", lambda x: x.transpose(0, 1).transpose(0, 1).sin(), "sin(x0)"),
    ("identity", lambda x: x.permute(0, 1, 2).sin(), "sin(x0)"),
]

PARTS: list[Case] = [
    ("chunk", lambda x: x.chunk(3, 1)[1], "slice.Tensor(x0, -2, 2, 4)"),
    ("chunk, negative dim", lambda x: x.chunk(2, -1)[0], "slice.Tensor(x0, -1, 0, 2)"),
    ("split", lambda x: x.split(4, 1)[1], "slice.Tensor(x0, -2, 4, 6)"),
    ("split in sizes", lambda x: x.split([1, 5], 1)[1], "slice.Tensor(x0, -2, 1, 6)"),
    ("tensor_split", lambda x: x.tensor_split(2, -1)[1], "slice.Tensor(x0, -1, 2, 4)"),
    ("narrow", lambda x: x.narrow(1, 2, 3), "slice.Tensor(x0, -2, 2, 5)"),
    ("narrow from the end", lambda x: x.narrow(1, -3, 3), "slice.Tensor(x0, -2, 3, 6)"),
    ("index", lambda x: x[:, 1:3], "slice.Tensor(x0, -2, 1, 3)"),
    ("index from the end", lambda x: x[..., -3:-1], "slice.Tensor(x0, -1, 1, 3)"),
    ("index beyond the end", lambda x: x[..., 1:99], "slice.Tensor(x0, -1, 1, 4)"),
    ("index with a step", lambda x: x[..., ::2], "slice.Tensor(x0, -1, 0, 4, 2)"),
    ("slice of a slice", lambda x: x[:, 1:5][:, 1:3], "slice.Tensor(x0, -2, 2, 4)"),
    ("whole slice", lambda x: x[:, :].sin(), "sin(x0)"),
    ("unbind", lambda x: x.unbind(1)[2], "select.int(x0, -2, 2)"),
    ("select from the end", lambda x: x[:, -1], "select.int(x0, -2, 5)"),
]

GROWTH: list[Case] = [
    ("unsqueeze", lambda x: x.unsqueeze(1).sin(), "unsqueeze(x0, -3); sin(0)"),
    ("unsqueeze behind", lambda x: x.unsqueeze(3).sin(), "unsqueeze(x0, -1); sin(0)"),
    ("index with None", lambda x: x[:, None].sin(), "unsqueeze(x0, -3); sin(0)"),
    ("expand", lambda x: x[:1].expand(3, -1, -1).sin(), "slice.Tensor(x0, -3, 0, 1); expand(0, [3, 6, 4]); sin(1)"),
    ("expand_as", lambda x: x[:1].expand_as(x).sin(), "slice.Tensor(x0, -3, 0, 1); expand(0, [2, 6, 4]); sin(1)"),
    ("expand of nothing", lambda x: x.expand(2, -1, 4).sin(), "sin(x0)"),
]


@pytest.mark.parametrize(
    ("function", "expected"), [pytest.param(f, text, id=name) for name, f, text in RESHAPES + PERMUTES + PARTS + GROWTH]
)
def test_spelling(function: Callable[[Tensor], object], expected: str) -> None:
    assert canonical(function, X) == expected


def test_all_parts_of_a_split_are_slices_of_its_source() -> None:
    assert canonical(lambda x: x.chunk(2, 1)[0] - x.chunk(2, 1)[1], X) == (
        "slice.Tensor(x0, -2, 0, 3); slice.Tensor(x0, -2, 3, 6); sub.Tensor(0, 1)"
    )


BATCH = (({0: torch.export.Dim("batch", min=2, max=64)},),)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.flatten(1), "sym_size.int(x0, 0); reshape(x0, [0, 24])"),
        (lambda x: x.transpose(0, 1), "permute(x0, [1, 0, 2])"),
        (lambda x: x.chunk(2, -1)[1], "slice.Tensor(x0, -1, 2, 4)"),
        (lambda x: x.view(x.shape[0], 6, 2, 2), "sym_size.int(x0, 0); reshape(x0, [0, 6, 2, 2])"),
    ],
)
def test_symbolic_sizes_survive(function: Callable[[Tensor], object], expected: str) -> None:
    assert canonical(function, X, dynamic=BATCH) == expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x[2:][1:3].sin(), "slice.Tensor(x0, -3, 3, 5); sin(0)"),
        (lambda x: x[1:5][1:].sin(), "slice.Tensor(x0, -3, 2, 5); sin(0)"),
        (lambda x: x[:-1][-2:].sin(), "slice.Tensor(x0, -3, 0, -1); slice.Tensor(0, -3, -2, end); sin(1)"),
        (
            lambda x: torch.cat((x[:2], x))[:-1].sin(),
            "slice.Tensor(x0, -3, 0, 2); cat([0, x0], -3); slice.Tensor(1, -3, 0, -1); sin(2)",
        ),
    ],
)
def test_slices_of_symbolic_sizes_are_joined_where_they_count_from_the_start(
    function: Callable[[Tensor], object], expected: str
) -> None:
    many = (({0: torch.export.Dim("batch", min=8, max=64)},),)
    assert canonical(function, numbers(9, 6, 4), dynamic=many).replace(str(sys.maxsize), "end") == expected


def test_slices_that_count_from_the_end_of_symbolic_sizes_are_right_though_nothing_verifies_them() -> None:
    x = numbers(9, 6, 4)
    many = (({0: torch.export.Dim("batch", min=8, max=64)},),)
    program = capture(AsModule(lambda x: x[:-1][-2:]), (x,), dynamic=many)
    canonicalize(program, Session(verify="off"))
    torch.testing.assert_close(run(program, (x,)), x[-3:-1], rtol=0, atol=0)


INDEX = torch.tensor([[0, 3, 5], [1, 1, 2]])
COLUMNS: list[Case] = [
    ("the first part", lambda x: torch.cat((x, x.sin()), -1)[..., :4].exp(), "exp(x0)"),
    (
        "inside the second part",
        lambda x: torch.cat((x.exp(), x), 1)[:, 7:9].sin(),
        "slice.Tensor(x0, -2, 1, 3); sin(0)",
    ),
    ("across the seam", lambda x: torch.cat((x, x), -1)[..., 3:5], "cat([x0, x0], -1); slice.Tensor(0, -1, 3, 5)"),
    (
        "rows gathered together, and parted",
        lambda x: torch.cat((x, x[..., :1]), -1).gather(1, INDEX[..., None].expand(-1, -1, 5)).split((4, 1), -1),
        "slice.Tensor(x0, -1, 0, 1); unsqueeze(w0, -1); expand(1, [2, 3, 4]); gather(x0, 1, 2); gather(0, 1, 1)",
    ),
    (
        "columns that are gathered and read twice",
        lambda x: [x.gather(1, INDEX[..., None].expand(-1, -1, 4))[..., at:] for at in (1, 2)],
        "unsqueeze(w0, -1); expand(0, [2, 3, 4]); gather(x0, 1, 1); "
        "slice.Tensor(2, -1, 1, 4); slice.Tensor(2, -1, 2, 4)",
    ),
]


@pytest.mark.parametrize(("function", "expected"), [pytest.param(f, text, id=name) for name, f, text in COLUMNS])
def test_parts_are_read_where_they_were_before_they_were_joined(
    function: Callable[[Tensor], object], expected: str
) -> None:
    assert canonical(function, X) == expected


ROWS: list[Case] = [
    (
        "positions that are expanded to the batch",
        lambda x: nn.functional.embedding(INDEX[:1].expand(2, 3), x[0]),
        "slice.Tensor(w0, -2, 0, 1); select.int(x0, -3, 0); embedding(1, 0); expand(2, [2, 3, 4])",
    ),
    (
        "positions without a batch",
        lambda x: nn.functional.embedding(INDEX[0].expand(2, 3), x[0]),
        "select.int(w0, -2, 0); select.int(x0, -3, 0); embedding(1, 0); expand(2, [2, 3, 4])",
    ),
    (
        "rows of each sample",
        lambda x: nn.functional.embedding(INDEX, x[0]),
        "select.int(x0, -3, 0); embedding(0, w0)",
    ),
]


@pytest.mark.parametrize(("function", "expected"), [pytest.param(f, text, id=name) for name, f, text in ROWS])
def test_rows_that_all_samples_share_are_looked_up_once(function: Callable[[Tensor], object], expected: str) -> None:
    assert canonical(function, X) == expected
