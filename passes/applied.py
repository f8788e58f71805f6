"""What a pass that rewrites without rules writes down of a rewrite: the driver does so for rules."""

from __future__ import annotations

from torch import fx

from regraft.ir.driver import Session
from regraft.ir.exactness import Exactness
from regraft.ir.nodes import user_line
from regraft.ir.records import Application


def log_applied(
    session: Session, name: str, exactness: Exactness, sources: tuple[str, ...], made: tuple[str, ...], at: fx.Node
) -> None:
    """Count one rewrite of the pass ``name``, burn its fuel, and record what became of which nodes, with the line of
    the user's that ``at`` comes from."""
    session.fuel.burn()
    session.applied += 1
    session.log.of(name).fired += 1
    session.log.applications.append(
        Application(
            rule=name,
            pass_name=name,
            exactness=exactness.value,
            number=session.applied,
            source_nodes=sources,
            new_nodes=made,
            user_line=user_line(at),
        )
    )
