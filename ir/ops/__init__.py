"""Semantic operators. Importing this package registers all of them under ``torch.ops.regraft``."""

from regraft.ir.ops.activation import activation
from regraft.ir.ops.add_norm import add_norm
from regraft.ir.ops.attention import attention
from regraft.ir.ops.glu import glu
from regraft.ir.ops.linear import linear
from regraft.ir.ops.moe import moe
from regraft.ir.ops.registry import OPERATORS, Cost, SemanticOperator
from regraft.ir.ops.rms_norm import rms_norm
from regraft.ir.ops.rope import rope

__all__ = [
    "OPERATORS",
    "Cost",
    "SemanticOperator",
    "activation",
    "add_norm",
    "attention",
    "glu",
    "linear",
    "moe",
    "rms_norm",
    "rope",
]
