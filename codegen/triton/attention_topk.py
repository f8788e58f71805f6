"""Emitting the kernel of the highest keys of each row, by scores before the softmax (attention.md 2.3).

Programs divide the keys of a tile of rows among them; each keeps the best that it has seen, scores and places in one
integer, and PyTorch's own selection chooses among what they kept. No score is in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from regraft.codegen.triton.attention_configs import topk_configs
from regraft.codegen.triton.attention_layout import CONTIGUOUS
from regraft.codegen.triton.attention_loops import loops, ordering_lines
from regraft.codegen.triton.attention_parts import AttentionParts, common_facts
from regraft.codegen.triton.attention_rows import LENGTHS, TILES, score_parameters
from regraft.codegen.triton.attention_spec import AttentionSpec, Unsupported
from regraft.codegen.triton.emit import Entry, Kernel, Origin, Parameter, digest, header, render

_NAME = "attention_topk"
_TITLE = "The keys with the highest scores of each row."
#: Keys that a program keeps of a row at most, by the bytes of an element, and heads that may choose together.
MOST_KEPT, MOST_SHARED = {2: 256, 4: 64}, 16


@dataclass(frozen=True)
class TopkSpec:
    """The ``count`` highest keys by the scores of an attention; ``shared``: the heads that share keys choose
    together."""

    scores: AttentionSpec
    count: int
    shared: bool = False

    @property
    def kept(self) -> int:
        """Keys that a program keeps of a row."""
        return max(16, 1 << (self.count - 1).bit_length())

    def refused(self) -> str | None:
        """Why no kernel is emitted, scores aside; None where one is."""
        most = MOST_KEPT.get(self.scores.dtype.itemsize, 0)
        if not 0 < self.count <= most:
            return f"{self.count} keys are selected by {self.scores.dtype}, and kernels keep 1 to {most}"
        if self.scores.mask_fill is not None:
            return "masked scores keep a value, and kernels select among what is seen"
        return None


def emit_topk(spec: TopkSpec, origins: tuple[Origin, ...] = ()) -> Kernel:
    """The kernel; its operands are those of an attention without values. Raises ``Unsupported``."""
    reason = spec.refused()
    if reason is not None:
        raise Unsupported(reason)
    parts = AttentionParts(spec.scores, replace(CONTIGUOUS, packs_heads=spec.shared), values=False)
    parameters = _parameters(parts)
    configs = topk_configs(spec.scores, spec.kept)
    body = render(
        "topk.py.j2",
        name=f"{_NAME}_@",
        count=spec.count,
        kept=spec.kept,
        shared=spec.shared,
        most_shared=MOST_SHARED,
        configs=configs,
        kernel_arguments=[parameter.name for parameter in parameters],
        launch_values=[parts.launch_value(parameter.name) for parameter in parameters],
        unspecialized=parts.unspecialized(*LENGTHS, "batches", "splits"),
        ordering_lines=ordering_lines(len(parts.terms)),
        loop_=loops(len(parts.terms), whole_tiles=False)[0],
        **parts.names(),
    )
    name = f"{_NAME}_{digest(body, 8)}"
    facts = common_facts(spec.scores) | {
        "keys": f"{spec.count}{' of all heads that share them' if spec.shared else ''}"
    }
    source = header(_TITLE, facts, origins) + body.replace(f"{_NAME}_@", name)
    return Kernel(name, source, (Entry(name, parameters, TILES, configs),), (*parts.tensors, *parts.numbers))


def _parameters(parts: AttentionParts) -> tuple[Parameter, ...]:
    found = score_parameters(parts, "parts", kind="*i64")
    return (*found, Parameter("batches", "i32"), Parameter("splits", "i32"))
