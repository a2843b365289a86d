"""The compiled tables decide what the engine decides, and by the same rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portwright.policy.compile import compile_policies
from portwright.policy.engine import Connection, Decision, Engine
from portwright.policy.labels import Has
from portwright.policy.rules import (
    Action,
    Endpoint,
    Flow,
    NamedPort,
    Peer,
    Policy,
    PolicySet,
    Rule,
    Snapshot,
    Tier,
    Traffic,
)
from portwright.policy.services import EPHEMERAL
from portwright.policy.tables import Answer, Compiled, Tables, Verdict
from tests.fix_policy import CORPORA, cyclonus, cyclonus_policies, states
from tests.fix_worlds import flows, policy_sets, snapshots

FLOWS = flows(EPHEMERAL, 80)


def of_engine(decision: Decision | None) -> tuple[object, ...] | None:
    """What a decision says, as a table can say it."""
    if decision is None:
        return None
    who = decision.policy.title if decision.policy else decision.implicit
    tier = decision.tier.name if decision.tier else ""
    return decision.allowed, str(who), decision.index, tier, bool(decision.logs)


def of_table(verdict: Verdict | None, compiled: Compiled) -> tuple[object, ...] | None:
    """What a verdict says."""
    if verdict is None:
        return None
    info = compiled.rules[verdict.rule]
    who = info.implicit or (f"{info.namespace}/{info.policy}" if info.namespace else info.policy)
    return verdict.allow, who, info.index, info.tier, verdict.log


def differs(compiled: Compiled, answer: Answer, connection: Connection) -> bool:
    """Whether tables and engine give different verdicts, rules or logs for either side."""
    return (
        answer.allowed != connection.allowed
        or of_table(answer.egress, compiled) != of_engine(connection.egress)
        or of_table(answer.ingress, compiled) != of_engine(connection.ingress)
    )


def wrong(policies: PolicySet, snapshot: Snapshot, asked: tuple[Flow, ...]) -> list[str]:
    """The first flow that the tables decide otherwise, told."""
    compiled = compile_policies(policies, snapshot)
    tables, engine = Tables(compiled), Engine(policies, snapshot)
    for flow in asked:
        answer, connection = tables.lookup(flow), engine.connect(flow)
        if differs(compiled, answer, connection):
            sides = [of_table(side, compiled) for side in (answer.egress, answer.ingress)]
            meant = [of_engine(side) for side in (connection.egress, connection.ingress)]
            return [f"{flow}: {sides} for {meant}"]
    return []


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(policies=policy_sets(), snapshot=snapshots(), data=st.data())
def test_tables_decide_as_the_engine(policies: PolicySet, snapshot: Snapshot, data: st.DataObject) -> None:
    """For any policies and world, both sides' verdict, rule and log of any flow are the engine's."""
    start = data.draw(st.integers(0, 2))
    assert wrong(policies, snapshot, FLOWS[start::3]) == []


@pytest.mark.parametrize("name", CORPORA)
def test_corpus_through_tables(name: str, record_property: Callable[[str, object], None]) -> None:
    """Every verdict of a corpus of manifests is that of the tables, by the rule that the engine names."""
    verdicts, found = 0, []
    for state in states(name):
        tables = Tables(compile_policies(state.policies, state.snapshot))
        for flow, row in state.asked:
            verdicts += 1
            if tables.lookup(flow).allowed != row.allowed:
                found.append(f"{state.title}: {row}")
        found += wrong(state.policies, state.snapshot, tuple(flow for flow, _ in state.asked))

    record_property("verdicts", verdicts)
    print(f"{name}: {verdicts} verdicts through the tables")
    assert found[:10] == []
    assert verdicts >= CORPORA[name]


def test_cyclonus_through_tables(record_property: Callable[[str, object], None]) -> None:
    """All of cyclonus' verdicts between two pods are those of the compiled tables."""
    verdicts, found = 0, []
    for step in cyclonus():
        tables = Tables(compile_policies(cyclonus_policies(step.policies), step.snapshot))
        expected = iter(step.expected)
        for source in step.addresses:
            for destination in step.addresses:
                for protocol, port in step.ports:
                    flow = Flow(source=source, destination=destination, protocol=protocol, port=port)
                    allowed = next(expected) == "1" or source == destination
                    verdicts += 1
                    if tables.lookup(flow).allowed != allowed:
                        found.append(f"{step.title}: {flow}")

    record_property("verdicts", verdicts)
    print(f"cyclonus: {verdicts} verdicts through the tables")
    assert found[:10] == []
    assert verdicts == 124_884


