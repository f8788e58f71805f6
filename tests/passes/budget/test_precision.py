"""Linear layers in bf16: which ones, what they compute, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.ir.nodes import dtype
from regraft.ir.program import Program
from regraft.passes.budget import precision
from regraft.passes.budget.candidate import Candidate
from regraft.passes.budget.precision import LowerPrecision, offer_precision
from regraft.passes.pipeline import recognising

aten = torch.ops.aten


class Block(nn.Module):
    """Two layers that read the same input, one behind them, and a small one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = nn.Linear(64, 96), nn.Linear(64, 96, bias=False)
        self.down, self.small = nn.Linear(96, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.small(self.down(torch.relu(self.gate(x)) * self.up(x)))
        return out


def recognised(model: nn.Module, *inputs: Tensor) -> Program:
    program = capture(model.eval(), inputs)
    recognising().run(program, Session(verify="off"))
    return program


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def half(layer: nn.Linear, x: Tensor) -> Tensor:
    """The formula: operands rounded, the sum of products and the bias in fp64, the result rounded."""
    weight = layer.weight.bfloat16().double()
    total = x.bfloat16().double() @ weight.T
    return (total if layer.bias is None else total + layer.bias.bfloat16().double()).bfloat16().float()


def test_the_layers_that_are_named_compute_in_bf16_and_the_others_as_before(x: Tensor) -> None:
    model = Block()
    program = recognised(model, x)
    session = Session(verify="off")
    assert LowerPrecision(("gate.weight", "up.weight", "nobody.weight")).run(program, session) == 2
    expected = model.small(model.down(torch.relu(half(model.gate, x)) * half(model.up, x)))
    found = program.callable()(x)[0]
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=2e-3)
    assert not torch.equal(found, model(x))
    assert {item.exactness for item in session.log.applications} == {"lossy"}
    assert [item.new_nodes for item in session.log.applications] == [("gate.weight in bf16",), ("up.weight in bf16",)]


def test_layers_of_one_input_share_its_cast(x: Tensor) -> None:
    program = recognised(Block(), x)
    LowerPrecision(("gate.weight", "up.weight")).run(program, Session(verify="off"))
    narrow = [n for n in program.graph.nodes if n.target is aten.to.dtype and dtype(n) == torch.bfloat16]
    assert len(narrow) == 1
    assert all("val" in node.meta for node in program.graph.nodes if node.op == "call_function")


def test_a_layer_that_is_not_fp32_is_left_alone(x: Tensor) -> None:
    program = recognised(Block().double(), x.double())
    assert LowerPrecision(("gate.weight",)).run(program, Session(verify="off")) == 0


def test_layers_between_attentions_are_offered_together_small_ones_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_is_native", lambda target: True)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 4))
    program = recognised(model, torch.randn(2, 8, 64))
    offered = [item for item in offer_precision(program, "cpu") if isinstance(item, Candidate)]
    assert [len(candidate.rewrite.weights) for candidate in offered] == [1, 4, 3]  # type: ignore[attr-defined]
    assert {candidate.family for candidate in offered} == {"bf16"} and len({c.site for c in offered}) == 3
    assert not any(name == "1.weight" for c in offered for name in c.rewrite.weights)  # type: ignore[attr-defined]


def test_where_nothing_is_offered_the_reason_is(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    monkeypatch.setattr(precision, "bf16_is_native", lambda target: False)
    assert "does not multiply in bf16" in " ".join(map(str, offer_precision(recognised(Block(), x), "cpu")))
    monkeypatch.setattr(precision, "bf16_is_native", lambda target: True)
    assert "no linear layer" in " ".join(map(str, offer_precision(recognised(Block().double(), x.double()), "cpu")))
    monkeypatch.undo()
    assert not precision.bf16_is_native("cuda")
