"""Emitting the kernels of attention's column sums: what each key receives from all queries (attention.md 3.1).

One pass finds the log-sum-exp of each row, in two parts. The other has query and key exchanged: a program holds a tile
of keys and goes over the queries that see some of them, in a fixed order, so that nothing is added atomically.
"""

from __future__ import annotations

from regraft.codegen.triton.attention_configs import score_configs
from regraft.codegen.triton.attention_parts import AttentionParts, common_facts
from regraft.codegen.triton.attention_rows import TILES, row_names, score_parameters
from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.emit import Entry, Kernel, Origin, digest, header, render
from regraft.ir.mask import Everything

_NAME = "attention_columns"
_TITLE = "The column sums of attention's weights: what each key receives from all queries."


def emit_columns(spec: AttentionSpec, origins: tuple[Origin, ...] = ()) -> Kernel:
    """The kernels; their operands are those of an attention without values. Raises ``Unsupported`` where ``supports``
    gives a reason."""
    parts = AttentionParts(spec, values=False)
    parameters = score_parameters(parts, "tops", "totals", "sums_of_keys")
    of_rows = score_parameters(parts, "tops", "totals")
    configs = score_configs(spec)
    body = render(
        "columns.py.j2",
        name=f"{_NAME}_@",
        configs=configs,
        skips=any(not isinstance(part, Everything) for term in parts.terms for part in term.bounds),
        kernel_arguments=[parameter.name for parameter in parameters],
        launch_values=[parts.launch_value(parameter.name) for parameter in parameters],
        row_arguments=[parameter.name for parameter in of_rows],
        row_values=[parts.launch_value(parameter.name) for parameter in of_rows],
        **row_names(parts),
    )
    name = f"{_NAME}_{digest(body, 8)}"
    source = header(_TITLE, common_facts(spec), origins) + body.replace(f"{_NAME}_@", name)
    entries = Entry(name, parameters, TILES, configs), Entry(f"{name}_rows", of_rows, TILES, configs)
    return Kernel(name, source, entries, (*parts.tensors, *parts.numbers))
