"""The canonical form, which every later pattern relies on. ``docs/canonical-form.md`` describes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.ir.rule import Rule
from regraft.passes.base import Pass, Pipeline, RulePass
from regraft.passes.canonicalize import (
    activations,
    arithmetic,
    casts,
    cosine,
    einsum,
    fused,
    products,
    prototypes,
    reductions,
    repeat,
    softmaxes,
    views,
    written,
)
from regraft.passes.canonicalize.cleanup import DropAssertions, DropDeadCode, MergeCommonSubexpressions


@dataclass(frozen=True)
class Spell(RulePass):
    """Every operator in its one canonical spelling; no dropout, which would part a softmax from a product."""

    rules: ClassVar[Sequence[Rule]] = (
        casts.dropout_in_eval,
        *views.SPELLINGS,
        *arithmetic.SPELLINGS,
        *cosine.SPELLINGS,
        einsum.einsum_of_pointwise,
    )


@dataclass(frozen=True)
class Simplify(RulePass):
    """Identities between canonical operators: casts and copies without effect, nested views, matrix products."""

    rules: ClassVar[Sequence[Rule]] = (
        *casts.SPELLINGS,
        *views.SPELLINGS,
        *views.SIMPLIFICATIONS,
        *arithmetic.SPELLINGS,
        *activations.SPELLINGS,
        *reductions.SPELLINGS,
        *products.SPELLINGS,
        *prototypes.SPELLINGS,
        *repeat.SPELLINGS,
        *softmaxes.SPELLINGS,
        *written.SPELLINGS,
        *fused.SPELLINGS,
    )


#: ``Spell`` comes first: a ``view`` must be a reshape before the copy that made it legal may go.
PASSES: tuple[Pass, ...] = (
    DropAssertions(),
    MergeCommonSubexpressions(),
    Spell(),
    Simplify(),
    MergeCommonSubexpressions(),
    DropDeadCode(),
)


def canonicalize(program: Program, session: Session) -> None:
    """Bring ``program`` into canonical form, in place."""
    Pipeline(PASSES).run(program, session)
