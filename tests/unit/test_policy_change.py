"""What a change of policy changes: the rows are what the engine says of every pair, before and after."""

from __future__ import annotations

import ipaddress
from functools import partial

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from portwright.policy.change import changes
from portwright.policy.engine import Connection, Decision, Engine
from portwright.policy.labels import In
from portwright.policy.parties import ANY_OTHER, State, free_places
from portwright.policy.ranges import Ranges, contains
from portwright.policy.rules import (
    TCP,
    Action,
    Endpoint,
    Flow,
    Peer,
    Policy,
    PolicySet,
    PortRange,
    Rule,
    Snapshot,
    Traffic,
    Where,
)
from portwright.policy.selection import is_workload
from portwright.policy.services import EPHEMERAL, FIRST_PACKETS, service_of, services_text
from tests.fix_policy import CORPORA, cyclonus, cyclonus_policies, states
from tests.fix_worlds import flows, policy_sets, snapshots

World = tuple[PolicySet, Snapshot]
#: (source, destination, service, becomes allowed, rule before, rule after)
Fact = tuple[str, str, int, bool, str, str]

FLOWS = tuple(flow for flow in flows(EPHEMERAL) if service_of(flow) < FIRST_PACKETS)


def decided(side: Decision) -> str:
    """One side's decision, as a row tells it."""
    if side.policy is not None and side.rule is not None and side.index is not None:
        where = f" {side.rule.where}" if str(side.rule.where) else ""
        return f"{side.direction} {side.policy.title} rule {side.index + 1}{where}"
    if side.tier is None:
        return f"{side.direction} {side.implicit}"
    first, *more = (policy for policy in side.selected_by if policy.tier == side.tier.name)
    where = f" {first.where}" if str(first.where) else ""
    others = f" and {len(more)} more" if more else ""
    return f"{side.direction} {side.implicit} of {side.tier.name}, by {first.title}{where}{others}"


def deciding(found: Connection) -> str:
    """What decided a connection: who denies it, else who had something to say."""
    sides = [side for side in (found.egress, found.ingress) if side is not None]
    denied = [decided(side) for side in sides if not side.allowed]
    spoken = [decided(side) for side in sides if side.implicit != "no-policy"]
    return "; ".join(denied or spoken) or "no policy"


def by_engine(before: World, after: World, asked: tuple[Flow, ...]) -> set[Fact]:
    """What changes, flow by flow, but for the traffic of an endpoint to itself."""
    old, new = Engine(*before), Engine(*after)
    found: set[Fact] = set()
    for flow in between_two(asked, before, after):
        was, becomes = old.connect(flow), new.connect(flow)
        if was.allowed != becomes.allowed:
            told = (becomes.allowed, deciding(was), deciding(becomes))
            found.add((flow.source, flow.destination, service_of(flow), *told))
    return found


def between_two(asked: tuple[Flow, ...], before: World, after: World) -> list[Flow]:
    """Those that are not of an endpoint to itself."""
    addresses = {address for flow in asked for address in (flow.source, flow.destination)}
    owner = {address: whose(address, before, after) for address in addresses}
    return [flow for flow in asked if owner[flow.source] != owner[flow.destination]]


def whose(address: str, before: World, after: World) -> str:
    """The title of the workload that has an address, afterwards or else before; or the address."""
    for _, snapshot in (after, before):
        for endpoint in snapshot.endpoints:
            if is_workload(endpoint) and address in endpoint.addresses:
                return endpoint.title
    return address


class Names:
    """What a row calls an address."""

    def __init__(self, before: World, after: World) -> None:
        self._worlds = before, after
        self._states = [State(*before), State(*after)]
        nets = {net for state in self._states for net in state.compiled.prefixes}
        self._nets = [ipaddress.ip_network(net) for net in (*nets, "0.0.0.0/0", "::/0")]

    def of(self, address: str) -> set[str]:
        """One of these stands in a row that is about it."""
        title = whose(address, *self._worlds)
        if title != address:
            return {title, f"{title} ({address})"}
        for _, snapshot in self._worlds[::-1]:
            # A node and a host endpoint may share an address; either names it.
            ends = [e for e in snapshot.endpoints if address in e.addresses and not e.host_network]
            if ends:
                names = {f"{end.kind}{'/' if end.kind == 'host' else ' '}{end.title}" for end in ends}
                return {f"{name}{more}" for name in names for more in ("", f" ({address})")}
        if any(address in state.compiled.addresses for state in self._states):
            return {address}
        around = [net for net in self._nets if ipaddress.ip_address(address) in net]
        nearest = max(around, key=lambda net: net.prefixlen)
        return {ANY_OTHER if nearest.prefixlen == 0 else str(nearest)}


