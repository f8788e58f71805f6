"""Emitting the decode kernel of attention: few queries against many keys (attention.md 3.2).

The queries of the heads that share keys are rows of one tile, and the keys are divided among programs. Each writes the
output of its part, not normalised, with the sum of weights and the row's maximum; a second kernel merges the parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from regraft.codegen.triton.archs import with_lines
from regraft.codegen.triton.attention_configs import Config, combine_configs, decode_configs
from regraft.codegen.triton.attention_layout import CONTIGUOUS, KeyLayout
from regraft.codegen.triton.attention_loops import loops, ordering_lines
from regraft.codegen.triton.attention_parts import AttentionParts, common_facts
from regraft.codegen.triton.attention_prefill import strides
from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.emit import POINTER_KINDS, Entry, Kernel, Origin, Parameter, digest, header, render

_TITLE = "Attention of few queries: the keys are divided among programs, and what these find is combined."
_NAME = "attention_decode"


def emit_decode(
    spec: AttentionSpec,
    layout: KeyLayout = CONTIGUOUS,
    origins: tuple[Origin, ...] = (),
    tiles: Mapping[str, Config] | None = None,
) -> Kernel:
    """The kernels for few queries; ``tiles`` of some architectures take the place of the default ones. Raises
    ``Unsupported`` where ``supports`` or the layout gives a reason."""
    parts = AttentionParts(spec, replace(layout, packs_heads=True))
    parameters, combine = _parameters(parts), _combine_parameters(parts)
    merging = combine_configs(spec.value_dim)
    configs = with_lines(decode_configs(spec), tiles or {})
    scanned = "query_length", "key_length", "kv_heads", "group", "splits", "row_count"
    indexed = layout.kind == "indexed"
    body = render(
        "decode.py.j2",
        name=f"{_NAME}_@",
        configs=configs,
        kernel_arguments=[parameter.name for parameter in parameters],
        launch_values=[parts.launch_value(parameter.name) for parameter in parameters],
        combine_arguments=[parameter.name for parameter in combine],
        combine_values=[parts.launch_value(parameter.name) for parameter in combine],
        combine_rows=merging["sm_80"][0],
        unspecialized=parts.unspecialized(
            *(name for name in (*scanned, "entries") if name in {parameter.name for parameter in parameters})
        ),
        ordering_lines=[] if indexed else ordering_lines(len(parts.terms)),
        loop_=loops(len(parts.terms), whole_tiles=False)[0],
        **parts.names(),
    )
    name = f"{_NAME}_{digest(body, 8)}"
    facts = common_facts(spec)
    facts["keys"] = layout.kind if layout.kind == "contiguous" else f"{layout.kind}, {layout.page_size} together"
    source = header(_TITLE, facts, origins) + body.replace(f"{_NAME}_@", name)
    entries = (
        Entry(name, parameters, ("BLOCK_M", "BLOCK_N"), configs),
        Entry(f"{name}_combine", combine, ("BLOCK_ROWS",), merging),
    )
    return Kernel(name, source, entries, (*parts.tensors, *parts.numbers))


def _parameters(parts: AttentionParts) -> tuple[Parameter, ...]:
    element, layout = POINTER_KINDS[parts.spec.dtype], parts.layout
    found = [Parameter(name, element, aligned=True) for name in ("query", "key", "value")]
    found += [Parameter(f"part_{name}", "*fp32", aligned=True) for name in parts.state]
    found += [Parameter(name, "*i32", aligned=True) for name in layout.tensors]
    found += parts.operand_parameters()
    lengths = ["query_length", *([] if layout.kind == "paged" else ["key_length"])]
    lengths += ["kv_heads", "group", "splits", "row_count", *(["entries"] if layout.kind == "indexed" else [])]
    found += [Parameter(name, "i32") for name in lengths]
    found += strides("query", "key", "value")
    if layout.kind != "contiguous":
        dims = ("batch", *layout.page_dims)
        found += [Parameter(f"pages_stride_{dim}", "i32", 1 if dim == "entry" else None) for dim in dims]
    return (*found, *parts.operand_strides(), *parts.number_parameters())


def _combine_parameters(parts: AttentionParts) -> tuple[Parameter, ...]:
    found = [Parameter(f"part_{name}", "*fp32", aligned=True) for name in parts.state]
    element = "*fp32" if parts.spec.wide else POINTER_KINDS[parts.spec.dtype]
    found.append(Parameter("out", element, aligned=True))
    if parts.spec.lse:
        found.append(Parameter("lse", "*fp32", aligned=True))
    if parts.spec.sinks:
        found.append(Parameter("sinks", "*fp32", aligned=True))
    found += [Parameter(name, "i32") for name in ("row_count", "query_length", "heads", "splits")]
    return (*found, *strides("out"))
