"""``python -m bench.attention_quality``: what the lossy passes over attention keep of trained models, beside chance.

Two trained models: MiniLM on prose (bidirectional; real weights) and the byte decoder of ``bench.characters`` (causal).
Heads are profiled on some passages, and the reduced model is compared with itself unreduced on others: MiniLM by one
minus the cosine of mean embeddings, the decoder by the KL divergence of the next byte, in nats. Each pass stands beside
random choices of the same size, the mean of three draws: a window beside as many random keys a row and beside a run of
as many keys at a random place; dropped heads beside random heads; specialised heads beside the same kinds dealt out at
random within each layer; chosen keys beside random keys in the same layers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx

from bench.characters.model import texts as byte_texts
from bench.characters.model import trained
from bench.decoder import DecodeStep, caches
from bench.models import minilm_encoder
from bench.timing import write_record
from bench.tokens_quality import SentenceEncoder, recognised
from bench.topics import passages
from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.mask import parse, to_dense
from regraft.ir.nodes import arguments, shape
from regraft.ir.program import Program
from regraft.passes.attention.drop_heads import DropHeads
from regraft.passes.attention.lossy import attentions
from regraft.passes.attention.profile import profile_heads
from regraft.passes.attention.restrict import RestrictHeads
from regraft.passes.attention.specialise import GLOBAL, LOCAL, STREAMING, kinds_of
from regraft.passes.attention.tidal import TidalDecode
from regraft.passes.base import Pass

DRAWS = (0, 1, 2)
_SINKS = 1
_TOKENS, _WORDS, _TEXTS = 128, 100, 32
#: Changes the arguments of a call while a program runs: (how many-th of its kind, target, arguments) -> arguments.
Change = Callable[[int, Any, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """A model captured on passages to profile heads on, other passages, and how far outputs are apart."""

    name: str
    program: Program
    held_out: tuple[Tensor, ...]
    apart: Callable[[Tensor, Tensor], float]

    def loss(self, program: Program, change: Change | None = None) -> float:
        """How far a program's output on the other passages is from the unreduced model's."""
        wanted, given = (run(one, self.held_out, how) for one, how in ((self.program, None), (program, change)))
        return self.apart(wanted, given)

    def after(self, *passes: Pass) -> Program:
        """The program once the passes ran."""
        program, session = self.program.copy(), Session(verify="off")
        for item in passes:
            item.run(program, session)
        if session.log.refusals:
            raise RuntimeError(f"not reduced as asked: {session.log.refusals}")
        return program


@dataclass(frozen=True)
class Row:
    """One pass with one knob: its loss, and that of each kind of chance."""

    model: str
    method: str
    knob: str
    loss: float
    chance: dict[str, float]

    @property
    def beats(self) -> bool:
        """Whether it loses less than every kind of chance."""
        return all(self.loss < other for other in self.chance.values())


def run(program: Program, inputs: tuple[Tensor, ...], change: Change | None = None) -> Tensor:
    """The program's first output."""
    if change is None:
        found: Tensor = program.callable()(*inputs)[0]
        return found
    return _Changing(program, change).first_output(inputs)


