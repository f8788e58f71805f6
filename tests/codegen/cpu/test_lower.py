"""Lowered programs: other sizes, nobody's tensors written to, and no weight held twice."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import regraft
from regraft.codegen.cpu.linear_kernels import KERNELS, LinearShape
from regraft.codegen.cpu.lower import lower
from regraft.codegen.cpu.tuning import Tuner
from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.verify import relative_l2
from regraft.passes.pipeline import default_pipeline
from tests.codegen.cpu.support import LINEAR_KERNELS
from tests.support import captured, most_bytes


class Block(nn.Module):
    """A pre-norm block with attention, a gated projection, a bias, and residual sums that are read twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.after = nn.LayerNorm(16), nn.LayerNorm(16)
        self.packed, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24, bias=False), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        heads = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.packed(self.norm(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        y = x + self.out(mixed.transpose(1, 2).flatten(2))
        z = self.after(y)
        z = y + self.down(nn.functional.silu(self.gate(z)) * self.up(z))
        return z * torch.tanh(y)


class Always(Tuner):
    """Takes one kernel wherever it can run."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel

    def choose(self, shape: LinearShape, weight: Tensor) -> str:
        return self.kernel


def lowered(model: nn.Module, args: tuple[Any, ...], tuner: Tuner | None = None, dynamic: Any = None) -> Any:
    program = captured(model, args, dynamic)
    default_pipeline("cpu").run(program, Session())
    return lower(program, tuner)


@pytest.mark.parametrize("kernel", LINEAR_KERNELS)
def test_any_kernel_agrees_and_writes_to_nothing_of_the_users(kernel: str) -> None:
    model, x = Block().eval(), torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    run = lowered(model, (x,), Always(kernel))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kept = x.clone()
    with torch.no_grad():
        expected = model.double()(x.double())
    for _ in range(2):
        assert relative_l2(run(x)[0].double(), expected) <= 2e-6
    assert torch.equal(x, kept)
    assert all(torch.equal(value.float(), state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kernel", ["plain", "onednn"])
def test_symbolic_batch_and_length_run_at_other_sizes(kernel: str) -> None:
    model = Block().eval()
    dynamic = ({0: Dim("batch", max=64), 1: Dim("length", max=64)},)
    run = lowered(model, (torch.randn(2, 5, 16),), Always(kernel), dynamic)
    for batch, length in ((2, 5), (3, 7), (4, 2)):
        x = torch.randn(batch, length, 16)
        with torch.no_grad():
            assert relative_l2(run(x)[0], model(x)) <= 2e-6


class Grouped(nn.Module):
    """A reshape that fixes the sizes of a model whose inputs were to be of any size: its last dim stays a symbol."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x.view(2, 16, 4, 8) * 2)).sum(-1)  # type: ignore[no-any-return]


def test_rows_of_a_width_that_stays_a_symbol() -> None:
    model, x = Grouped().eval(), torch.randn(2, 16, 32)
    compiled = regraft.compile(model, (x,), dynamic=True)
    assert compiled.entries and not compiled.report.events
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_results_of_two_calls_do_not_share_memory() -> None:
    run = lowered(Block().eval(), (torch.zeros(1, 3, 16),))
    first = run(torch.ones(1, 3, 16))[0]
    kept = first.clone()
    run(torch.full((1, 3, 16), 2.0))
    assert torch.equal(first, kept)


class Computed(nn.Module):
    """A bias and a residual that are computed and broadcast: no buffers to write over."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor, bias: Tensor, row: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, torch.exp(bias))
        return torch.exp(row).expand(4, 16) + nn.functional.linear(y, self.weight)


@pytest.mark.parametrize("kernel", LINEAR_KERNELS)
def test_what_is_computed_and_broadcast_is_not_written_over(kernel: str) -> None:
    model, args = Computed().eval(), (torch.randn(4, 16), torch.randn(16), torch.randn(1, 16))
    with torch.no_grad():
        assert relative_l2(lowered(model, args, Always(kernel))(*args)[0], model(*args)) <= 2e-6


def test_mutated_buffers_are_read_anew() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(4, 4))
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.total += x
            return self.linear(self.total)  # type: ignore[no-any-return]

    model, x = Sum().eval(), torch.ones(4, 4)
    fast = regraft.compile(model, x)
    with torch.no_grad():
        for count in (1, 2, 3):
            assert torch.allclose(fast(x), model.linear(x * count), atol=1e-6)


def storage_bytes() -> int:
    """Bytes of all tensor storages alive, packed weights (which have no storage) by their logical size."""
    gc.collect()
    found: dict[Any, int] = {}
    for item in gc.get_objects():
        if type(item) in (Tensor, nn.Parameter):
            if item.layout is torch._mkldnn:  # type: ignore[attr-defined]
                found[id(item)] = item.numel() * item.element_size()
            elif item.layout is torch.strided and item.device.type == "cpu":
                storage = item.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_weights_are_held_once_when_the_original_is_freed() -> None:
    torch.manual_seed(0)
    before = storage_bytes()
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(6))).eval()
    weights = sum(value.nbytes for value in model.state_dict().values())
    fast = regraft.compile(model, torch.randn(4, 512), free_original=True)
    held = storage_bytes() - before
    assert weights * 0.95 <= held <= weights * 1.1
    assert fast(torch.randn(4, 512)).shape == (4, 512)


def test_tied_weights_are_bound_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(32, 8)
            self.head = nn.Linear(8, 32, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embedding(ids))  # type: ignore[no-any-return]

    model = Tied().eval()
    run = lowered(model, (torch.arange(4)[None],), Always("plain"))
    held = [value for value in vars(run.module).values() if isinstance(value, Tensor)]
    held += [*run.module._buffers.values(), *run.module._parameters.values()]
    assert len({value.data_ptr() for value in held}) == 1


def test_attention_over_a_length_that_depends_on_data_is_not_measured() -> None:
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 6, 8)
    chosen = torch.tensor([True, False, True, True, False])

    def site(query: Tensor, key: Tensor, chosen: Tensor) -> Tensor:
        out: Tensor = ops.attention(query[:, :, chosen], key, key, [], scale=0.5, mask="all")
        return out

    run = lower(captured(site, (query, key, chosen)))
    assert not run.tuning
    for rows in (chosen, ~chosen):
        expected = (query[:, :, rows] @ key.mT * 0.5).softmax(-1) @ key
        torch.testing.assert_close(run(query, key, rows)[0], expected)


def test_kernels_are_chosen_before_the_first_weight_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Telling(Tuner):
        def _measure_linear(self, shape: LinearShape, weight: Tensor) -> tuple[str, dict[str, float]]:
            done.append("measured")
            return "plain", {}

    kernel = KERNELS["plain"]
    monkeypatch.setitem(KERNELS, "plain", lambda emit, given: (done.append("made"), kernel(emit, given))[1])
    lowered(nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8)), (torch.ones(2, 8),), Telling())
    assert done == ["measured", "measured", "made", "made"]


def test_a_compilation_takes_one_more_copy_of_the_weights() -> None:
    """And room for a measurement: three packed copies of one layer, and of its neighbour."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(24))).eval()
    weights = sum(value.nbytes for value in model.state_dict().values())
    assert most_bytes(lambda: regraft.compile(model, torch.randn(4, 512))) < 1.3 * weights