def by_rows(before: World, after: World, asked: tuple[Flow, ...]) -> set[Fact]:
    """The same, read off the rows."""
    found = changes(before, after, most_rows=1 << 30, most_names=1 << 30)
    assert (found.more_rows, found.more_pairs, found.counted) == (0, 0, True)
    names = Names(before, after)
    known = {address: names.of(address) for flow in asked for address in (flow.source, flow.destination)}
    facts: set[Fact] = set()
    of_pair: dict[tuple[str, str], list[Flow]] = {}
    for flow in between_two(asked, before, after):
        of_pair.setdefault((flow.source, flow.destination), []).append(flow)
    told = [(row, set(row.sources), set(row.targets)) for row in found.rows]
    for (source, destination), those in of_pair.items():
        version = 6 if ":" in source else 4
        for row, sources, targets in told:
            if version in row.families and known[source] & sources and known[destination] & targets:
                services = filter(partial(contains, row.services), map(service_of, those))
                facts |= {(source, destination, s, row.allowed, row.before, row.after) for s in services}
    return facts


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(before=policy_sets(), after=policy_sets(), world=snapshots())
def test_rows_are_what_the_engine_says(before: PolicySet, after: PolicySet, world: Snapshot) -> None:
    """For any two sets of policies, each change of a verdict is in a row with both rules, and no other is."""
    assert by_rows((before, world), (after, world), FLOWS) == by_engine(
        (before, world), (after, world), FLOWS
    )


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(policies=policy_sets(), old=snapshots(), new=snapshots())
def test_a_change_of_the_world_is_one_too(policies: PolicySet, old: Snapshot, new: Snapshot) -> None:
    """Labels, endpoints and addresses that come, change and go are compared address by address."""
    assert by_rows((policies, old), (policies, new), FLOWS) == by_engine(
        (policies, old), (policies, new), FLOWS
    )


def every_pair(addresses: set[str], services: set[tuple[int, int]]) -> tuple[Flow, ...]:
    """Every two addresses of a family, on every service: (protocol, port)."""
    return tuple(
        Flow(source=source, destination=destination, protocol=protocol, source_port=EPHEMERAL, port=port)
        for source in sorted(addresses)
        for destination in sorted(addresses)
        if (":" in source) == (":" in destination)
        for protocol, port in sorted(services)
    )


@pytest.mark.parametrize("name", CORPORA)
def test_corpora(name: str) -> None:
    """From one state of a corpus to the next, and from no policy to the first: all pairs of its addresses."""
    compared, before = 0, None
    for state in states(name):
        after: World = (state.policies, state.snapshot)
        before = before or (PolicySet(tiers=state.policies.tiers), state.snapshot)
        addresses = {a for e in state.snapshot.endpoints for a in e.addresses}
        addresses |= {address for flow, _ in state.asked for address in (flow.source, flow.destination)}
        services = {(flow.protocol, flow.port) for flow, _ in state.asked if flow.port is not None}
        asked = every_pair(addresses, {*sorted(services)[:6]})
        assert by_rows(before, after, asked) == by_engine(before, after, asked), state.title
        compared, before = compared + len(asked), after
    print(f"{name}: {compared} flows compared")
    assert compared > 1500


def test_cyclonus() -> None:
    """The same of cyclonus' states, whose policies differ most in peers and ports."""
    steps = cyclonus()[::2]
    before: World = (PolicySet(), steps[0].snapshot)
    for step in steps:
        after = (cyclonus_policies(step.policies), step.snapshot)
        asked = every_pair(set(step.addresses), set(step.ports))
        assert by_rows(before, after, asked) == by_engine(before, after, asked), step.title
        before = after