class _Changing(fx.Interpreter):
    """Runs a program with other arguments of its attentions and selections of keys."""

    def __init__(self, program: Program, change: Change) -> None:
        program.module.recompile()
        super().__init__(program.module)
        self.program, self.change = program, change
        self.places = {node: place for place, node in enumerate(attentions(program))}

    def first_output(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The first output."""
        users = dict(zip((node.name for node in self.program.user_inputs()), inputs, strict=True))
        names = (
            (node, self.program.weight_name(node)) for node in self.program.graph.nodes if node.op == "placeholder"
        )
        held = [users[node.name] if name is None else self.program.weights.get(name) for node, name in names]
        with torch.no_grad():
            found: Tensor = self.run(*held)[0]
        return found

    def run_node(self, n: fx.Node) -> Any:
        if n.target not in (ops.attention, ops.select_keys):
            return super().run_node(n)
        given = fx.map_arg(arguments(n), lambda node: self.env[node])
        return n.target(**self.change(self.places.get(n, 0), n.target, given))  # type: ignore[operator]


def windows(setting: Setting, window: int) -> Row:
    """Sinks and a window for all heads."""
    sites = attentions(setting.program)
    narrow = setting.after(*(RestrictHeads(place, window, _SINKS) for place in range(len(sites))))
    before = [str(arguments(site)["mask"]) for site in sites]

    def as_many(draw: int, pick: Callable[[Tensor, Tensor, torch.Generator], Tensor]) -> float:
        generator = torch.Generator().manual_seed(draw)

        def change(place: int, target: Any, given: dict[str, Any]) -> dict[str, Any]:
            sizes = (*given["query"].shape[:3], given["key"].shape[2])
            masks = (to_dense(parse(text), given["mask_tensors"], *sizes) for text in (given["mask"], before[place]))
            kept, visible = (mask.expand(sizes)[:1] for mask in masks)
            seen = pick(visible, kept.sum(-1, keepdim=True), generator)
            return {**given, "mask": "dense(0)", "mask_tensors": [seen]}

        return setting.loss(narrow, change)

    chance = {
        "random keys": mean(as_many(draw, random_keys) for draw in DRAWS),
        "random place": mean(as_many(draw, random_run) for draw in DRAWS),
    }
    knob = f"window {window}, {_SINKS} sink"
    return Row(setting.name, "RestrictHeads", knob, setting.loss(narrow), chance)


def random_keys(visible: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
    """``count [..., 1]`` of the visible keys of each row, drawn at random."""
    order = torch.rand(visible.shape, generator=generator).masked_fill(~visible, 2.0)
    return order.argsort(-1).argsort(-1) < count


def random_run(visible: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
    """``count`` neighbouring visible keys of each row, from a random place; rows see a run from the first key on."""
    free = visible.sum(-1, keepdim=True) - count + 1
    start = (torch.rand(count.shape, generator=generator) * free).long()
    key = torch.arange(visible.shape[-1])
    return (key >= start) & (key < start + count)


def dropped(setting: Setting, count: int) -> Row:
    """The heads of each layer that give least, dropped."""
    heads = shape(attentions(setting.program)[0])[1]
    order = [sorted(range(heads), key=profile.norm.__getitem__) for profile in profile_heads(setting.program, 1, 0)]

    def loss(chosen: list[list[int]]) -> float:
        return setting.loss(setting.after(*(DropHeads(place, tuple(sorted(of))) for place, of in enumerate(chosen))))

    chance = mean(
        loss([torch.randperm(heads, generator=generator)[:count].tolist() for _ in order])
        for generator in map(torch.Generator().manual_seed, DRAWS)
    )
    own = loss([heads_of[:count] for heads_of in order])
    return Row(setting.name, "DropHeads", f"{count} of {heads} heads a layer", own, {"random heads": chance})


def specialised(setting: Setting, window: int, coverage: float) -> Row:
    """Local and streaming heads by their profile."""
    profiles = profile_heads(setting.program, window, _SINKS)
    kinds = [kinds_of(profile, coverage, 0.0) for profile in profiles]

    def loss(dealt: list[list[str]]) -> float:
        passes = []
        for place, of in enumerate(dealt):
            for kind, sinks in ((LOCAL, 0), (STREAMING, _SINKS)):
                chosen = tuple(head for head, found in enumerate(of) if found == kind)
                passes += [RestrictHeads(place, window, sinks, chosen)] if chosen else []
        return setting.loss(setting.after(*passes))

    def shuffled(draw: int) -> list[list[str]]:
        generator = torch.Generator().manual_seed(draw)
        return [[of[place] for place in torch.randperm(len(of), generator=generator)] for of in kinds]

    narrow = sum(kind != GLOBAL for of in kinds for kind in of)
    knob = f"window {window}, coverage {coverage:g}: {narrow} of {sum(map(len, kinds))} heads"
    chance = {"kinds dealt at random": mean(loss(shuffled(draw)) for draw in DRAWS)}
    return Row(setting.name, "SpecialiseHeads", knob, loss(kinds), chance)


def chosen_keys(setting: Setting, count: int) -> Row:
    """Keys that layer 1 chooses for those behind it."""
    program = setting.after(TidalDecode(count, 1))

    def chance(draw: int) -> float:
        generator = torch.Generator().manual_seed(draw)

        def change(place: int, target: Any, given: dict[str, Any]) -> dict[str, Any]:
            if target is not ops.select_keys:
                return given
            return {**given, "query": torch.randn(given["query"].shape, generator=generator)} | {
                "key": torch.randn(given["key"].shape, generator=generator)
            }

        return setting.loss(program, change)

    keys = shape(arguments(attentions(setting.program)[0])["key"])[2]
    found = {"random keys": mean(map(chance, DRAWS))}
    return Row(setting.name, "TidalDecode", f"{count} of {keys} keys", setting.loss(program), found)


def divergence(wanted: Tensor, given: Tensor) -> float:
    """KL divergence of the last dim's distributions, mean over the others, in nats."""
    both = (logits.double().log_softmax(-1).flatten(0, -2) for logits in (given, wanted))
    return float(F.kl_div(*both, reduction="batchmean", log_target=True))


def turned(wanted: Tensor, given: Tensor) -> float:
    """One minus the cosine of the last dim, mean over the others."""
    return 1 - float(F.cosine_similarity(wanted.double(), given.double(), dim=-1).mean())


def minilm() -> Setting:
    """MiniLM on passages cut to one length."""
    model, tokenizer = minilm_encoder()
    held = [
        ids[:_TOKENS]
        for ids in tokenizer(passages(_WORDS), truncation=True, max_length=_TOKENS)["input_ids"]
        if len(ids) >= _TOKENS
    ]
    first, rest = torch.tensor(held[:_TEXTS]), torch.tensor(held[_TEXTS : 2 * _TEXTS])
    return Setting("minilm", recognised(SentenceEncoder(model), (first,)), (rest,), turned)


def characters() -> Setting:
    """The byte decoder on passages that it was not trained on."""
    rows = byte_texts()[1][: 2 * _TEXTS]
    return Setting("characters", recognised(trained(), (rows[:_TEXTS],)), (rows[_TEXTS:],), divergence)


def steps() -> Setting:
    """One step of the byte decoder behind a passage."""
    model, rows = trained(), byte_texts()[1][: 2 * _TEXTS]
    with torch.no_grad():
        first, rest = ((part[:, -1:], *caches(model, part[:, :-1])) for part in (rows[:_TEXTS], rows[_TEXTS:]))
    return Setting("characters", recognised(DecodeStep(model), first), rest, divergence)


def rows() -> Iterator[Row]:
    """All measurements."""
    for setting in (minilm(), characters()):
        for window in (8, 32):
            yield windows(setting, window)
        heads = shape(attentions(setting.program)[0])[1]
        for count in (heads // 4, heads // 2):
            yield dropped(setting, count)
        for window, coverage in ((32, 0.7), (32, 0.9)):
            yield specialised(setting, window, coverage)
    for count in (16, 64):
        yield chosen_keys(steps(), count)


def show(found: list[Row]) -> Table:
    """Losses side by side."""
    table = Table(title="loss against the unreduced model: 1 - cosine (minilm), KL in nats (characters)")
    for column in ("model", "pass", "knob", "loss", "by chance", ""):
        table.add_column(column)
    for row in found:
        chance = ", ".join(f"{value:.2e} {name}" for name, value in row.chance.items())
        table.add_row(row.model, row.method, row.knob, f"{row.loss:.2e}", chance, "beats" if row.beats else "LOSES")
    return table


def main() -> int:
    """Measure, print and, with ``--json``, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="where to write the record")
    options = parser.parse_args()
    found = list(rows())
    Console(width=150).print(show(found))
    if options.json is not None:
        results = [{**asdict(row), "beats": row.beats} for row in found]
        write_record("attention_quality", {"draws": len(DRAWS), "rows": results}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
