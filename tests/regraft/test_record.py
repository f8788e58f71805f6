"""Recorded routing: what the model's own routers say, for each token of each layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regraft.errors import OptionError
from regraft.ir.capture import capture
from regraft.record import Recorder, windows
from regraft.solvers.placement.trace import Trace


class Experts(nn.Module):
    """Six experts of which a token takes two, in one product each; the router's choice is kept."""

    def __init__(self, hidden: int = 8, inner: int = 4, experts: int = 6) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 2 * inner, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, inner))
        self.chosen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weight, index = self.router(flat).softmax(-1).topk(2, dim=-1)
        if not torch.compiler.is_compiling():
            self.chosen = index
        out = torch.zeros_like(flat)
        for expert in range(self.up.shape[0]):
            gate, up = (flat @ self.up[expert].T).chunk(2, -1)
            part = (nn.functional.silu(gate) * up) @ self.down[expert].T
            out = out + part * (weight * (index == expert)).sum(-1, keepdim=True)
        return out.view(x.shape)


class Stack(nn.Module):
    """A dense layer, then two layers of experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), Experts(), Experts()])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


def mixtral() -> Any:
    """A tiny Mixtral with random weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=5,
        num_experts_per_tok=2,
    )
    return MixtralForCausalLM(config).eval()


def test_a_trace_is_what_the_routers_say() -> None:
    model = mixtral()
    calls = list(windows(range(60), batch=2, length=10))
    assert [tuple(call.shape) for call in calls] == [(2, 10)] * 3
    recorder = Recorder(capture(model, (), {"input_ids": calls[0], "use_cache": False}), calls[0])
    trace = recorder.trace([recorder.batch(ids) for ids in calls], num_hidden_layers=3)
    assert isinstance(trace, Trace) and (trace.num_experts, trace.top_k, trace.layer_ids) == (5, 2, (0, 1, 2))
    for ids, batch in zip(calls, trace.batches, strict=True):
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
        wanted = np.stack([np.sort(layer.topk(2).indices.numpy(), -1) for layer in logits])
        assert batch.experts is not None and batch.phase == "prefill"
        np.testing.assert_array_equal(np.sort(batch.experts, -1), wanted)


def test_layers_are_numbered_as_the_model_does() -> None:
    model = Stack().eval()
    ids = torch.arange(12).view(2, 6)
    recorder = Recorder(capture(model, (ids,)), ids)
    batch = recorder.batch(ids)
    model(ids)
    assert recorder.layer_ids == (1, 2)
    assert batch.experts is not None
    for place, layer in enumerate(list(model.layers)[1:]):
        assert isinstance(layer, Experts) and layer.chosen is not None
        np.testing.assert_array_equal(np.sort(batch.experts[place], -1), np.sort(layer.chosen.numpy(), -1))


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(OptionError, match="no block of routed experts"):
        Recorder(capture(nn.Linear(4, 4).eval(), (torch.ones(2, 4),)), torch.ones(2, 4))


def test_too_little_text_is_refused() -> None:
    with pytest.raises(OptionError, match="7 tokens, and one call takes 2 x 4"):
        list(windows(range(7), batch=2, length=4))
