"""Every rule fires on its examples, agrees with what it replaces, and refuses its near misses with a reason.

The cases are gathered from the rules themselves: a new rule file brings its tests along.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import regraft.passes
from regraft.ir.capture import capture
from regraft.ir.exactness import REASSOCIATION_TOLERANCE, Exactness
from regraft.ir.probe import Pool, Probe, ProbeError
from regraft.ir.program import Program
from regraft.ir.rule import Example, Rule
from regraft.ir.verify import relative_l2
from tests.support import AsModule, apply, captured, run

#: Relative L2 error against an fp64 run that an example may have.
TOLERANCE = {**REASSOCIATION_TOLERANCE, torch.float32: 1e-5}


def modules() -> Iterator[ModuleType]:
    """Every module below ``regraft.passes``."""
    for found in pkgutil.walk_packages(regraft.passes.__path__, "regraft.passes."):
        yield importlib.import_module(found.name)


def rules_of(module: ModuleType) -> Iterator[Rule]:
    """Rules that a module defines: instances, and classes that need no options."""
    for value in vars(module).values():
        if isinstance(value, Rule):
            yield value
        elif inspect.isclass(value) and issubclass(value, Rule) and is_own_rule(value, module):
            yield value()


def is_own_rule(rule: type[Rule], module: ModuleType) -> bool:
    """Whether a class is a rule of this module that can be made without options."""
    own = rule.__module__ == module.__name__ and rule.pattern is not Rule.pattern
    return own and not required_options(rule)


def required_options(rule: type[Rule]) -> list[str]:
    """Constructor parameters without a default."""
    parameters = list(inspect.signature(rule).parameters.values())
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in named if p.default is p.empty]


ALL_RULES: dict[str, Rule] = {rule.name: rule for module in modules() for rule in rules_of(module)}


def cases(attribute: str) -> list[Any]:
    """One test case for each example or near miss of each rule."""
    return [
        pytest.param(rule, example, id=f"{rule.name}: {example.name}")
        for rule in ALL_RULES.values()
        for example in getattr(rule, attribute)
    ]


def program_of(rule: Rule, function: Callable[..., Any], args: tuple[Any, ...]) -> Program:
    """The example in the form that the rule sees: as captured for canonicalising rules, else canonical."""
    if ".canonicalize." in type(rule).__module__:
        return capture(AsModule(function).eval(), args)
    return captured(function, args)


def in_double(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """What the function gives in fp64, casts included; no rule has touched it.

    Where an operator knows no fp64, the function's own result takes its place.
    """
    program = capture(AsModule(function).eval(), args)
    probe = Probe(program, (), Pool(), program.example, double=True)
    try:
        values = probe.evaluate(program.output_node.all_input_nodes)
    except ProbeError:
        values = tree_leaves(function(*args))
    return [value for value in values if isinstance(value, Tensor)]


@pytest.mark.parametrize(("rule", "example"), cases("examples"))
def test_example_fires_and_agrees(rule: Rule, example: Example) -> None:
    function, args = example.make()
    program = program_of(rule, function, args)

    session = apply(program, [rule])

    refused = [refusal.reason for refusal in session.log.refusals]
    assert session.log.applications, f"did not fire: {refused}"
    assert session.log.of(rule.name).rolled_back == 0, refused
    if rule.exactness is not Exactness.LOSSY:
        outputs = [value for value in tree_leaves(run(program, args)) if isinstance(value, Tensor)]
        references = in_double(function, args)
        assert len(outputs) == len(references)
        for output, reference in zip(outputs, references, strict=True):
            assert relative_l2(output, reference) <= TOLERANCE.get(output.dtype, 0.0)


@pytest.mark.parametrize(("rule", "near_miss"), cases("near_misses"))
def test_near_miss_is_refused_with_its_reason(rule: Rule, near_miss: Example) -> None:
    program = program_of(rule, *near_miss.make())

    session = apply(program, [rule])

    assert near_miss.reason, "a near miss states the reason of its refusal"
    assert not session.log.applications
    reasons = [refusal.reason for refusal in session.log.refusals if refusal.rule == rule.name]
    assert any(near_miss.reason in reason for reason in reasons), reasons


@pytest.mark.parametrize("rule", [pytest.param(r, id=r.name) for r in ALL_RULES.values() if r.recognizes])
def test_rule_that_recognises_shows_examples(rule: Rule) -> None:
    assert rule.examples
    assert rule.near_misses or rule.landmark is None
