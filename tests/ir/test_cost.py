"""The cost model counts operations and bytes by formula, and turns them into a roofline time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from regraft.ir import device as devices
from regraft.ir.capture import capture
from regraft.ir.cost import Cost, footprint, graph_cost, node_cost, operator_name, roofline_seconds
from regraft.ir.device import DEVICES, Device, find_device, local_cpu
from regraft.ir.nodes import Builder
from regraft.ir.ops import rms_norm
from regraft.ir.program import Program
from tests.support import AsModule

SLOW = Device("slow", {"float32": 100.0, "bfloat16": 200.0}, 10.0, "test")


def program_of(function: Any, *args: Any, dynamic: Any = None) -> Program:
    return capture(AsModule(function), args, dynamic=dynamic)


def cost_of(name: str, function: Any, *args: Any) -> Cost:
    """The cost of the one call of operator ``name``."""
    graph = program_of(function, *args).graph
    (node,) = [n for n in graph.nodes if n.op == "call_function" and operator_name(n) == name]
    return node_cost(node)


def test_matmul_counts_two_operations_for_each_multiply_add() -> None:
    cost = cost_of("matmul", torch.matmul, torch.randn(3, 4, 5), torch.randn(3, 5, 6))
    assert cost == Cost(2 * 3 * 4 * 5 * 6, 4 * (3 * 4 * 5 + 3 * 5 * 6 + 3 * 4 * 6))


def test_linear_reads_weight_and_bias() -> None:
    cost = cost_of("linear", F.linear, torch.randn(7, 5), torch.randn(3, 5), torch.randn(3))
    assert cost == Cost(2 * 7 * 5 * 3, 4 * (7 * 5 + 3 * 5 + 3 + 7 * 3))


def test_convolution_counts_the_kernel_of_one_group() -> None:
    cost = cost_of("conv2d", lambda x, w: F.conv2d(x, w, groups=2), torch.randn(1, 4, 5, 5), torch.randn(6, 2, 3, 3))
    assert cost.flops == 2 * (6 * 3 * 3) * (2 * 3 * 3)


def test_attention_never_writes_its_scores() -> None:
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 16, 8)
    cost = cost_of("scaled_dot_product_attention", lambda q, k: F.scaled_dot_product_attention(q, k, k), query, key)
    assert cost.bytes == query.nbytes * 2 + key.nbytes  # the shared key and value is read once
    assert cost.flops == 2 * 3 * 4 * 16 * (2 * (8 + 8) + 5)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("permute", lambda x: x.permute(1, 0)),
        ("slice", lambda x: x[1:3]),
        ("expand", lambda x: x[None].expand(5, 4, 6)),
        ("reshape", lambda x: x.reshape(2, 12)),
    ],
)
def test_views_are_free(name: str, function: Any) -> None:
    graph = program_of(function, torch.randn(4, 6)).graph
    (node,) = [n for n in graph.nodes if n.op == "call_function" and operator_name(n) == name]
    assert node_cost(node) == Cost(0, 0)


def test_a_reshape_that_must_copy_moves_bytes() -> None:
    assert cost_of("reshape", lambda x: x.permute(1, 0).reshape(24), torch.randn(4, 6)) == Cost(0, 2 * 4 * 24)


def test_a_change_of_layout_copies() -> None:
    assert cost_of("contiguous", lambda x: x.permute(1, 0).contiguous(), torch.randn(4, 6)).bytes == 2 * 4 * 24


def test_an_embedding_reads_the_rows_it_picks_and_not_the_table() -> None:
    ids = torch.zeros(3, dtype=torch.long)
    cost = cost_of("embedding", lambda i, table: F.embedding(i, table), ids, torch.randn(1000, 8))
    assert cost == Cost(0, 2 * 3 * 8 * 4 + 3 * 8)


def test_an_expanded_dimension_is_read_once() -> None:
    assert footprint(torch.randn(1, 6).expand(5, 6)) == 6 * 4


def test_pointwise_operators_do_one_operation_an_element() -> None:
    assert cost_of("add", torch.add, torch.randn(4, 6), torch.randn(6)) == Cost(24, 4 * (24 + 6 + 24))


def test_a_semantic_operator_counts_by_its_own_formula() -> None:
    program = program_of(lambda x: x.exp(), torch.randn(4, 6))
    build = Builder(program.graph, program.output_node, program.fake_mode)
    node = build.call(rms_norm, program.user_inputs()[0], None, 1e-6)
    assert node_cost(node) == Cost(5 * 24, 2 * 4 * 24)
    assert operator_name(node) == "regraft.rms_norm"


def test_an_unknown_operator_counts_bytes_only() -> None:
    program = program_of(lambda x: torch.linalg.inv(x), torch.eye(4))
    counted = graph_cost(program.graph, SLOW)
    (node,) = [n for n in counted.nodes if n.operator.startswith("linalg_inv")]
    assert not node.known and node.cost.flops == 0 and node.cost.bytes >= 2 * 4 * 16


def test_symbolic_sizes_count_as_in_the_example() -> None:
    length = torch.export.Dim("length", min=2, max=64)
    program = program_of(torch.exp, torch.randn(8, 4), dynamic={"args": ({0: length},)})
    assert graph_cost(program.graph, SLOW).total.bytes == 2 * 8 * 4 * 4


def test_time_is_the_slower_of_arithmetic_and_memory() -> None:
    assert roofline_seconds(Cost(1000, 10), SLOW, torch.float32) == 10
    assert roofline_seconds(Cost(1000, 10), SLOW, torch.bfloat16) == 5
    assert roofline_seconds(Cost(10, 1000), SLOW, torch.float32) == 100
    assert SLOW.ridge(torch.float32) == 10


def test_a_graph_costs_what_its_nodes_cost() -> None:
    program = program_of(lambda x, w: F.relu(F.linear(x, w)), torch.randn(2, 4), torch.randn(3, 4))
    counted = graph_cost(program.graph, SLOW)
    assert [node.operator for node in counted.nodes] == ["linear", "relu"]
    assert counted.total == counted.nodes[0].cost + counted.nodes[1].cost
    assert counted.seconds == sum(node.seconds for node in counted.nodes)
    assert "test_cost.py" in counted.nodes[0].user_line


def test_inputs_cost_nothing() -> None:
    graph = fx.Graph()
    assert node_cost(graph.placeholder("x")) == Cost(0, 0)


def test_targets_name_devices() -> None:
    assert find_device("h200") is DEVICES["H200"]
    assert find_device("cuda:sm_90") is DEVICES["H100"]
    assert find_device("hip:gfx942") is DEVICES["MI300X"]
    with pytest.raises(ValueError, match="'abacus'; give one of: cpu, H200"):
        find_device("abacus")


def test_the_local_processor_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_CACHE_DIR", str(tmp_path))
    made: list[Device] = []

    def measure() -> Device:
        made.append(SLOW)
        return SLOW

    monkeypatch.setattr(devices, "_measure", measure)
    assert local_cpu() == SLOW == local_cpu() and len(made) == 1
    assert local_cpu(refresh=True) == SLOW and len(made) == 2
    (held,) = json.loads((tmp_path / "devices.json").read_text()).values()
    assert held["bytes_per_second"] == 10.0


@pytest.mark.parametrize("content", ["not json", "[]", '{"name": 3}'])
def test_a_damaged_cache_is_measured_anew(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(devices, "_measure", lambda: SLOW)
    (tmp_path / "devices.json").write_text(content)
    assert local_cpu() == SLOW


def test_a_measurement_finds_positive_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(devices, "_MATRIX", {torch.float32: 32, torch.bfloat16: 32})
    monkeypatch.setattr(devices, "_COPY_ELEMENTS", 1 << 10)
    measured = find_device("cpu")
    assert measured.bytes_per_second > 0 and min(measured.flops.values()) > 0
