"""Attention on merged tokens inside a bracket: the stream keeps every token, equal tokens merge without a change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.ir import ops
from regraft.ir.driver import Fuel, Session
from regraft.passes.tokens.bracket import BracketAttention
from tests.passes.tokens.models import images, outputs, recognised, relative, texts, tiny
from tests.passes.tokens.test_legality import HEADS, TOKENS, WIDTH, Causal, Encoder, encoder, numbers
from tests.passes.tokens.test_reduce import MeanOfTokens


def bracketed(program: object, schedule: tuple[int, ...] | int = 3, **options: object) -> Session:
    session = Session(verify="off")
    BracketAttention(schedule, **options).run(program, session)  # type: ignore[arg-type]
    return session


@pytest.mark.parametrize("head", ["every token", "grid", "sorted", "mean"])
@pytest.mark.parametrize("post", [False, True])
def test_equal_tokens_merge_without_a_change_whatever_reads_the_stream(head: str, post: bool) -> None:
    pairs = numbers(2, TOKENS // 2, WIDTH).repeat_interleave(2, dim=1)
    program = encoder(head, [(post, False)] * 2, pairs)
    (before,) = outputs(program)
    assert bracketed(program, 4).log.of("bracket-attention").fired == 2
    assert relative(outputs(program)[0], before) <= 1e-12
    lengths = [node.args[0].meta["val"].shape[2] for node in program.graph.nodes if node.target is ops.attention]
    assert lengths == [TOKENS - 4] * 2


def test_attention_with_the_tokens_in_front_is_bracketed() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    pairs = numbers(3, TOKENS // 2, WIDTH).repeat_interleave(2, dim=1)
    program = recognised(encoder, (pairs,))
    (before,) = outputs(program)
    session = bracketed(program, 4)
    assert session.log.of("bracket-attention").fired == 2, session.log.refusals
    assert relative(outputs(program)[0], before) <= 1e-12


@pytest.mark.parametrize("kind", ["vit", "dinov2", "bert"])
def test_a_family_is_bracketed_and_what_differs_is_small_work_inside(kind: str) -> None:
    model = MeanOfTokens(tiny(kind)) if kind == "bert" else tiny(kind)
    given = texts() if kind == "bert" else images()
    program = recognised(model, given)
    before = outputs(program)
    assert bracketed(program).log.of("bracket-attention").fired == 3
    after = outputs(program)
    assert [value.shape for value in after] == [value.shape for value in before]
    assert all(0 < relative(new, old) < 1 for new, old in zip(after, before, strict=True))


def test_removing_nothing_leaves_the_program_as_it_is() -> None:
    program = encoder("every token")
    code = str(program.graph)
    assert not bracketed(program, 0).log.applications and str(program.graph) == code


def test_fuel_bounds_it_and_the_log_says_how_many_went() -> None:
    program = encoder("every token")
    session = Session(verify="off", fuel=Fuel(1))
    assert BracketAttention(5).run(program, session) == 1
    (entry,) = session.log.applications
    assert entry.new_nodes == (f"5 of {TOKENS} tokens",) and entry.exactness == "lossy"


def test_a_causal_attention_is_refused() -> None:
    program = recognised(Causal("every token").double(), (numbers(2, TOKENS, WIDTH),))
    code = str(program.graph)
    reasons = {item.reason.partition(" (")[0] for item in bracketed(program).log.refusals}
    assert reasons == {"a token put back would have seen later ones"} and str(program.graph) == code


def test_windows_are_refused() -> None:
    model = tiny("swin", image_size=32, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=4)
    program = recognised(model, {"pixel_values": torch.randn(2, 3, 32, 32)})
    code = str(program.graph)
    session = bracketed(program)
    assert not session.log.applications and str(program.graph) == code
    reasons = {item.reason.partition(" (")[0] for item in session.log.refusals}
    assert reasons and reasons <= {
        "the tokens are laid out on a grid or in windows",
        "the batch of the attention is made of windows or groups of the samples",
        "aten.roll.default stands between the attention and the residual sum",
    }


class Modulated(nn.Module):
    """A diffusion transformer's block: norms shifted and scaled, attention gated, by a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Encoder([(False, False)], "every token")
        self.condition = nn.Linear(4, 3 * WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.condition(condition)[:, None].chunk(3, -1)
        block = self.inner.blocks[0]
        x = x + gate * block.attend(block.first(x) * (1 + scale) + shift)
        return x + block.mlp(block.second(x))


def test_a_modulated_block_is_bracketed() -> None:
    pairs = numbers(2, TOKENS // 2, WIDTH).repeat_interleave(2, dim=1)
    program = recognised(Modulated().double(), (pairs, numbers(2, 4, seed=3)))
    (before,) = outputs(program)
    assert bracketed(program, 5).log.of("bracket-attention").fired == 1
    assert relative(outputs(program)[0], before) <= 1e-12


def test_a_mask_that_is_made_behind_the_tokens_is_known_where_they_merge() -> None:
    """Tokens that are inputs themselves, in front of the mask, and a mask that is computed once they are projected."""

    class Masked(Encoder):
        def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
            parts = self.blocks[0].projections(x).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            mask = hidden.logical_not()[:, None, None]
            x = x + F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2).flatten(2)
            return x.mean(1)

    hidden = torch.arange(TOKENS) >= torch.tensor([[TOKENS], [8]])
    x = numbers(2, TOKENS // 2, WIDTH).repeat_interleave(2, dim=1)
    program = recognised(Masked([(True, False)], "mean").double(), (x, hidden))
    (before,) = outputs(program)
    assert BracketAttention(3).run(program, Session(verify="off")) == 1
    assert relative(outputs(program)[0], before) <= 1e-12