NAMED = Endpoint(
    name="named",
    labels={"a": "x"},
    addresses=("10.0.0.1", "fd00::1"),
    named_ports=(NamedPort("web", 6, 80), NamedPort("dns", 17, 53)),
)
OTHER = Endpoint(
    name="other", labels={"b": "x"}, addresses=("10.0.0.2", "fd00::2"), named_ports=(NamedPort("web", 6, 81),)
)
ON_NODE = Endpoint(name="on-node", labels={"a": "x"}, addresses=("10.0.0.3",), host_network=True)
WEB = Traffic(protocol=6, names=("web",))
TO_X = Peer(selector=Has("a"))
ALLOW, DENY, PASS, LOG = Action.ALLOW, Action.DENY, Action.PASS, Action.LOG


@pytest.mark.parametrize(
    "first",
    [
        (Rule(action=PASS),),
        (Rule(action=PASS, peers=(TO_X,)), Rule(action=ALLOW)),
        (Rule(action=LOG, peers=(TO_X,)), Rule(action=DENY, peers=(TO_X,)), Rule(action=ALLOW)),
        (Rule(action=LOG), Rule(action=LOG, traffic=(Traffic(protocol=6),)), Rule(action=ALLOW)),
        (Rule(action=DENY, traffic=(WEB,)), Rule(action=ALLOW)),
        (Rule(action=ALLOW, not_traffic=(WEB,)),),
        (Rule(action=DENY, not_traffic=(WEB,)), Rule(action=ALLOW)),
        (Rule(action=ALLOW, peers=(TO_X,), traffic=(Traffic(),), not_traffic=(WEB,)),),
        (Rule(action=ALLOW, traffic=(Traffic(ip_version=4),)),),
        (Rule(action=ALLOW, not_traffic=(Traffic(ip_version=6, protocol=17),)),),
        (Rule(action=ALLOW, local=Peer(nets=("10.0.0.0/8",))),),
        (Rule(action=ALLOW, local=Peer(selector=Has("b"))), Rule(action=DENY, peers=(TO_X,))),
        (Rule(action=ALLOW, traffic=(Traffic(protocol=6),)),),
        (Rule(action=ALLOW, peers=(Peer(not_nets=("0.0.0.0/0",)),)),),
        (Rule(action=ALLOW, peers=(Peer(not_nets=("::/0", "10.0.0.0/30")),)),),
        (
            Rule(
                action=ALLOW, peers=(Peer(nets=("10.0.0.0/8", "203.0.113.0/24"), not_nets=("10.0.0.2/31",)),)
            ),
        ),
        (Rule(action=ALLOW, peers=(Peer(nets=("0.0.0.0/0",), not_selector=Has("a")),)),),
        (Rule(action=ALLOW, peers=()), Rule(action=ALLOW, traffic=()), Rule(action=PASS, peers=(TO_X,))),
    ],
)
@pytest.mark.parametrize("default", [DENY, PASS])
def test_each_feature_decides_as_the_engine(first: tuple[Rule, ...], default: Action) -> None:
    """Every feature of a rule, alone and in a tier of either default with one behind it, is the engine's."""
    tiers = (Tier(name="one", order=1.0, default=default), Tier(name="two", order=2.0, default=DENY))
    last = (Rule(action=ALLOW, traffic=(Traffic(protocol=17),)),)
    policies = PolicySet(
        tiers=tiers,
        policies=(
            Policy(kind="Test", name="a", tier="one", order=1.0, ingress=first, egress=first),
            Policy(kind="Test", name="b", tier="two", order=1.0, ingress=last, egress=last),
        ),
    )

    assert wrong(policies, Snapshot(endpoints=(NAMED, OTHER, ON_NODE)), FLOWS) == []
