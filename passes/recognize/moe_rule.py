"""What rules that recognise routed experts have in common: a site is read once, and refused by what the reading raises
or replaced by the operator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from regraft.ir.nodes import Builder
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize.moe_experts import Experts, Refused
from regraft.passes.recognize.moe_weights import emit


class RecognizeExperts(Rule, ABC):
    """Base of the rules whose sites become ``regraft::moe``."""

    recognizes = "moe"

    @abstractmethod
    def read(self, match: Match) -> Experts | None:
        """The experts that end in the match; None where no experts end. Raises ``Refused`` for those that the operator
        cannot express."""

    def check(self, match: Match) -> Iterator[Requirement]:
        try:
            match.facts["experts"] = self.read(match)
        except Refused as refused:
            yield need(False, refused.reason, refused.node)

    def replace(self, match: Match, build: Builder) -> Replacement:
        experts: Experts | None = match.facts["experts"]
        return None if experts is None else emit(build, match.root, experts, match.program)
