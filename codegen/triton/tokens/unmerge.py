"""Emitting the kernel that gives every token the value of the one that it was merged into."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.triton.emit import (
    POINTER_KINDS,
    Entry,
    Kernel,
    Origin,
    Parameter,
    digest,
    dtype_name,
    header,
    render,
)
from regraft.codegen.triton.tokens.configs import unmerge_configs

_NAME = "token_unmerge"
_TITLE = "Every token gets the value of the one that it was merged into; zero where it was dropped."
_TILES = ("BLOCK_ROWS", "BLOCK_COLUMNS")


@dataclass(frozen=True)
class UnmergeSpec:
    """A ``regraft::unmerge_tokens`` to ``[batch, tokens, width]``; nothing is computed, so any element type will do."""

    dtype: torch.dtype
    width: int

    def __post_init__(self) -> None:
        if self.dtype not in POINTER_KINDS:
            raise Unfusable(f"tokens in {self.dtype} are put back by no kernel")


def emit_unmerge(spec: UnmergeSpec, origins: tuple[Origin, ...] = ()) -> Kernel:
    """The kernel; it takes ``x`` and ``slots`` and returns the tokens."""
    element = POINTER_KINDS[spec.dtype]
    parameters = (
        Parameter("x", element, aligned=True),
        Parameter("slots", "*i64", aligned=True),
        Parameter("out", element, aligned=True),
        Parameter("row_count", "i32"),
        Parameter("tokens", "i32"),
        Parameter("x_stride_batch", "i64"),
        Parameter("x_stride_token", "i32", aligned=spec.width % 16 == 0),
        Parameter("x_stride_column", "i32", 1),
        Parameter("slots_stride_batch", "i32"),
        Parameter("slots_stride_token", "i32", 1),
    )
    sizes = ("row_count", "tokens", "x_stride_batch", "slots_stride_batch")
    configs = unmerge_configs(spec.width)
    body = render(
        "unmerge_tokens.py.j2",
        name=f"{_NAME}_@",
        spec=spec,
        configs=configs,
        kernel_arguments=[parameter.name for parameter in parameters],
        unspecialized=[f'"{name}"' for name in sizes],
        parameters=["x: Tensor", "slots: Tensor"],
        arguments=["x", "slots"],
        outputs=["out"],
        returns="Tensor",
        fake="    batch, tokens = check(x, slots)\n    return x.new_empty((batch, tokens, WIDTH.value))",
    )
    body = re.sub(r"\n{4,}", "\n\n\n", body)
    name = f"{_NAME}_{digest(body, 8)}"
    facts = {"element": f"{dtype_name(spec.dtype)}, width {spec.width}"}
    source = header(_TITLE, facts, origins) + body.replace(f"{_NAME}_@", name)
    return Kernel(name, source, (Entry(name, parameters, _TILES, configs),), ("x", "slots"))
