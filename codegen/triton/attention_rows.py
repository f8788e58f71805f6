"""Emitting the kernel of what a softmax over the keys knows of each row: log-sum-exp, or the largest score."""

from __future__ import annotations

from regraft.codegen.triton.attention_configs import score_configs
from regraft.codegen.triton.attention_loops import loops, ordering_lines
from regraft.codegen.triton.attention_parts import AttentionParts, common_facts
from regraft.codegen.triton.attention_prefill import strides
from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.emit import POINTER_KINDS, Entry, Kernel, Origin, Parameter, digest, header, render

_NAME = "attention_rows"
_TITLES = {"lse": "The log-sum-exp of each query's scores.", "largest": "The largest of each query's scores."}
LENGTHS = ("query_length", "key_length", "heads", "group")
TILES = ("BLOCK_M", "BLOCK_N")


def emit_rows(spec: AttentionSpec, gives: str = "lse", origins: tuple[Origin, ...] = ()) -> Kernel:
    """The kernel that gives "lse", sinks among its terms, or "largest"; its operands are those of an attention without
    values. Raises ``Unsupported`` where ``supports`` gives a reason."""
    parts = AttentionParts(spec, values=False)
    parameters = score_parameters(parts, gives)
    configs = score_configs(spec)
    body = render(
        "rows.py.j2",
        name=f"{_NAME}_@",
        gives=gives,
        configs=configs,
        kernel_arguments=[parameter.name for parameter in parameters],
        launch_values=[parts.launch_value(parameter.name) for parameter in parameters],
        **row_names(parts),
    )
    name = f"{_NAME}_{digest(body, 8)}"
    source = header(_TITLES[gives], common_facts(spec), origins) + body.replace(f"{_NAME}_@", name)
    return Kernel(name, source, (Entry(name, parameters, TILES, configs),), (*parts.tensors, *parts.numbers))


def row_names(parts: AttentionParts) -> dict[str, object]:
    """The names that the template of row statistics reads."""
    return {
        "unspecialized": parts.unspecialized(*LENGTHS),
        "ordering_lines": ordering_lines(len(parts.terms)),
        "loops": loops(len(parts.terms), whole_tiles=parts.exact),
        **parts.names(),
    }


def score_parameters(parts: AttentionParts, *results: str, kind: str = "*fp32") -> tuple[Parameter, ...]:
    """Query and key, the ``results``, and all that scores are made of."""
    element = POINTER_KINDS[parts.spec.dtype]
    found = [Parameter(name, element, aligned=True) for name in ("query", "key")]
    found += [Parameter(name, kind, aligned=True) for name in results]
    found += parts.operand_parameters()
    found += [Parameter(name, "i32") for name in LENGTHS]
    found += strides("query", "key")
    return (*found, *parts.operand_strides(), *parts.number_parameters())
