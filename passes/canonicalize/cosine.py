"""Cosine similarity as the norms, quotients, product and sum that PyTorch makes of it: a region of rows takes them
together."""

from __future__ import annotations

import torch
from torch import fx

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, dtype, rank, shape, sizes_equal
from regraft.passes.canonicalize.identity import identity

aten = torch.ops.aten


@identity(aten.cosine_similarity.default, exactness=Exactness.REASSOCIATED)
def cosine_written_out(node: fx.Node, build: Builder) -> fx.Node | None:
    """cosine(x, y) over the last dim is sum(x / max(|x|, eps) * y / max(|y|, eps))."""
    given = arguments(node)
    pair = [given["x1"], given["x2"]]
    kinds = {dtype(x) for x in pair}
    alike = len(kinds) == 1 and sizes_equal(shape(pair[0]), shape(pair[1])) and dtype(pair[0]).is_floating_point
    if not alike or given["dim"] not in (-1, rank(pair[0]) - 1):
        return None
    units = []
    for x in pair:
        length = build.call(aten.linalg_vector_norm.default, x, 2, [-1], True)
        units.append(build.call(aten.div.Tensor, x, build.call(aten.clamp_min.default, length, given["eps"])))
    return build.call(aten.sum.dim_IntList, build.call(aten.mul.Tensor, *units), [-1])


SPELLINGS = (cosine_written_out,)
