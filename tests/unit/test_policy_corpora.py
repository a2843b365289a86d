"""Truth tables: every verdict of every corpus through the pure engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from portwright.policy.engine import Engine
from portwright.policy.rules import Direction, Flow
from tests.fix_policy import (
    CORPORA,
    CYCLONUS_SELF,
    CYCLONUS_VERDICTS,
    DATA,
    Step,
    corpus,
    cyclonus,
    cyclonus_policies,
    mismatches,
    states,
)


def step_mismatches(step: Step) -> tuple[int, int, list[str]]:
    """(verdicts, those of a pod to itself, the wrong ones) of a step of cyclonus.

    Its oracle holds policies against a pod's traffic to itself, which the specification exempts: there the
    stored bit is what the policies alone say, and the connection is allowed whatever it says.
    """
    engine = Engine(cyclonus_policies(step.policies), step.snapshot)
    wrong: list[str] = []
    own = index = 0
    for source in step.addresses:
        for destination in step.addresses:
            for protocol, port in step.ports:
                flow = Flow(
                    source=source, destination=destination, protocol=protocol, source_port=49_152, port=port
                )
                expected = step.expected[index] == "1"
                index += 1
                allowed = engine.connect(flow).allowed
                if source == destination:
                    own += 1
                    pod = engine.world.workload(source)
                    assert pod is not None
                    found = all(engine.judge(pod, side, flow).allowed for side in Direction)
                    if not allowed:
                        wrong.append(f"{step.title}: {source} does not reach itself")
                else:
                    found = allowed
                if found != expected:
                    wrong.append(f"{step.title}: {source} -> {destination} {protocol}/{port}: {expected}")
    assert index == len(step.expected)
    return index, own, wrong


def test_cyclonus(record_property: Callable[[str, object], None]) -> None:
    """All 124,884 verdicts of cyclonus' 230 cases are the engine's."""
    steps = [step_mismatches(step) for step in cyclonus()]
    verdicts, own = sum(step[0] for step in steps), sum(step[1] for step in steps)

    record_property("verdicts", verdicts)
    print(f"cyclonus: {verdicts} verdicts of {len(steps)} states, {own} of them of a pod to itself")
    assert [wrong for step in steps for wrong in step[2]][:10] == []
    assert (verdicts, own) == (CYCLONUS_VERDICTS, CYCLONUS_SELF)


@pytest.mark.parametrize("name", CORPORA)
def test_corpus(name: str, record_property: Callable[[str, object], None]) -> None:
    """Every verdict of a corpus of manifests is the engine's, each side's too where it is told."""
    verdicts = sum(len(state.asked) for state in states(name))

    record_property("verdicts", verdicts)
    print(f"{name}: {verdicts} verdicts of {len(states(name))} states")
    assert [wrong for state in states(name) for wrong in mismatches(state)][:10] == []
    assert verdicts >= CORPORA[name]


@pytest.mark.parametrize("name", CORPORA)
def test_no_manifest_is_lost(name: str) -> None:
    """Every file of a corpus belongs to a case, and no two cases share a name."""
    whole = corpus(name)
    used = {file for case in whole.cases for file in case.manifests}

    assert {path.name for path in (DATA / name).glob("*.yaml")} == used
    assert len({case.name for case in whole.cases}) == len(whole.cases)
    assert whole.source


def test_each_verdict_is_of_both_kinds() -> None:
    """No corpus could be passed by an engine that always allows, or never does."""
    for name in CORPORA:
        allowed = {row.allowed for state in states(name) for _, row in state.asked}
        assert allowed == {True, False}
