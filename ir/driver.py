"""Applying rules to a program: worklist, fuel, provenance, check and roll back.

Nodes are visited from the outputs towards the inputs, so that the largest pattern at a site is tried before a part
of it. A rule is tried only at operators its pattern can start with. Every application is checked before the old nodes
are replaced: a failing one is taken back by erasing the new nodes, and recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from regraft.ir.matcher import Matcher, Partial
from regraft.ir.nodes import Builder, has_effects, user_line
from regraft.ir.program import Program
from regraft.ir.records import Application, Log, Refusal
from regraft.ir.rule import Match, Rule
from regraft.ir.verify import Checked, Verdict, Verifier, check_shapes

_APPLICATIONS_PER_NODE = 20


class RewriteLoop(RuntimeError):
    """A set of rules kept rewriting the same graph without coming to an end."""


@dataclass
class Fuel:
    """How many more rule applications may be made; None means any number. Bisecting sets it."""

    left: int | None = None

    @property
    def empty(self) -> bool:
        """Whether no further application may be made."""
        return self.left is not None and self.left <= 0

    def burn(self) -> None:
        """Use one unit."""
        if self.left is not None:
            self.left -= 1


@dataclass
class Session:
    """What all passes of one compilation share."""

    log: Log = field(default_factory=Log)
    fuel: Fuel = field(default_factory=Fuel)
    #: "each": check numbers after every application; "final" and "off": only shapes and element types.
    verify: str = "each"
    #: What the program is lowered for: "cpu", "cuda", "cuda:sm_90".
    target: str = "cpu"
    #: Kernel decisions that were measured before (an artifact's ``tuning.jsonl``); the lowering measures none of these.
    tuning: bytes = b""
    #: Whether the lowering may measure what it finds no decision for on a GPU: not where an artifact is loaded.
    measures: bool = True
    #: Hears of each weight of the model that compiled code will not read, as soon as its packed copy is made.
    read_last: Callable[[Tensor], Any] | None = None
    #: What was checked so far, in all passes.
    checked: Checked = field(default_factory=Checked)
    applied: int = 0


@dataclass
class Driver:
    """Applies ``rules`` to ``program`` until none fires."""

    program: Program
    rules: Sequence[Rule]
    session: Session
    pass_name: str

    def __post_init__(self) -> None:
        self._by_target: dict[Any, list[Rule]] = {}
        for rule in self.rules:
            for target in rule.root_targets:
                self._by_target.setdefault(target, []).append(rule)
        self._verifier = Verifier(self.program, self.session.checked) if self.session.verify == "each" else None
        self._missed: dict[tuple[str, fx.Node], Refusal] = {}
        self._erased: set[fx.Node] = set()

    def run(self) -> int:
        """Apply until nothing changes; returns how many applications were made. Raises ``RewriteLoop``."""
        worklist = list(self.program.graph.nodes)
        pending = set(worklist)
        fired, limit = 0, _APPLICATIONS_PER_NODE * (len(worklist) + 10)
        while worklist:
            node = worklist.pop()
            pending.discard(node)
            if node in self._erased or node.op != "call_function":
                continue
            touched = self._try_rules(node)
            if touched is None:
                continue
            fired += 1
            if fired > limit:
                raise RewriteLoop(f"pass {self.pass_name} applied {fired} rewrites and did not come to an end")
            fresh = [n for n in touched if n not in self._erased and n not in pending]
            worklist += fresh
            pending |= set(fresh)
        self._record_misses()
        self.program.graph.lint()
        return fired

    def _try_rules(self, node: fx.Node) -> list[fx.Node] | None:
        for rule in self._by_target.get(node.target, ()):
            statistics = self.session.log.of(rule.name)
            statistics.tried += 1
            started = time.perf_counter()
            touched = self._try_rule_safely(rule, node)
            statistics.seconds += time.perf_counter() - started
            if touched is not None:
                statistics.fired += 1
                return touched
        return None

    def _try_rule_safely(self, rule: Rule, node: fx.Node) -> list[fx.Node] | None:
        """A rule that raises while it looks at a site has changed nothing: report it, and go on without it."""
        try:
            return self._try_rule(rule, node)
        except Exception as error:
            self.session.log.of(rule.name).rolled_back += 1
            self._miss(rule, node, "rolled back", f"{type(error).__name__}: {error}", node)
            return None

    def _try_rule(self, rule: Rule, node: fx.Node) -> list[fx.Node] | None:
        matcher = Matcher()
        for state in matcher.match(rule.compiled, node):
            match = Match(node, state, self.program)
            failed = next((r for r in rule.check(match) if not r.holds), None)
            if failed is None:
                return self._apply(rule, match)
            self._miss(rule, match.get(rule.landmark or "") or node, "requirement", failed.reason, failed.node)
            return None
        self._miss_partial(rule, node, matcher.nearest)
        return None

    def _apply(self, rule: Rule, match: Match) -> list[fx.Node] | None:
        root = match.root
        if self.session.fuel.empty:
            return None
        build = Builder(self.program.graph, root, self.program.fake_mode, lambda: self._stamp(rule, match))
        weights_before = self.program.weight_count()
        try:
            replaced = rule.replace(match, build)
            pairs = {root: replaced} if isinstance(replaced, fx.Node) else (replaced or {})
            verdict = self._check(rule, match, pairs, build) if pairs else Verdict(False)
        except Exception as error:  # a rule's own fault must not lose the model: undo, and report it
            pairs, verdict = {}, Verdict(False, f"{type(error).__name__}: {error}")
        if not pairs or not verdict.accepted:
            self._roll_back(build.made, weights_before)
            if verdict.reason:
                self.session.log.of(rule.name).rolled_back += 1
                self._miss(rule, root, "rolled back", verdict.reason, root)
            return None
        return self._commit(rule, match, pairs, build.made, verdict)

    def _check(self, rule: Rule, match: Match, pairs: dict[fx.Node, fx.Node], build: Builder) -> Verdict:
        reason = next((r for r in (check_shapes(old, new) for old, new in pairs.items()) if r), "")
        if reason or self._verifier is None:
            return Verdict(not reason, reason)
        rehearsed = rule.rehearsal(match, build)
        checked = pairs if rehearsed is None else {match.root: rehearsed}
        return self._verifier.check(checked, build.made, rule.exactness, rule.against_fp64)

    def _commit(
        self, rule: Rule, match: Match, pairs: dict[fx.Node, fx.Node], made: list[fx.Node], verdict: Verdict
    ) -> list[fx.Node]:
        users = [user for old in pairs for user in old.users]
        fresh = set(made)  # a new node may read an old one, be it only for its size
        for old, new in pairs.items():
            old.replace_all_uses_with(new, lambda user: user not in fresh, propagate_meta=False)
        inputs = {source for node in match.nodes for source in node.all_input_nodes}
        self._erase_dead([*pairs, *made])
        kept = [node for node in made if node not in self._erased]
        self.session.fuel.burn()
        self.session.applied += 1
        self.session.log.applications.append(
            Application(
                rule=rule.name,
                pass_name=self.pass_name,
                exactness=rule.exactness.value,
                number=self.session.applied,
                source_nodes=tuple(node.name for node in match.nodes),
                new_nodes=tuple(node.name for node in kept),
                user_line=user_line(match.root),
                recognizes=rule.recognizes,
                drift=verdict.drift,
                drift_fp64=verdict.drift_fp64,
                original_fp64=verdict.original_fp64,
                repeated=verdict.repeated,
            )
        )
        return [*inputs, *kept, *users]

    def _erase_dead(self, roots: Iterable[fx.Node]) -> None:
        pending = list(roots)
        replaced = set(pending)
        while pending:
            node = pending.pop()
            if node in self._erased or node.users or node.op != "call_function":
                continue
            if node not in replaced and has_effects(node):
                continue
            inputs = node.all_input_nodes
            self.program.graph.erase_node(node)
            self._erased.add(node)
            pending += inputs

    def _roll_back(self, made: list[fx.Node], weights_before: int) -> None:
        for node in reversed(made):
            self.program.graph.erase_node(node)
            self._erased.add(node)
        if self.program.weight_count() > weights_before:
            for placeholder in self.program.weight_placeholders()[weights_before:]:
                self.program.forget_weight(placeholder)

    def _stamp(self, rule: Rule, match: Match) -> dict[str, Any]:
        history = [line for node in match.nodes for line in node.meta.get("provenance", ())]
        entry = f"{rule.name}({', '.join(node.name for node in match.nodes)})"
        return {
            "stack_trace": match.root.meta.get("stack_trace"),
            "nn_module_stack": match.root.meta.get("nn_module_stack"),
            "provenance": tuple(dict.fromkeys([*history, entry])),
        }

    def _miss_partial(self, rule: Rule, node: fx.Node, nearest: Partial | None) -> None:
        if rule.landmark and nearest is not None and rule.landmark in nearest.state.bindings:
            site = nearest.state.bindings[rule.landmark]
            self._miss(rule, site, "pattern", nearest.reason, nearest.node)

    def _miss(self, rule: Rule, site: fx.Node, kind: str, reason: str, at: fx.Node | None) -> None:
        if kind != "rolled back" and rule.quiet:
            return
        where = user_line(at if at is not None and at.op == "call_function" else site)
        refusal = Refusal(rule.name, self.pass_name, kind, site.name, reason, where, rule.recognizes)
        known = self._missed.get((rule.name, site))
        if known is None or (known.kind == "pattern" and kind != "pattern"):
            self._missed[(rule.name, site)] = refusal

    def _record_misses(self) -> None:
        """Keep the refusals of sites that are still there: a site that fired after all is not refused."""
        for (rule_name, site), refusal in self._missed.items():
            if site not in self._erased:
                self.session.log.refusals.append(refusal)
                self.session.log.of(rule_name).refused += 1
