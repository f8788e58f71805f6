"""What token reduction can do to one program: where tokens may go, by which methods, and how many at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from regraft.ir.nodes import user_line
from regraft.ir.ops.plan_merge import most_removable
from regraft.ir.program import Program
from regraft.passes.budget.candidate import TOKENS, Candidate
from regraft.passes.refused import Refused
from regraft.passes.tokens.legality import Legality, examine, walks
from regraft.passes.tokens.methods import METHODS, Method
from regraft.passes.tokens.reduce import ReduceTokens

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
    """The token axis of a recognised program. Raises ``Refused`` where no method may remove a token anywhere."""
    place = next((walk.attentions.index(next(iter(walk.sites))) for walk in walks(program) if walk.sites), 0)
    found: dict[bool, Legality] = {drops: examine(program, 0, drops, start=place) for drops in (False, True)}
    legal = {
        name: tuple(node in found[method.drops].sites for node in found[method.drops].attentions)
        for name, method in METHODS.items()
        if not is_baseline(method) and found[method.drops].sites
    }
    if not legal:
        raise _why_nowhere(found[False])
    best = found[False] if found[False].sites else found[True]
    assert best.walk is not None
    tokens, protected = best.walk.tokens, best.prefix + best.suffix
    inner = tokens - protected
    if inner < _FEWEST:
        raise Refused(f"{inner} of {tokens} tokens may go, and this begins at {_FEWEST}", _first(best))
    removals = (0, *sorted({number for part in _PARTS if (number := round(inner * part)) > 0}))
    return TokenSites(tokens, protected, legal, removals, user_line(_first(best)))


def _why_nowhere(found: Legality) -> Refused:
    """The reason of the most self-attentions; among equals that of the first."""
    if not found.attentions:
        return Refused("no self-attention was recognised")
    reasons = [refused.reason for refused in found.refused.values()]
    return max(found.refused.values(), key=lambda refused: reasons.count(refused.reason))


def _first(found: Legality) -> fx.Node:
    return next(iter(found.sites.values())).anchor