def pod(name: str, *addresses: str, **labels: str) -> Endpoint:
    """A pod of namespace shop."""
    return Endpoint(name=name, namespace="shop", labels=labels, addresses=addresses)


def allow(name: str, to: str, *peers: Peer, ports: tuple[int, ...] = ()) -> Policy:
    """Ingress for pods with role=``to``."""
    traffic = tuple(Traffic(protocol=TCP, ports=(PortRange(port, port),)) for port in ports) or None
    return Policy(
        kind="NetworkPolicy",
        name=name,
        namespace="shop",
        tier="default",
        order=1000.0,
        subject=In("role", frozenset({to})),
        ingress=(Rule(action=Action.ALLOW, peers=peers, traffic=traffic, where=Where("f.yaml", 9)),),
        where=Where("f.yaml", 1),
    )


WEBS = tuple(pod(f"web-{n}", f"10.0.0.{n}", role="web") for n in range(1, 101))
DBS = tuple(pod(f"db-{n}", f"10.0.1.{n}", role="db") for n in range(1, 4))


def test_equal_endpoints_are_one_row() -> None:
    """A hundred pods of the same labels make one row, and so does the world but for the nets of rules; a row
    names the first, counts the others, and no pod is paired with itself."""
    world = Snapshot(endpoints=(*WEBS, *DBS))
    peers = (Peer(nets=("192.0.2.0/24",)), Peer(selector=In("role", frozenset({"web"}))))
    policies = PolicySet(policies=(allow("db", "db", *peers, ports=(5432,)),))
    near, far = changes((PolicySet(), world), (policies, world)).rows

    dbs = ("shop/db-1", "shop/db-2", "shop/db-3")
    assert (near.sources, near.targets, near.pairs) == ((*dbs, ANY_OTHER), dbs, 4 * 3 - 3)
    assert (len(far.sources), far.more_sources, far.targets, far.pairs) == (50, 51, dbs, 101 * 3)
    assert (services_text(near.services), services_text(far.services)) == (("any",), ("all but tcp 5432",))
    deny = "ingress tier-default of default, by shop/db f.yaml:1"
    assert {(r.allowed, r.before, r.after, r.families) for r in (near, far)} == {
        (False, "no policy", deny, (4,))
    }
    [_, cut] = changes((PolicySet(), world), (policies, world), most_names=2).rows
    assert (cut.sources, cut.more_sources, cut.more_targets) == (("shop/web-1", "shop/web-10"), 99, 1)


def test_rows_have_a_bound() -> None:
    """What is left off is counted, and the rows that are told are the same as without the bound."""
    pods = tuple(pod(f"p{n}", f"10.0.0.{n}", role=f"r{n}") for n in range(1, 31))
    world = Snapshot(endpoints=pods)
    each = PolicySet(
        policies=tuple(allow(f"p{n}", f"r{n}", Peer(nets=(f"10.0.0.{n}/32",))) for n in range(1, 31))
    )
    whole = changes((PolicySet(), world), (each, world))
    cut = changes((PolicySet(), world), (each, world), most_rows=3)

    assert cut.rows == whole.rows[:3]
    assert (cut.more_rows, cut.more_pairs) == (
        len(whole.rows) - 3,
        sum(row.pairs for row in whole.rows[3:]),
    )
    assert len(whole.rows) > 20


