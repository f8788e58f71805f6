"""Emitting the prefill kernel of attention: one program a tile of queries (attention.md 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

from regraft.codegen.triton.archs import with_lines
from regraft.codegen.triton.attention_configs import Config, prefill_configs
from regraft.codegen.triton.attention_loops import loops, ordering_lines
from regraft.codegen.triton.attention_parts import STRIDED, AttentionParts, common_facts
from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.emit import POINTER_KINDS, Entry, Kernel, Origin, Parameter, digest, header, render

_TITLE = "Attention of many queries: one program a tile of them, over the tiles of keys that it sees."
_NAME = "attention_prefill"


def emit_prefill(
    spec: AttentionSpec, origins: tuple[Origin, ...] = (), tiles: Mapping[str, Config] | None = None
) -> Kernel:
    """The kernel for many queries; ``tiles`` of some architectures take the place of the default ones. Raises
    ``Unsupported`` where ``supports`` gives a reason."""
    parts = AttentionParts(spec)
    parameters = _parameters(parts)
    configs = with_lines(prefill_configs(spec), tiles or {})
    body = render(
        "prefill.py.j2",
        name=f"{_NAME}_@",
        configs=configs,
        kernel_arguments=[parameter.name for parameter in parameters],
        launch_values=[parts.launch_value(parameter.name) for parameter in parameters],
        unspecialized=parts.unspecialized("query_length", "key_length", "heads", "group"),
        ordering_lines=ordering_lines(len(parts.terms)),
        loops=loops(len(parts.terms), whole_tiles=parts.exact),
        **parts.names(),
    )
    name = f"{_NAME}_{digest(body, 8)}"
    source = header(_TITLE, common_facts(spec), origins) + body.replace(f"{_NAME}_@", name)
    entry = Entry(name, parameters, ("BLOCK_M", "BLOCK_N"), configs)
    return Kernel(name, source, (entry,), (*parts.tensors, *parts.numbers))


def _parameters(parts: AttentionParts) -> tuple[Parameter, ...]:
    element = POINTER_KINDS[parts.spec.dtype]
    found = [Parameter(name, element, aligned=True) for name in ("query", "key", "value")]
    found.append(Parameter("out", "*fp32" if parts.spec.wide else element, aligned=True))
    if parts.spec.lse:
        found.append(Parameter("lse", "*fp32", aligned=True))
    found += parts.operand_parameters()
    found += [Parameter(name, "i32") for name in ("query_length", "key_length", "heads", "group")]
    found += strides("query", "key", "value", "out")
    return (*found, *parts.operand_strides(), *parts.number_parameters())


def strides(*tensors: str) -> list[Parameter]:
    """Stride parameters of ``[batch, heads, rows, dim]`` tensors; a build is for rows in one piece."""
    return [
        Parameter(f"{tensor}_stride_{dim}", "i32", 1 if dim == "dim" else None, aligned=True)
        for tensor in tensors
        for dim in STRIDED
    ]
