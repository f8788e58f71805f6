"""The order of nodes: what is said of tokens must be known where they are first changed."""

from __future__ import annotations

from torch import fx

from regraft.passes.refused import Refused


def move_behind(node: fx.Node, start: fx.Node) -> None:
    """Move what ``node`` needs, and ``node``, right behind ``start``, on which it does not depend. Raises
    ``Refused``."""
    place = after_inputs(start)
    pending, needed = [node], set[fx.Node]()
    while pending:
        current = pending.pop()
        if current is start:
            raise Refused("the padding mask is computed from the tokens", node)
        if current not in needed and current > place:
            needed.add(current)
            pending += current.all_input_nodes
    for current in sorted(needed):
        place.append(current)
        place = current


def after_inputs(node: fx.Node) -> fx.Node:
    """``node``, or the last input where it is an input: nothing may stand between those."""
    while node.next.op == "placeholder":
        node = node.next
    return node
