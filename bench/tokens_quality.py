"""Fidelity of every method to the unreduced model, beside its random baseline, at the same number of products.

Three trained models: the digits transformer (three trainings), MiniLM on prose (three sets of passages), and a byte
decoder that predicts what follows a prompt (three cuts of passages). A random baseline is drawn anew for each. What is
compared is the model with itself, not with labels.

Products count what a method itself costs: each removes as many tokens as it takes to leave as many products as ToMe
leaves, within one in a hundred. Where a bracket cannot come as far, its row says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.characters.model import texts as byte_texts
from bench.characters.model import trained as byte_decoder
from bench.digits.model import SEEDS, data, trained
from bench.models import minilm_encoder
from bench.topics import passages
from regraft.ir.capture import capture
from regraft.ir.cost import node_cost
from regraft.ir.driver import Session
from regraft.ir.nodes import shape
from regraft.ir.ops.matchings import ORDERED
from regraft.ir.program import Program
from regraft.passes.base import Pass
from regraft.passes.pipeline import recognising
from regraft.passes.tokens.bracket import BracketAttention
from regraft.passes.tokens.methods import METHODS
from regraft.passes.tokens.reduce import ReduceTokens
from regraft.passes.tokens.sites import attentions

_LENGTH, _WORDS, _DOCUMENTS, _NEIGHBOURS = 128, 100, 40, 10
_PROMPT, _CUTS = 192, (0, 32, 64)  # bytes of a prompt, and where it begins in its passage
_CLOSE = 0.01  # of the products that are to be left

Schedule = tuple[int, ...]
Make = Callable[[Schedule, int], Pass]
Figures = dict[str, float]


@dataclass(frozen=True)
class Variant:
    """A method as a pass made from a schedule and a seed, and the baseline that it must beat."""

    make: Make
    baseline: str


def _reduction(name: str) -> Make:
    return lambda schedule, seed: ReduceTokens(schedule, name, seed=seed)


def _baseline(name: str) -> str:
    method = METHODS[name]
    return "prune-random" if method.drops else "fuse-random" if method.matching == "fuse" else "merge-random"


VARIANTS: dict[str, Variant] = {
    **{name: Variant(_reduction(name), _baseline(name)) for name in METHODS},
    "bracket": Variant(lambda schedule, seed: BracketAttention(schedule), "bracket-random"),
    "bracket-random": Variant(lambda schedule, seed: BracketAttention(schedule, "random", seed), "bracket-random"),
}


#: What is compared in encoders, whose last token stands for nothing, and where no token may see later ones.
OF_ENCODERS = tuple(name for name in VARIANTS if name != "prune-last")
OF_PROMPTS = tuple(name for name in METHODS if METHODS[name].matching in ORDERED)


@dataclass(frozen=True)
class Setting:
    """One model with its inputs and what it computes, and how outputs are compared with that."""

    program: Program
    compare: Callable[[Tensor, Tensor], Figures]
    seed: int
    full: Tensor

    @classmethod
    def of(cls, model: nn.Module, given: Tensor, compare: Callable[[Tensor, Tensor], Figures], seed: int) -> Setting:
        """The setting of a model and its one input."""
        program = recognised(model, (given,))
        return cls(program, compare, seed, program.callable()(*program.example)[0])


def recognised(model: nn.Module, inputs: tuple[Tensor, ...]) -> Program:
    """The captured program up to the point where tokens are reduced."""
    program = capture(model.eval(), inputs)
    recognising().run(program, Session(verify="off"))
    return program


def digits() -> Iterator[Setting]:
    """The digits model on the images that it was not trained on, once a training."""
    images = data()[1].images
    for seed in SEEDS:
        yield Setting.of(trained(seed), images, compare_logits, seed)


def compare_logits(full: Tensor, reduced: Tensor) -> Figures:
    """KL divergence of the classes from the full model's, agreement on the first, cosine of the logits."""
    log_full, log_reduced = full.log_softmax(-1), reduced.log_softmax(-1)
    return {
        "kl": float(F.kl_div(log_reduced, log_full, reduction="batchmean", log_target=True)),
        "agreement": float((full.argmax(-1) == reduced.argmax(-1)).float().mean()),
        "cosine": float(F.cosine_similarity(full, reduced).mean()),
    }


class SentenceEncoder(nn.Module):
    """The mean of MiniLM's last states over tokens; every text has as many."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings ``[batch, 384]``."""
        found: Tensor = self.model(input_ids=input_ids).last_hidden_state.mean(1)
        return found


def texts() -> Iterator[Setting]:
    """MiniLM on three sets of passages, all cut to one length."""
    model, tokenizer = minilm_encoder()
    held = [ids for ids in tokenizer(passages(_WORDS))["input_ids"] if len(ids) > _LENGTH]
    for seed in range(3):
        part = held[seed * _DOCUMENTS : (seed + 1) * _DOCUMENTS]
        if len(part) < _DOCUMENTS:
            raise RuntimeError(f"there are {len(held)} passages of {_LENGTH} tokens, too few for three sets")
        ids = torch.tensor([[*row[: _LENGTH - 1], row[-1]] for row in part])
        yield Setting.of(SentenceEncoder(model), ids, compare_embeddings, seed)


