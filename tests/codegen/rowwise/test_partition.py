"""What becomes one kernel, what does not, and the reason that each gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, fx

from regraft.codegen.rowwise.partition import Partition, find_regions
from regraft.ir import ops
from regraft.ir.program import Program
from tests.strategies import canonical_programs
from tests.support import captured


def found(function: Callable[..., Any], *operands: Tensor, dynamic: Any = None) -> Partition:
    """The partition of a function's graph."""
    return find_regions(captured(function, operands, dynamic))


def calls(partition: Partition) -> list[list[str]]:
    """The operators of each region."""
    return [[str(node.target).split(".")[1] for node in region.nodes] for region in partition.regions]


X, W = torch.randn(2, 3, 8), torch.randn(8)


def test_neighbours_are_one_kernel_and_it_says_what_that_saves() -> None:
    partition = found(lambda x, y: torch.relu(x + y) * 2, X, X.clone())
    assert calls(partition) == [["add", "relu", "mul"]]
    (region,) = partition.regions
    size = X.nbytes
    assert (region.bytes_before, region.bytes_after) == (7 * size, 3 * size)
    assert region.reason == "3 calls move 1.34 kB, one kernel 576 B"


def test_no_path_leaves_a_kernel_and_comes_back() -> None:
    """The sum waits for the product, which waits for the activation: two kernels."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        opened = torch.sigmoid(x) * 2
        return torch.tanh(opened + torch.nn.functional.linear(opened, w))

    assert calls(found(function, X, torch.randn(8, 8))) == [["sigmoid", "mul"], ["add", "tanh"]]


def test_a_call_by_itself_stays_where_pytorch_has_a_kernel_for_it() -> None:
    partition = found(lambda x, w: torch.nn.functional.layer_norm(x, (8,), w), X, W)
    assert not partition.regions
    assert [item.reason for item in partition.left] == ["a kernel of its own would move as many bytes"]


def test_an_operator_that_pytorch_has_no_kernel_for_is_a_region_by_itself() -> None:
    assert len(found(lambda x, w: ops.rms_norm(x, w, 1e-6), X, W).regions) == 1


def test_a_value_that_is_read_elsewhere_is_a_second_result() -> None:
    partition = found(lambda x, y: (x + y, torch.relu(x + y).sum(-1)), X, X.clone())
    (region,) = partition.regions
    assert [node.name for node in region.outputs] == ["add", "sum_1"]


def test_views_at_the_ends_stay_outside() -> None:
    partition = found(lambda x: torch.relu(x.transpose(0, 1) + 1).transpose(0, 1), X)
    assert calls(partition) == [["add", "relu"]]


def test_a_permutation_of_rows_inside_is_no_obstacle() -> None:
    def function(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ops.rope(ops.rms_norm(x, w, 1e-6).transpose(1, 2), cos, sin, 8)

    tables = torch.randn(3, 8)
    assert calls(found(function, torch.randn(2, 3, 4, 8), W, tables, tables)) == [["rms_norm", "permute", "rope"]]


def test_what_few_rows_share_is_not_computed_for_each() -> None:
    """cos of the positions stays outside; a weight plus one is cheap, and goes inside."""
    partition = found(lambda x, angle: x * torch.cos(angle) + 1, torch.randn(4, 6, 8), torch.randn(6, 8))
    assert calls(partition) == [["mul", "add"]]
    assert calls(found(lambda x, w: torch.relu(x) * (w + 1), X, W)) == [["relu", "add", "mul"]]


def test_what_does_not_fit_says_why() -> None:
    reasons = {
        "runs over another dim than the last": lambda x: torch.softmax(x, 1),
        "reduces other dims than the last": lambda x: torch.relu(x).sum((0, 1)),
        "works in float64": lambda x: torch.relu(x.double()),
    }
    for reason, function in reasons.items():
        listed = [item.reason for item in found(function, X).left]
        assert any(reason in text for text in listed), (reason, listed)


def test_symbolic_rows_are_rows_and_symbolic_columns_are_refused() -> None:
    dim = torch.export.Dim("n", min=2, max=64)

    def function(x: Tensor) -> Tensor:
        return torch.relu(x + 1) * 2

    rows, columns = (found(function, X, dynamic=(({place: dim},),)) for place in (1, 2))
    assert len(rows.regions) == 1 and not columns.regions
    assert {"symbolic number of columns" in item.reason for item in columns.left} == {True}


def test_weights_alone_are_not_computed_at_run_time() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(W)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight.exp() * 2)

    assert not found(Model(), X).regions


def test_arithmetic_of_truth_values_is_refused() -> None:
    partition = found(lambda x: (x > 0) * (x < 1) | (x == 0), X)
    assert any("truth values" in item.reason for item in partition.left)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(program=canonical_programs(max_operators=12))
def test_regions_are_disjoint_and_convex(program: Program) -> None:
    """No path leaves a region and comes back."""
    found = find_regions(program)
    behind = users_of(program)
    held: set[fx.Node] = set()
    for region in found.regions:
        inside = set(region.nodes)
        assert not inside & held and region.bytes_after < region.bytes_before
        held |= inside
        outside = {node for member in inside for node in behind[member]} - inside
        assert not any(behind[node] & inside for node in outside)


def users_of(program: Program) -> dict[fx.Node, set[fx.Node]]:
    """For every node, all that depend on it."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in reversed(program.graph.nodes):
        found[node] = set(node.users).union(*(found[user] for user in node.users))
    return found