@pytest.mark.parametrize(
    "bound", ["pairs.MOST_GROUPS", "pairs.MOST_COMPARED", "pairs.MOST_KEPT", "change._MOST_BITS"]
)
def test_what_is_too_much_is_not_counted(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    """Beyond the bound of work the rows are fewer, and ``counted`` says that there are more."""
    world = Snapshot(endpoints=tuple(pod(f"p{n}", f"10.0.0.{n}", role=f"r{n}") for n in range(1, 31)))
    each = PolicySet(
        policies=tuple(allow(f"p{n}", f"r{n}", Peer(nets=(f"10.0.0.{n}/32",))) for n in range(1, 31))
    )
    whole = changes((PolicySet(), world), (each, world))
    monkeypatch.setattr(f"portwright.policy.{bound}", 300 if bound.endswith("BITS") else 10)
    cut = changes((PolicySet(), world), (each, world))

    assert whole.counted
    assert not cut.counted
    assert 0 < len(cut.rows) < len(whole.rows)
    assert {row.targets for row in cut.rows} <= {row.targets for row in whole.rows}


def test_a_pod_without_address_counts() -> None:
    """A pod that manifests describe and nobody runs is compared as if it had an address that nothing names,
    also if it is new; that it comes is no change."""
    old, new = (Snapshot(endpoints=(WEBS[0], *more)) for more in ((), (pod("idle", role="db"),)))
    policies = PolicySet(policies=(allow("db", "db"),))
    rows = changes((PolicySet(), old), (policies, new)).rows

    assert {(row.sources, row.targets, row.families) for row in rows} == {
        (("shop/web-1", ANY_OTHER), ("shop/idle",), (4,)),
        ((ANY_OTHER,), ("shop/idle",), (6,)),
    }
    assert changes((PolicySet(), old), (PolicySet(), new)).rows == ()


def test_each_denial_has_its_own_policy() -> None:
    """Two pods that two policies deny everything are denied alike, and each row names its own."""
    world = Snapshot(endpoints=(*WEBS[:1], *DBS[:1]))
    policies = PolicySet(
        policies=tuple(msgspec.structs.replace(allow(role, role), ingress=()) for role in ("web", "db"))
    )
    rows = changes((PolicySet(), world), (policies, world)).rows

    assert {(row.targets, row.after.partition(", by ")[2]) for row in rows} == {
        (("shop/web-1",), "shop/web f.yaml:1"),
        (("shop/db-1",), "shop/db f.yaml:1"),
    }


def test_an_address_of_its_own_fate_is_told_apart() -> None:
    """A pod of several addresses that policy treats alike is one name; where it does not, each is told."""
    twin = pod("twin", "10.0.0.8", "10.0.0.9", "fd00::8")
    world = Snapshot(endpoints=(*DBS[:1], twin))
    policies = PolicySet(policies=(allow("db", "db", Peer(nets=("10.0.0.8/32",))),))
    rows = changes((PolicySet(), world), (policies, world)).rows

    assert [(row.sources, row.targets) for row in rows] == [
        (("shop/twin (10.0.0.9)", ANY_OTHER), ("shop/db-1",)),
    ]


def test_nets_are_told_less_what_lies_in_them() -> None:
    """A net stands for its first address that no smaller net and no endpoint has; one without any is left
    out."""
    nets = ["0.0.0.0/0", "10.0.0.0/30", "10.0.0.0/31", "10.0.0.2/32", "10.0.0.4/31", "10.0.0.4/32"]
    free = dict(free_places(nets, ["10.0.0.0", "10.0.0.4"]))

    assert free == {
        "0.0.0.0/0": "0.0.0.0",
        "10.0.0.0/30": "10.0.0.3",
        "10.0.0.0/31": "10.0.0.1",
        "10.0.0.2/32": "10.0.0.2",
        "10.0.0.4/31": "10.0.0.5",
    }
    assert dict(free_places(["::/0"], ["::"])) == {"::/0": "::1"}


@pytest.mark.parametrize(
    ("services", "texts"),
    [
        (((0, FIRST_PACKETS),), ("any",)),
        (((80, 81),), ("tcp 80",)),
        (((0, 1 << 16),), ("tcp",)),
        (((0, 80), (81, FIRST_PACKETS)), ("all but tcp 80",)),
        (((80, 82), (65_536 + 53, 65_536 + 54)), ("tcp 80-81", "udp 53")),
        (((65_535, 65_537),), ("tcp 65535", "udp 0")),
        (((3 << 16 | 8 << 8, 3 << 16 | 9 << 8),), ("icmp type 8",)),
        (((3 << 16 | 3 << 8 | 4, 3 << 16 | 3 << 8 | 5),), ("icmp type 3 code 4",)),
        (((5 << 16, FIRST_PACKETS),), ("other protocols",)),
        (((5 << 16 | 47, 5 << 16 | 48),), ("protocol 47",)),
        (((0, 5 << 16 | 47), (5 << 16 | 48, FIRST_PACKETS)), ("all but protocol 47",)),
    ],
)
def test_services_in_words(services: Ranges, texts: tuple[str, ...]) -> None:
    """Services are told by protocol and port, and what is nearly all of them by what it lacks."""
    assert services_text(services) == texts
