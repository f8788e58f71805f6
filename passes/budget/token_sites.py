"""What token reduction can do to one program: where tokens may go, by which methods, and how many at a time."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.ir.cost import node_cost
from regraft.ir.nodes import user_line
from regraft.ir.ops.plan_merge import most_removable
from regraft.ir.program import Program
from regraft.passes.budget.candidate import TOKENS, Candidate
from regraft.passes.refused import Refused
from regraft.passes.tokens.legality import Legality, examine, walks
from regraft.passes.tokens.methods import METHODS, Method
from regraft.passes.tokens.reduce import ReduceTokens
from regraft.passes.tokens.sites import Site

#: Parts of the tokens that may go at one layer.
_PARTS = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 5 / 32, 3 / 16, 7 / 32, 1 / 4, 5 / 16, 3 / 8, 7 / 16, 1 / 2)
_FEWEST = 8  # tokens of which removing some is worth a thought
SITE = "tokens"


@dataclass(frozen=True)
class TokenSites:
    """The token axis of one program. ``legal`` says of each method behind which self-attentions tokens may go;
    ``removals`` are the numbers that are offered, 0 first; ``protected`` tokens stay."""

    tokens: int
    protected: int
    legal: dict[str, tuple[bool, ...]]
    removals: tuple[int, ...]
    user_line: str

    @property
    def layers(self) -> int:
        """Number of self-attentions."""
        return len(next(iter(self.legal.values())))

    def most(self, method: str, left: int) -> int:
        """How many of ``left`` tokens a method can remove at once."""
        return most_removable(left, METHODS[method].matching, self.protected, 0)

    def is_possible(self, method: str, removed: tuple[int, ...]) -> bool:
        """Whether a schedule can be carried out as it is written."""
        left = self.tokens
        for number, legal in zip(removed, self.legal[method], strict=True):
            if number and (not legal or number > self.most(method, left)):
                return False
            left -= number
        return True

    def uniform(self, method: str, number: int) -> tuple[int, ...]:
        """``number`` tokens behind every layer that allows it; where those are too many, the most that is offered."""
        removed, left = [], self.tokens
        for legal in self.legal[method]:
            most = self.most(method, left) if legal else 0
            removed.append(number if number <= most else max(offer for offer in self.removals if offer <= most))
            left -= removed[-1]
        return tuple(removed)

    def candidate(self, method: str, removed: tuple[int, ...]) -> Candidate:
        """The schedule as a candidate."""
        knob = f"{method}, {'+'.join(map(str, removed))} of {self.tokens}"
        return Candidate(SITE, knob, ReduceTokens(removed, method), "tokens", TOKENS, self.user_line)


def is_baseline(method: Method) -> bool:
    """Whether a method looks at nothing: what others are compared with, and not offered."""
    return "random" in (method.metric, method.score) or method.matching == "grid"


def find_token_sites(program: Program) -> TokenSites:
    """The token axis of a recognised program: where it holds several sequences of tokens, the one on which most work
    hangs. Raises ``Refused`` where no method may remove a token anywhere."""
    refused: list[Refused] = []
    offered: list[tuple[float, TokenSites]] = []
    for found in walks(program):
        refused += [why for node, why in found.refused.items() if node in found.reached]
        if not found.sites:
            continue
        assert found.walk is not None
        first, inner = next(iter(found.sites.values())), _inner(found)
        if inner < _FEWEST:
            few = f"{inner} of {found.walk.tokens} tokens may go, and this begins at {_FEWEST}"
            refused += [Refused(few, first.anchor)] * len(found.sites)
        else:
            offered.append((_work(found, first), _of_walk(program, found)))
    if offered:
        return max(offered, key=lambda pair: pair[0])[1]
    raise _most_common(refused)


def _of_walk(program: Program, found: Legality) -> TokenSites:
    """The sites of one sequence of tokens, also for methods that drop what goes."""
    assert found.walk is not None
    first = next(iter(found.sites))
    dropped = examine(program, drops=True, start=found.attentions.index(first))
    allowed = {False: found.sites.keys(), True: dropped.sites.keys()}
    legal = {
        name: tuple(node in allowed[method.drops] for node in found.attentions)
        for name, method in METHODS.items()
        if not is_baseline(method) and allowed[method.drops]
    }
    inner, line = _inner(found), user_line(found.sites[first].anchor)
    removals = (0, *sorted({number for part in _PARTS if (number := round(inner * part)) > 0}))
    return TokenSites(found.walk.tokens, found.prefix + found.suffix, legal, removals, line)


def _inner(found: Legality) -> int:
    """How many tokens lie between those that stay."""
    assert found.walk is not None
    return found.walk.tokens - found.prefix - found.suffix


def _work(found: Legality, first: Site) -> float:
    """The floating-point operations that are fewer once tokens are gone behind ``first``."""
    heavy = (node for node, step in found.steps(first) if step.heavy and step.layout is not None)
    return sum(node_cost(node).flops for node in heavy)


def _most_common(refused: list[Refused]) -> Refused:
    """The reason of the most self-attentions; among equals that of the first."""
    if not refused:
        return Refused("no self-attention was recognised")
    reasons = [why.reason for why in refused]
    return max(refused, key=lambda why: reasons.count(why.reason))