def compare_embeddings(full: Tensor, reduced: Tensor) -> Figures:
    """Cosine of each embedding with the full model's, mean and least, and how many of the ten nearest stay."""
    full, reduced = F.normalize(full, dim=-1), F.normalize(reduced, dim=-1)
    cosine = (full * reduced).sum(-1)
    near = [(e @ e.T).fill_diagonal_(-2).topk(_NEIGHBOURS).indices for e in (full, reduced)]
    kept = (near[0][:, :, None] == near[1][:, None, :]).any(-1).float().mean()
    return {"cosine": float(cosine.mean()), "least_cosine": float(cosine.min()), "recall@10": float(kept)}


class NextByte(nn.Module):
    """The logits of what follows a prompt."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, 256]``."""
        found: Tensor = self.model(tokens)[:, -1]
        return found


def prompts() -> Iterator[Setting]:
    """The byte decoder on prompts from passages that it was not trained on, cut at three places."""
    rows = byte_texts()[1]
    for seed, start in enumerate(_CUTS):
        yield Setting.of(NextByte(byte_decoder()), rows[:, start : start + _PROMPT], compare_logits, seed)


@dataclass(frozen=True)
class Comparison:
    """A model's settings, the tokens that ToMe takes behind each layer, the figure by which methods are compared, and
    which are."""

    settings: Callable[[], Iterator[Setting]]
    removals: tuple[int, ...]
    decisive: str
    variants: tuple[str, ...]


MODELS: dict[str, Comparison] = {
    "digits": Comparison(digits, (8, 12), "kl", OF_ENCODERS),
    "minilm": Comparison(texts, (8, 16), "cosine", OF_ENCODERS),
    "characters": Comparison(prompts, (8, 16), "kl", OF_PROMPTS),
}
"""By name."""


def macs(program: Program) -> float:
    """Multiplications and additions of one run, in pairs."""
    return sum(node_cost(node).flops for node in program.graph.nodes if node.op == "call_function") / 2


def reduced(setting: Setting, variant: Variant, schedule: Schedule) -> Program:
    """The setting's program with fewer tokens; what a schedule asks for beyond what can go is left."""
    program = setting.program.copy()
    if not variant.make(schedule, setting.seed).run(program, Session(verify="off")):
        raise RuntimeError(f"nothing is reduced by {schedule}")
    return program


def even(total: int, layers: int) -> Schedule:
    """``total`` tokens over the layers, the first ones taking what is left over."""
    return tuple(total // layers + (layer < total % layers) for layer in range(layers))


def matched(setting: Setting, variant: Variant, target: float) -> Schedule:
    """The even schedule whose products come closest to ``target``; they fall as more tokens go."""
    sites = attentions(setting.program)
    layers, tokens = len(sites), int(shape(sites[0])[2])

    def left(total: int) -> float:
        return macs(reduced(setting, variant, even(total, layers)))

    fewest, most = 1, layers * (tokens // 2)
    while most - fewest > 1:
        middle = (fewest + most) // 2
        fewest, most = (middle, most) if left(middle) > target else (fewest, middle)
    return even(min((fewest, most), key=lambda total: abs(left(total) - target)), layers)


def run(setting: Setting, variant: Variant, schedule: Schedule) -> Figures:
    """Figures of one method on one setting, with the share of the full model's products that is left."""
    program = reduced(setting, variant, schedule)
    found = program.callable()(*program.example)[0]
    return {**setting.compare(setting.full, found), "macs": macs(program) / macs(setting.program)}


def measure(model: str) -> list[dict[str, Any]]:
    """A row for each method and removal by ToMe: mean and spread of its figures over the settings."""
    comparison = MODELS[model]
    settings, variants = list(comparison.settings()), {name: VARIANTS[name] for name in comparison.variants}
    first = settings[0]
    rows: list[dict[str, Any]] = []
    for remove in comparison.removals:
        layers = len(attentions(first.program))
        target = macs(reduced(first, VARIANTS["tome"], (remove,) * layers))
        schedules = {name: matched(first, variant, target) for name, variant in variants.items()}
        found = {
            name: [run(setting, variant, schedules[name]) for setting in settings] for name, variant in variants.items()
        }
        for name, variant in variants.items():
            row = {"model": model, "removed": remove, "method": name, "baseline": variant.baseline}
            row["schedule"] = schedules[name]
            row["figures"] = {key: summary([run[key] for run in found[name]]) for key in found[name][0]}
            share = target / macs(first.program)
            row["matched"] = abs(row["figures"]["macs"]["mean"] - share) <= _CLOSE * share
            row["beats_random"] = beats(found[name], found[variant.baseline], comparison.decisive)
            if "grid" in found:
                row["beats_grid"] = beats(found[name], found["grid"], comparison.decisive)
            rows.append(row)
    return rows


def summary(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation, and the values themselves."""
    return {"mean": mean(values), "deviation": stdev(values), "values": values}


def beats(own: list[Figures], other: list[Figures], decisive: str) -> bool:
    """Whether a method is better than another on average, by the decisive figure."""
    ours, theirs = (mean(run[decisive] for run in runs) for runs in (own, other))
    return ours < theirs if decisive == "kl" else ours > theirs


def recommended(rows: list[dict[str, Any]]) -> list[str]:
    """Methods that beat their random baseline on every model and removal that was measured."""
    names: Mapping[str, list[bool]] = {
        name: [row["beats_random"] for row in rows if row["method"] == name]
        for name, variant in VARIANTS.items()
        if "random" not in name and name != "grid"
    }
    return [name for name, wins in names.items() if wins and all(wins)]
