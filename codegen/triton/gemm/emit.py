"""Emitting a matrix product with the row-wise regions before and behind it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx
from torch._subclasses import FakeTensorMode

from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.rowwise.expand import expand
from regraft.codegen.rowwise.operators import FLOATS
from regraft.codegen.triton.emit import Origin, render
from regraft.codegen.triton.gemm.configs import FEW_ROWS, few_configs, product_configs
from regraft.codegen.triton.gemm.text import ProductText
from regraft.codegen.triton.rowwise.emit import RegionKernel
from regraft.codegen.triton.rowwise.file import RegionFile
from regraft.ir.nodes import dtype

_NAME = "product"
_TITLE = "A matrix product with what its operand's rows and its result go through, one program a tile of the result."
_SIZES = ("BLOCK_M", "BLOCK_N", "BLOCK_K")


def emit_product(
    nodes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    fake_mode: FakeTensorMode,
    origins: tuple[Origin, ...] = (),
) -> RegionKernel:
    """The kernel for linear layers of one operand among row-wise calls, in topological order.

    Calls in front of the layers may reduce rows, calls behind them work on elements; weights are ``[out, in]``. Raises
    ``Unfusable`` with the reason where no kernel holds them.
    """
    made = expand(nodes, outputs, fake_mode)
    file = RegionFile(made)
    if not file.weights:
        raise Unfusable("there is no product")
    text = ProductText(file)
    kind = dtype(text.operand)
    if kind not in FLOATS:
        raise Unfusable(f"a product in {kind}")
    epilogue = text.epilogue()
    prologue = text.prologue()
    step = text.step()
    count = len(text.accumulators)
    tables = (product_configs(kind, count, text.operand.op != "placeholder"), few_configs(kind, count))
    body = render(
        "product.py.j2",
        name=f"{_NAME}_@",
        configs=tables[0],
        few=tables[1],
        few_rows=FEW_ROWS,
        sizes=_SIZES,
        columns=text.columns,
        accumulators=list(text.accumulators.values()),
        prologue="\n".join(prologue),
        step="\n".join(step),
        epilogue="\n".join(epilogue),
        first_operand=text.operand.name if text.operand.op == "placeholder" else file.reads[0].node.name,
        **file.common(text.body),
    )
    return RegionKernel(file.finish(_NAME, _TITLE, body, origins, _SIZES, *tables), tuple(made.inputs), tuple(outputs))
