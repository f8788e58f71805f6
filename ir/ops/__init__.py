"""Semantic operators. Importing this package registers all of them under ``torch.ops.regraft``."""

from regraft.ir.ops.activation import activation
from regraft.ir.ops.add_norm import add_norm
from regraft.ir.ops.attention import attention
from regraft.ir.ops.attention_column_sums import attention_column_sums
from regraft.ir.ops.attention_lse import attention_lse, attention_max
from regraft.ir.ops.attention_mapped import attention_mapped
from regraft.ir.ops.attention_packed import attention_packed
from regraft.ir.ops.attention_part import attention_merge, attention_part
from regraft.ir.ops.attention_topk import attention_topk
from regraft.ir.ops.gather import gather
from regraft.ir.ops.glu import glu
from regraft.ir.ops.linear import linear
from regraft.ir.ops.linear_scan import linear_scan
from regraft.ir.ops.merge_tokens import merge_tokens
from regraft.ir.ops.moe import moe
from regraft.ir.ops.moe_combine import moe_combine
from regraft.ir.ops.moe_dispatch import moe_dispatch
from regraft.ir.ops.pack_tokens import pack_tokens
from regraft.ir.ops.plan_merge import plan_merge
from regraft.ir.ops.registry import OPERATORS, Cost, SemanticOperator
from regraft.ir.ops.rms_norm import rms_norm
from regraft.ir.ops.rope import rope
from regraft.ir.ops.select_keys import select_keys
from regraft.ir.ops.steer import steer
from regraft.ir.ops.token_scores import token_scores
from regraft.ir.ops.unmerge_tokens import unmerge_tokens

__all__ = [
    "OPERATORS",
    "Cost",
    "SemanticOperator",
    "activation",
    "add_norm",
    "attention",
    "attention_column_sums",
    "attention_lse",
    "attention_mapped",
    "attention_max",
    "attention_merge",
    "attention_packed",
    "attention_part",
    "attention_topk",
    "gather",
    "glu",
    "linear",
    "linear_scan",
    "merge_tokens",
    "moe",
    "moe_combine",
    "moe_dispatch",
    "pack_tokens",
    "plan_merge",
    "rms_norm",
    "rope",
    "select_keys",
    "steer",
    "token_scores",
    "unmerge_tokens",
]
