"""The dims in front of an attention's queries and keys: however many there are, they become ``[batch, heads]``.

Operands broadcast to the scores as a matrix product broadcasts them: a query that all batches share, keys that frames
share, one head of values for all. The operator broadcasts nothing, but several heads may read one head of keys and
values. Of three dims either the last two become heads (grouped queries, videos) or the first two the batch, so that
each mask differs along dims of the operator's alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import Builder, rank, shape, size_equal, sizes_equal
from regraft.passes.recognize.scores import Addition, Condition, Refused

aten = torch.ops.aten


@dataclass(frozen=True)
class Leading:
    """``[batch, heads]`` of ``site``, the scores whose dims before the last two are those of the masks.

    ``into_batch``: of three such dims, whether the first two are the batch; else the last two are the heads.
    """

    site: fx.Node
    into_batch: bool = False

    def sizes(self, build: Builder) -> list[Any]:
        """Batch and heads, as arguments of a reshape: -1 stands for one that is no size of the site."""
        sizes = [build.size(self.site, dim) for dim in range(rank(self.site) - 2)]
        if len(sizes) == 1 and not isinstance(sizes[0], int):
            return [1, -1]
        return self._two(sizes)

    def check(self, node: fx.Node, within: fx.Node) -> None:
        """Raise ``Refused`` where ``node`` cannot be brought to batch and heads of the site; ``within`` is the product
        that reads it, whose leading dims it broadcasts to."""
        own, reached, wanted = (shape(one)[:-2] for one in (node, within, self.site))
        space = self._space(within)
        if space is self.site:
            return
        if space is not None:
            fits = len(wanted) == 2 and sizes_equal((reached[0], reached[1] * reached[2]), wanted)
        else:
            fits = size_equal(math.prod(reached), math.prod(wanted)) and (_is_one(own) or sizes_equal(own, reached))
        if not fits:
            raise Refused(f"{node.name} has other dims in front than the scores", node)

    def reaches(self, root: fx.Node) -> bool:
        """Whether the attention's output ``root`` has as many batches and heads as the site, and no more."""
        return size_equal(math.prod(shape(root)[:-2]), math.prod(shape(self.site)[:-2]))

    def heads_of(self, node: fx.Node, within: fx.Node) -> Any:
        """The heads that ``node`` has itself; -1 for as many as the site."""
        space = self._space(within)
        if space is None:
            return 1 if _is_one(shape(node)[:-2]) else -1
        own, reached = _filled(shape(node)[:-2], space), _filled(shape(space)[:-2], space)
        return reached[1] * own[2] if len(own) == 3 and not self.into_batch else own[-1]

    def placed(self, build: Builder, node: fx.Node, within: fx.Node, own_heads: bool = False) -> fx.Node:
        """``node`` as ``[batch, heads, length, size]``; ``own_heads``: with no more heads than it has itself."""
        space = self._space(within)
        if space is None:
            return _reshaped(build, node, [1, 1] if _is_one(shape(node)[:-2]) else self.sizes(build))
        if rank(space) == 3 and rank(node) == 3 and not isinstance(shape(space)[0], int):
            return _reshaped(build, node, [1, 1 if size_equal(shape(node)[0], 1) else -1])
        own = _filled(shape(node)[:-2], space)
        wanted = _filled([build.size(space, dim) for dim in range(rank(space) - 2)], space)
        if own_heads:
            wanted[-1] = own[-1] if isinstance(own[-1], int) else build.size(node, -3)
        if not sizes_equal(own, wanted):
            node = build.call(aten.expand.default, node, [*wanted, -1, -1])
        return _reshaped(build, node, self._two(wanted))

    def _space(self, within: fx.Node) -> fx.Node | None:
        """The node whose leading dims the operands of ``within`` are aligned with before they become two; None where
        one of them is batch and heads at once."""
        if _broadcasts(shape(within)[:-2], shape(self.site)[:-2]):
            return self.site
        return within if rank(within) == 5 else None

    def _two(self, sizes: list[Any]) -> list[Any]:
        if len(sizes) < 3:
            return [1] * (2 - len(sizes)) + sizes
        first, second, third = sizes
        if self.into_batch:
            return [_product(first, second), third]
        return [first, _product(second, third)]


def read_leading(site: fx.Node, maskings: Iterable[Addition | Condition]) -> Leading:
    """How the dims of ``site`` become batch and heads so that no mask differs along a dim that is gone. Raises
    ``Refused``."""
    sizes = shape(site)[:-2]
    if len(sizes) < 3:
        return Leading(site)
    masks = [shape(item.condition if isinstance(item, Condition) else item.node) for item in maskings]
    along_first = all(_is_one(mask[-4:-2]) for mask in masks)
    along_last = all(_is_one(mask[:-3]) for mask in masks)
    if not (along_first or along_last):
        raise Refused("a mask differs along the middle one of three leading dims, or along several", site)
    numbers = all(isinstance(size, int) for size in sizes[1:])
    return Leading(site, into_batch=along_last and not (along_first and numbers))


def _is_one(sizes: Sequence[Any]) -> bool:
    return all(size_equal(size, 1) for size in sizes)


def _broadcasts(sizes: Sequence[Any], to: Sequence[Any]) -> bool:
    if len(sizes) > len(to):
        return False
    pairs = zip(reversed(sizes), reversed(to), strict=False)
    return all(size_equal(size, 1) or size_equal(size, other) for size, other in pairs)


def _filled(sizes: Sequence[Any], space: fx.Node) -> list[Any]:
    """``sizes`` with ones in front: as many as ``space`` has leading dims, at least two."""
    return [1] * (max(2, rank(space) - 2) - len(sizes)) + list(sizes)


def _product(left: Any, right: Any) -> Any:
    return left * right if isinstance(left, int) and isinstance(right, int) else -1


def _reshaped(build: Builder, node: fx.Node, leading: list[Any]) -> fx.Node:
    """``node`` with these leading dims: itself, or what a reshape had flattened, where that has them."""
    for known in (node, node.args[0] if node.target is aten.reshape.default else None):
        if isinstance(known, fx.Node) and sizes_equal(shape(known), (*leading, *shape(node)[-2:])):
            return known
    return build.call(aten.reshape.default, node, [*leading, build.size(node, -2), build.size(node, -1)])
