"""The catalogue: every kernel configuration that ``python -m bench.aot`` builds for every architecture.

A family of kernels enters its samples here, in ``FAMILIES``: a name, and a function that lists ``Sample``s (a file
``samples.py`` in the family's folder, ``attention_samples.py`` beside this one). What stands in the catalogue is built
for sm_80, sm_90, sm_100 and gfx942 with its default configuration, and shown in one table with the registers, shared
memory and spills of each. A sample is a kernel as a model asks for it: the shapes and options that its configurations
depend on, one of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from regraft.codegen.triton.attention_samples import attention_samples
from regraft.codegen.triton.attention_scores_samples import score_samples
from regraft.codegen.triton.emit import Kernel
from regraft.codegen.triton.gemm.samples import experts_samples, product_samples
from regraft.codegen.triton.rowwise.samples import rowwise_samples
from regraft.codegen.triton.tokens.samples import token_samples


@dataclass(frozen=True)
class Sample:
    """One line of the catalogue: what it is called in the table, and what emits it."""

    family: str
    name: str
    emit: Callable[[], Kernel]


#: Family -> its samples by name. A new family adds a line.
FAMILIES: dict[str, Callable[[], dict[str, Callable[[], Kernel]]]] = {
    "attention": attention_samples,
    "scores": score_samples,
    "rowwise": rowwise_samples,
    "product": product_samples,
    "experts": experts_samples,
    "tokens": token_samples,
}


def samples(family: str | None = None) -> Iterator[Sample]:
    """All samples, or those of one family, in order; raises ``KeyError`` for a family that is not there."""
    for name in [family] if family is not None else FAMILIES:
        for label, emit in FAMILIES[name]().items():
            yield Sample(name, label, emit)
