"""What the lossy passes over attention share: finding their sites, building in front of a node, writing to the log.

Each pass is lossy, needs no training, and is in no default pipeline. A site is named by its place among the attentions
of the recognised program, in the order of the graph, which other rewrites leave alone.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, user_line
from regraft.ir.program import Program
from regraft.ir.records import Refusal
from regraft.passes.applied import log_applied
from regraft.passes.attention.errors import AttentionError
from regraft.passes.base import Pass
from regraft.passes.refused import Refused


def attentions(program: Program) -> list[fx.Node]:
    """The attentions of a recognised program, in the order of the graph."""
    return [node for node in program.graph.nodes if node.target is ops.attention]


def attention_at(program: Program, place: int) -> fx.Node:
    """The attention at a place. Raises ``AttentionError`` where there is none."""
    found = attentions(program)
    if not 0 <= place < len(found):
        raise AttentionError(f"attention {place} was asked for; the program has {len(found)}, numbered from 0")
    return found[place]


def builder(program: Program, before: fx.Node, source: fx.Node, name: str) -> Builder:
    """Builds nodes in front of ``before`` that carry the place in the user's code of ``source``."""

    def stamp() -> dict[str, Any]:
        kept = {key: source.meta.get(key) for key in ("stack_trace", "nn_module_stack")}
        return {**kept, "provenance": (*source.meta.get("provenance", ()), f"{name}({source.name})")}

    return Builder(program.graph, before, program.fake_mode, stamp)


def take_place(program: Program, old: fx.Node, new: fx.Node) -> None:
    """Give ``new`` the readers of ``old``, which goes."""
    old.replace_all_uses_with(new, lambda user: user is not new, propagate_meta=False)
    if not old.users:
        program.graph.erase_node(old)


def log_fired(session: Session, item: Pass, site: fx.Node, what: str) -> None:
    """Write one lossy rewrite down."""
    log_applied(session, item.name, Exactness.LOSSY, (site.name,), (what,), site)


def log_refused(session: Session, item: Pass, site: fx.Node, refused: Refused) -> None:
    """Write down why a site stays as it is."""
    at = refused.node if refused.node is not None else site
    session.log.of(item.name).refused += 1
    session.log.refusals.append(
        Refusal(item.name, item.name, "requirement", site.name, refused.reason, user_line(at), "attention")
    )
