"""Routed experts are found in graphs that libraries and hand-written blocks make, and look-alikes are
refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from regraft.ir.driver import Session
from regraft.ir.nodes import arguments
from regraft.ir.ops.moe import moe
from regraft.ir.program import Program
from regraft.ir.rule import Example, Rule
from regraft.passes.canonicalize.cleanup import DropDeadCode
from regraft.passes.recognize.moe import RecognizeMoe
from regraft.passes.recognize.moe_axis import RecognizeMoeAxis
from regraft.passes.recognize.moe_left import DropCountChecks, ReportLeftExperts
from regraft.passes.recognize.moe_loop import RecognizeMoeLoop
from regraft.passes.recognize.moe_loop_examples import LOOPS, Block, all_tokens
from regraft.passes.recognize.moe_pieces_examples import whole_experts
from tests.support import apply, captured, run

RULES: tuple[Rule, ...] = (RecognizeMoe(), RecognizeMoeAxis(), RecognizeMoeLoop())
EXAMPLES = [(rule, example) for rule in RULES for example in rule.examples]
NEAR_MISSES = [(rule, example) for rule in RULES for example in rule.near_misses]


def identifier(value: Any) -> str | None:
    return value.name if isinstance(value, (Rule, Example)) else None


def sites(program: Program) -> list[dict[str, Any]]:
    """The arguments of each moe operator."""
    return [arguments(node) for node in program.graph.nodes if node.target is moe]


@pytest.mark.parametrize(("rule", "example"), EXAMPLES, ids=identifier)
def test_it_is_found_and_computes_the_same(rule: Rule, example: Example) -> None:
    function, args = example.make()
    program = captured(function, args)
    before = run(program, args)
    apply(program, [rule])
    assert len(sites(program)) == 1
    tolerance = 2e-2 if before.dtype == torch.bfloat16 else 1e-6
    assert float((run(program, args) - before).norm()) <= tolerance * float(before.norm())


@pytest.mark.parametrize(("rule", "example"), NEAR_MISSES, ids=identifier)
def test_a_look_alike_is_refused_with_its_reason(rule: Rule, example: Example) -> None:
    function, args = example.make()
    program = captured(function, args)
    session = apply(program, [rule])
    assert not sites(program)
    assert len(session.log.refusals) == 1 and example.reason in session.log.refusals[0].reason


@pytest.mark.parametrize("rule", RULES, ids=identifier)
def test_other_sums_are_no_sites(rule: Rule) -> None:
    def sums(x: torch.Tensor) -> torch.Tensor:
        return x.view(2, 3, 4).sum(1) + torch.zeros(2, 4).index_add(0, torch.tensor([0, 1]), x[:2]) * x[:2, :1]

    program = captured(sums, (torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),))
    assert not apply(program, [rule]).log.refusals


def test_the_weights_of_a_loop_are_stacked_by_weight_operations() -> None:
    torch.manual_seed(0)
    program = captured(Block(all_tokens), (torch.randn(5, 8),))
    apply(program, RULES)
    (site,) = sites(program)
    assert site["layout"] == "separate"
    originals = list(program.weights.sources(str(program.weight_name(site["up"]))))
    assert originals == [f"experts.{number}.1.weight" for number in range(3)]


def test_a_stacked_weight_is_taken_as_it_is() -> None:
    function, args = next(example for example in LOOPS if example.name == "all tokens, stacked weights").make()
    program = captured(function, args)
    apply(program, RULES)
    (site,) = sites(program)
    assert (program.weight_name(site["first"]), site["transposed"]) == ("first", True)


def test_checks_of_counts_that_always_hold_are_gone_and_others_stay() -> None:
    def checked(x: torch.Tensor) -> torch.Tensor:
        largest = x.argmax().item()
        torch._check(largest <= 3)
        return x + largest

    block = Block(whole_experts())
    for model, args, left in ((block, (torch.randn(5, 8),), 0), (checked, (torch.tensor([0.0, 1.0]),), 1)):
        program = captured(model, args)
        apply(program, RULES)
        DropCountChecks().run(program, Session())
        DropDeadCode().run(program, Session())
        checks = [node for node in program.graph.nodes if node.target is torch.ops.aten._assert_scalar.default]
        assert bool(checks) == bool(left)
        assert bool([node for node in program.graph.nodes if node.target is torch.ops.aten.item.default]) == bool(left)


def test_products_by_experts_that_no_sum_ends_are_in_the_report() -> None:
    def unsummed(x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        ids = x[:, :3].argmax(-1)
        return torch.bmm(first[ids], x.unsqueeze(-1)).squeeze(-1)

    def of_found_rows(x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        return x[torch.where(x[:, 0] > 0)[0]] @ first[0]

    args = (torch.randn(5, 8), torch.randn(3, 8, 8))
    for model, wanted in ((unsummed, 1), (of_found_rows, 0)):
        program, session = captured(model, args), Session()
        ReportLeftExperts().run(program, session)
        assert [refusal.recognizes for refusal in session.log.refusals] == ["moe"] * wanted


def family(kind: str, **options: Any) -> Callable[[str], nn.Module]:
    """A two-layer random model of one Hugging Face configuration."""

    def make(implementation: str) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64,
            "pad_token_id": 0, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        }  # fmt: skip
        config = transformers.AutoConfig.for_model(kind, **{**sizes, **options})
        model = transformers.AutoModel.from_config(config, experts_implementation=implementation)
        return model.eval()  # type: ignore[no-any-return]

    return make


FAMILIES = {
    "mixtral": (family("mixtral", num_local_experts=4), 2),
    "qwen2_moe": (family("qwen2_moe", num_experts=4, shared_expert_intermediate_size=40), 2),
    "qwen3_moe": (family("qwen3_moe", num_experts=4), 2),
    "olmoe": (family("olmoe", num_experts=4), 2),
    "deepseek_v3": (
        family(
            "deepseek_v3", n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=1,
            q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        ),
        1,
    ),
    "gpt_oss": (family("gpt_oss", num_local_experts=4, sliding_window=8), 2),
}  # fmt: skip


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_moe_layer_of_a_model_is_found(name: str, implementation: str) -> None:
    make, expected = FAMILIES[name]
    model = make(implementation)
    ids = torch.arange(1, 13).view(2, 6)

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    program = captured(Hidden(), (ids,))
    before = run(program, (ids,))
    session: Session = apply(program, RULES, verify="off")
    assert session.log.recognized() == {"moe": expected}
    assert not session.log.refusals
    assert float((run(program, (ids,)) - before).norm()) <= 1e-6 * float(before.norm())
