"""What a change of policy changes for host endpoints: the rows are what judge and engine say of packets."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest

from portwright.policy.change import Change, changes
from portwright.policy.engine import Engine
from portwright.policy.host import whatif
from portwright.policy.host.judge import Judge
from portwright.policy.host.rulings import Published, Way, flow_of
from portwright.policy.host.stages import EVERY, Bound, bind
from portwright.policy.host.whatif import Comparison, Hosts, Party, parties
from portwright.policy.labels import In
from portwright.policy.manifests.calico_hosts import HOST_INTERFACE
from portwright.policy.parties import ANY_OTHER
from portwright.policy.parties import State as Compiled
from portwright.policy.ranges import contains
from portwright.policy.rules import (
    TCP,
    UDP,
    Action,
    Endpoint,
    Flow,
    NamedPort,
    Policy,
    PolicySet,
    Rule,
    Snapshot,
    Traffic,
    Where,
)
from portwright.policy.services import service_of
from tests.netns.test_policy_hosts_fuzz import BEHIND, HOST, HOSTS, OTHERS, OUTSIDE, Dice
from tests.unit.test_host_judge import FORWARD, PRE_DNAT, UNTRACKED, host, policy, rule

State = tuple[PolicySet, Snapshot]
#: (source, target, service, the endpoint that routes it, becomes allowed)
Fact = tuple[str, str, int, str, bool]

#: Of an endpoint without addresses: nobody's.
FAR = {4: "192.0.2.200", 6: "2001:db8::200"}
#: No endpoint's.
WORLD = {4: ("198.51.100.50", "203.0.113.50", "9.9.9.9", OUTSIDE[4][0]), 6: ("2001:db8:113::50", "2600::1")}
SERVICES = sorted(
    {0 << 16 | p for p in (22, 79, 80, 81, 443, 1000, 8080)}
    | {1 << 16 | p for p in (53, 68, 80, 8081)}
    | {
        2 << 16 | 80,
        3 << 16 | 8 << 8,
        3 << 16 | 13 << 8 | 1,
        4 << 16 | 128 << 8,
        4 << 16 | 135 << 8,
        5 << 16 | 99,
    }
)
#: As the generated worlds' pod, but for what it calls its ports.
TWIN = msgspec.structs.replace(
    next(end for end in OTHERS if end.name == "pod"),
    name="twin",
    addresses=(BEHIND[4][1], BEHIND[6][1]),
    named_ports=(NamedPort("web", TCP, 81), NamedPort("dns", UDP, 8081)),
)
POD = Endpoint(name="web", namespace="shop", labels={"app": "web"}, addresses=("10.0.0.5", "fd00::5"))


def verdict(state: State, end: Endpoint | None, way: Way, flow: Flow) -> bool:
    """Whether an endpoint, and of what is routed the port's own policies, let a first packet pass."""
    if end is not None:
        judge = Judge(*state)
        if way is Way.ROUTED_IN:
            ruling = judge.forwarded(end, None, flow)
        elif way is Way.ROUTED_OUT:
            ruling = judge.forwarded(None, end, flow)
        else:
            ruling = judge.local(end, way.direction, flow)
        if not ruling.allowed:
            return False
    return way in {Way.RECEIVED, Way.SENT} or Engine(*state).connect(flow).allowed


def asked(party: Party) -> Iterator[tuple[Way, Flow]]:
    """Packets of every way by the party's interfaces."""
    for version, outside in WORLD.items():
        mine = (HOST if "near" in party.name else FAR)[version]
        for service in SERVICES:
            for theirs in outside:
                yield Way.RECEIVED, flow_of(theirs, mine, service)
                yield Way.SENT, flow_of(mine, theirs, service)
                for port in BEHIND[version]:
                    yield Way.ROUTED_IN, flow_of(theirs, port, service)
                    yield Way.ROUTED_OUT, flow_of(port, theirs, service)


