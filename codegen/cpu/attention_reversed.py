"""Reversed attention on the CPU: log-sum-exps and the map of scores that reads them, both products of the same scores,
become one kernel that makes each score once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from regraft.codegen.cpu.context import Context
from regraft.codegen.cpu.native.kernels import REVERSED
from regraft.codegen.cpu.native_operators import reversed_native
from regraft.ir import ops
from regraft.ir.nodes import arguments, concrete, dtype, is_call, rank, shape, size_equal, sizes_equal

aten = torch.ops.aten

_MOST_KEYS = 1 << 14  # whose scores of a block of queries stay in the last cache
_WORTH_SHARING = 0.75  # of the threads that have a head to work on, at the end too


def lower_reversed(context: Context, given: dict[str, Any]) -> fx.Node | None:
    """One site of ``regraft::attention_mapped`` that is reversed attention without a mask; None for any other, and
    where there are too few heads for the threads, which the kernel shares out whole."""
    if not (_of_its_own_softmax(given) and _fits(given)) or REVERSED.missing():
        return None
    value, gates = _ungated(context, given["value"])
    operands = [context.value(node) for node in (given["key"], given["query"], value)]  # keys are the softmax's queries
    return context.call(reversed_native, *operands, gates, given["scale"], given["softcap"])


def _ungated(context: Context, value: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Values without what each whole row is multiplied with, and the product of these: the kernel divides rows."""
    gates: fx.Node | None = None
    while is_call(value, (aten.mul.Tensor,)) and len(value.users) == 1:
        operands = [x for x in value.args[:2] if isinstance(x, fx.Node)]
        gate = next((x for x in operands if _is_gate(x)), None)
        rows = next((x for x in operands if x is not gate), None)
        if gate is None or rows is None or not sizes_equal(shape(rows), shape(value)):
            break
        part = context.value(gate)
        gates = part if gates is None else context.call(aten.mul.Tensor, gates, part)
        value = rows
    return value, gates


def _is_gate(x: fx.Node) -> bool:
    return rank(x) == 4 and size_equal(shape(x)[3], 1) and dtype(x) == torch.float32


def _of_its_own_softmax(given: dict[str, Any]) -> bool:
    """Whether the weights are ``exp(s - lse)``, and the log-sum-exps those of the same scores, turned."""
    plain = given["weight"] == "exp" and given["normaliser"] == "none" and given["slopes"] is None
    lse = _negated(given["bias"])
    if not plain or given["mask"] != "all" or not is_call(lse, (ops.attention_lse,)):
        return False
    of = arguments(lse)
    bare = of["mask"] == "all" and all(of[name] is None for name in ("bias", "slopes", "sinks"))
    same = all(of[name] == given[name] for name in ("scale", "softcap"))
    return bare and same and of["query"] is given["key"] and of["key"] is given["query"]


def _negated(bias: Any) -> Any:
    """What a bias of one row for all queries is the negative of."""
    if (
        is_call(bias, (aten.unsqueeze.default,))
        and bias.args[1] in (2, -2)
        and is_call(bias.args[0], (aten.neg.default,))
    ):
        return bias.args[0].args[0]
    return None


def _fits(given: dict[str, Any]) -> bool:
    query, key, value = (shape(given[name]) for name in ("key", "query", "value"))
    heads = sizes_equal(query[:2], key[:2]) and sizes_equal(query[:2], value[:2])
    wide = all(dtype(given[name]) == torch.float32 for name in ("query", "key", "value"))
    if not (heads and wide) or concrete(key[2]) > _MOST_KEYS:
        return False
    tasks, threads = concrete(query[0]) * concrete(query[1]), torch.get_num_threads()
    return tasks >= _WORTH_SHARING * threads * -(-tasks // threads)