def governs(states: Sequence[State], party: Party, way: Way) -> bool:
    """Whether a policy of what is routed selects the endpoint, in one of the states."""
    return any(
        any(Judge(*state).selecting(stage, end, way.direction) for stage in way.stages)
        for state, end in zip(states, party[1:], strict=True)
        if end is not None
    )


def by_judge(before: State, after: State, bound: tuple[Sequence[Bound], Sequence[Bound]]) -> set[Fact]:
    """What changes, packet by packet."""
    found: set[Fact] = set()
    for party in parties(*bound):
        routed = {way for way in (Way.ROUTED_IN, Way.ROUTED_OUT) if governs((before, after), party, way)}
        for way, flow in asked(party):
            local = way in {Way.RECEIVED, Way.SENT}
            if not local and way not in routed:
                continue
            was, becomes = verdict(before, party[1], way, flow), verdict(after, party[2], way, flow)
            if was != becomes:
                via = "" if local else party.name
                found.add((flow.source, flow.destination, service_of(flow), via, becomes))
    return found


class Names:
    """What rows of a party call an address: an endpoint's own, or that of the smallest net around it."""

    def __init__(self, before: State, after: State) -> None:
        states = tuple(Compiled(*state) for state in (before, after))
        self._comparison = Comparison(states[0], states[1])
        self._places: dict[tuple[str, int, bool], dict[str, str]] = {}

    def of(self, party: Party, address: str) -> set[str]:
        """One of these stands in a row that is about it."""
        version, is_own = (6 if ":" in address else 4), address in {*HOST.values(), *FAR.values()}
        known = self._places.get((party.name, version, is_own))
        if known is None:
            ask = self._comparison.own if is_own else self._comparison.world
            known = {place.address: place.name for place in ask(party, version)}
            self._places[party.name, version, is_own] = known
        name = known.get(address, "")
        if not name:
            nets = [n for n in map(net_in, known.values()) if n is not None and n.version == version]
            around = [n for n in nets if ipaddress.ip_address(address) in n]
            rest = party.name if is_own else ANY_OTHER
            name = str(max(around, key=lambda n: n.prefixlen)) if around else rest
            if around and is_own:
                return {f"{party.name} ({name})"}
        return {name, f"{name} ({address})"}


def net_in(name: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """The net that a name is, or has in brackets."""
    text = name.rsplit(" (", maxsplit=1)[-1].rstrip(")")
    return ipaddress.ip_network(text) if text[0] in "0123456789abcdef:" and "/" in text else None


def by_rows(
    before: State, after: State, bound: tuple[Sequence[Bound], Sequence[Bound]], rows: Sequence[Change]
) -> set[Fact]:
    """The same, read off the rows."""
    names, found = Names(before, after), set[Fact]()
    for party in parties(*bound):
        for way, flow in asked(party):
            via = party.name if way in {Way.ROUTED_IN, Way.ROUTED_OUT} else ""
            sources, targets = names.of(party, flow.source), names.of(party, flow.destination)
            found |= {
                (flow.source, flow.destination, service_of(flow), via, row.allowed)
                for row in rows
                if row.via == via
                and (6 if ":" in flow.source else 4) in row.families
                and contains(row.services, service_of(flow))
                and sources & set(row.sources)
                and targets & set(row.targets)
            }
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_rows_are_what_changes_packet_by_packet(seed: int) -> None:
    """Of generated policies: no packet of a kind that changes is in no row, and none in a row that does not;
    endpoints that come, go and stay."""
    dice = Dice(f"change {seed}")
    before, after = dice.world(), dice.world()
    kept = tuple(p for p in before.policies.policies if dice.chance(0.5))
    both = msgspec.structs.replace(after.policies, policies=(*kept, *after.policies.policies[:2]))
    ends: list[tuple[Endpoint, ...]] = [HOSTS, HOSTS[:1], HOSTS[1:], ()]
    bound = (bind(dice.one(tuple(ends)), {}), bind(HOSTS, {}))
    if dice.chance(0.3):
        bound = bound[::-1]
    snapshot = Snapshot(endpoints=(*before.snapshot.endpoints, TWIN))
    states = (before.policies, snapshot), (both, snapshot)
    found = changes(*states, hosts=Hosts(*bound), most_rows=10_000, most_names=10_000)
    assert found.counted
    of_hosts = [row for row in found.rows if row.via or any(is_host(n) for n in (*row.sources, *row.targets))]
    facts = by_judge(*states, bound)
    assert by_rows(*states, bound, of_hosts) == facts


def is_host(name: str) -> bool:
    """Whether it is a party of this node's."""
    return name.startswith("host/")


def for_host(name: str, *ingress: Rule, **fields: Any) -> Policy:
    """A policy that selects eth0's endpoint and no pod."""
    return policy(name, *ingress, subject=In(HOST_INTERFACE, frozenset({"eth0"})), **fields)


def told(before: PolicySet, after: PolicySet, *ends: Endpoint, new: bool = False) -> list[Change]:
    """The rows of a change for these endpoints, which were there before unless they are ``new``."""
    bound = bind(ends, {})
    snapshot = Snapshot(endpoints=(POD, *ends))
    rows = changes(
        (before, snapshot), (after, snapshot), hosts=Hosts(() if new else bound, bound), most_names=1000
    ).rows
    return list(rows)


def test_a_new_endpoint_closes_the_host_but_for_failsafes() -> None:
    """Both ways, told as a party of its own; ports are as before, as no policy is of what is routed."""
    nothing = PolicySet()
    rows = sorted(told(nothing, nothing, host(), new=True), key=lambda row: row.sources)
    assert [(row.sources, row.targets, row.allowed, row.via) for row in rows] == [
        ((ANY_OTHER,), ("host/eth0",), False, ""),
        (("host/eth0",), (ANY_OTHER,), False, ""),
    ]
    assert {(row.before, row.families) for row in rows} == {("no host endpoint", (4, 6))}
    assert [row.after for row in rows] == ["local ingress host-default", "local egress host-default"]
    assert not contains(rows[0].services, 22)
    assert contains(rows[0].services, 80)
    assert contains(rows[1].services, 22)


def test_what_decides_is_named_with_its_place() -> None:
    """The stage, direction, policy, rule, file and line; of a default the policies that asked for it."""
    here = Where("web.yaml", 7)
    allow = msgspec.structs.replace(rule(Action.ALLOW, 80), where=here)
    web = for_host("web", allow, where=Where("web.yaml", 3))
    [row] = told(PolicySet(), PolicySet(policies=(web,)), host())
    assert (row.allowed, row.before) == (True, "local ingress host-default")
    assert row.after == "local ingress web rule 1 web.yaml:7"
    [closed] = told(PolicySet(policies=(web,)), PolicySet(policies=(for_host("web", where=here),)), host())
    assert closed.after == "local ingress tier-default of default, by web web.yaml:7"


@pytest.mark.parametrize(
    ("flags", "stage"), [(FORWARD, "forward"), (PRE_DNAT, "pre-dnat"), (UNTRACKED, "untracked")]
)
def test_what_is_routed_to_a_port_is_told_by_the_endpoint_that_it_passes(
    flags: dict[str, bool], stage: str
) -> None:
    """Beside the port's own policies; only that what both allow comes through."""
    deny = for_host("deny", rule(Action.DENY, 80), rule(Action.ALLOW), **flags)
    rows = [r for r in told(PolicySet(), PolicySet(policies=(deny,)), host()) if r.via]
    assert [(r.sources, r.targets, r.via, r.services, r.allowed) for r in rows] == [
        ((ANY_OTHER,), ("shop/web",), "host/eth0", ((80, 81),), False)
    ]
    assert (rows[0].before, rows[0].after) == ("no policy", f"{stage} ingress deny rule 1")
    own = Policy(
        kind="NetworkPolicy",
        name="own",
        namespace="shop",
        tier="default",
        order=1000.0,
        subject=In("app", frozenset({"web"})),
        ingress=(),
    )
    closed = PolicySet(policies=(own,))
    assert [r for r in told(closed, PolicySet(policies=(own, deny)), host()) if r.via] == []


def test_a_named_port_is_what_its_pod_calls_so() -> None:
    """Two pods that differ in this alone are told apart."""
    ends = tuple(
        msgspec.structs.replace(
            POD, name=f"web{port}", addresses=(f"10.0.0.{port}",), named_ports=(NamedPort("web", TCP, port),)
        )
        for port in (80, 81)
    )
    named = Rule(action=Action.DENY, traffic=(Traffic(protocol=TCP, names=("web",)),))
    deny = for_host("deny", named, Rule(action=Action.ALLOW), **FORWARD)
    bound, snapshot = bind([host()], {}), Snapshot(endpoints=(*ends, host()))
    rows = changes(
        (PolicySet(), snapshot), (PolicySet(policies=(deny,)), snapshot), hosts=Hosts(bound, bound)
    ).rows
    assert {(row.targets, row.services) for row in rows if row.via} == {
        ((f"shop/web{port}",), ((port, port + 1),)) for port in (80, 81)
    }


def test_a_published_port_is_told_as_what_it_is_outside() -> None:
    """The row of the port names the service that it is published as; the host's own rows leave that out, at
    the addresses where it is published."""
    end = host("eth0", "eth0", "192.0.2.2", "2001:db8::2")
    bound, snapshot = bind([end], {}), Snapshot(endpoints=(POD, end))
    published = (Published("10.0.0.5", 80, "", 8080), Published("fd00::5", 80, "2001:db8::99", 8080))
    deny = for_host("deny", rule(Action.DENY, 8080), **PRE_DNAT)
    hosts = Hosts(bound, bound, published)
    rows = changes((PolicySet(), snapshot), (PolicySet(policies=(deny,)), snapshot), hosts=hosts).rows
    assert {(r.targets, r.via, r.services, r.families, r.after) for r in rows} == {
        (("shop/web",), "host/eth0 tcp 8080", ((80, 81),), (4,), "pre-dnat ingress deny rule 1"),
        (("shop/web",), "host/eth0", ((8080, 8081),), (4, 6), "pre-dnat ingress deny rule 1"),
    }
    opened = for_host("open", rule(Action.ALLOW, 8080))
    rows = changes((PolicySet(), snapshot), (PolicySet(policies=(opened,)), snapshot), hosts=hosts).rows
    assert [(r.targets, r.services, r.families) for r in rows] == [(("host/eth0",), ((8080, 8081),), (6,))]


def test_an_interface_that_another_endpoint_takes_over_is_compared_with_that() -> None:
    """One that was of all interfaces' endpoint is not taken for a new one."""
    every, eth = host("all", EVERY), host("eth0", "eth0")
    before, after = bind([every], {}), bind([every, eth], {})
    assert [
        (p.name, p.before and p.before.name, p.after and p.after.name) for p in parties(before, after)
    ] == [
        ("host/all", "all", "all"),
        ("host/eth0", "all", "eth0"),
    ]
    snapshot = Snapshot(endpoints=(every, eth))
    assert changes((PolicySet(), snapshot), (PolicySet(), snapshot), hosts=Hosts(before, after)).rows == ()


def test_too_much_to_look_at_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bounds the rows are a part."""
    monkeypatch.setattr(whatif, "MOST_PAIRS", 1)
    found = changes((PolicySet(), Snapshot()), (PolicySet(), Snapshot()), hosts=Hosts((), bind([host()], {})))
    assert not found.counted
