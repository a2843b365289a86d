"""Generated worlds, small enough that labels, nets, names and ports collide in every feature of the model."""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st

from portwright.policy.labels import EVERYTHING, And, Contains, EndsWith, Expr, Has, In, Not, Or, StartsWith
from portwright.policy.rules import (
    ICMP,
    ICMP6,
    SCTP,
    TCP,
    UDP,
    Action,
    Endpoint,
    EndpointKind,
    Flow,
    NamedPort,
    Peer,
    Policy,
    PolicySet,
    PortRange,
    Rule,
    Snapshot,
    Tier,
    Traffic,
)

#: What endpoints, domains and flows choose from; the last two of each family are never an endpoint's.
V4 = ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.1.1", "10.0.0.9", "203.0.113.7")
V6 = ("fd00::1", "fd00::2", "fd00::3", "fd00::1:1", "fd00::9", "2001:db8::7")
NETS = (
    *(
        "0.0.0.0/0",
        "10.0.0.0/8",
        "10.0.0.0/24",
        "10.0.0.0/30",
        "10.0.0.2/31",
        "10.0.0.1/32",
        "203.0.113.0/24",
    ),
    *("::/0", "fd00::/8", "fd00::/112", "fd00::/126", "fd00::2/127", "fd00::1/128", "2001:db8::7/128"),
)
DOMAINS = ("example.com", "*.example.com")
NAMES = ("web", "dns")
#: Each with its neighbours: below, at and above every bound that a rule may have.
PORTS = (0, 52, 53, 54, 79, 80, 81, 82, 65_535)
SERVICES = (
    *((TCP, port, None, None) for port in (*PORTS, None)),
    *((UDP, port, None, None) for port in (53, 80, None)),
    *((SCTP, port, None, None) for port in (80, None)),
    *((ICMP, None, kind, code) for kind, code in ((8, 0), (8, 1), (3, 4), (0, 0), (None, None))),
    *((ICMP6, None, kind, code) for kind, code in ((128, 0), (3, 4), (None, None))),
    *((protocol, None, None, None) for protocol in (0, 47, 255)),
)

KEYS, VALUES = ("a", "b", "ns:n"), ("x", "xy", "yx")

_leaf: st.SearchStrategy[Expr] = st.one_of(
    st.just(EVERYTHING),
    st.builds(Has, st.sampled_from(KEYS)),
    st.builds(In, st.sampled_from(KEYS), st.frozensets(st.sampled_from(VALUES), max_size=2)),
    st.builds(Contains, st.sampled_from(KEYS), st.sampled_from(("x", "y", ""))),
    st.builds(StartsWith, st.sampled_from(KEYS), st.sampled_from(("x", "y"))),
    st.builds(EndsWith, st.sampled_from(KEYS), st.sampled_from(("x", "y"))),
)
exprs: st.SearchStrategy[Expr] = st.recursive(
    _leaf,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(And, st.lists(inner, max_size=2).map(tuple)),
        st.builds(Or, st.lists(inner, max_size=2).map(tuple)),
    ),
    max_leaves=3,
)
labels = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=3)
_nets = st.lists(st.sampled_from(NETS), max_size=3, unique=True).map(tuple)


def _often_none(strategy: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.one_of(st.none(), st.none(), strategy)


peers: st.SearchStrategy[Peer] = st.builds(
    Peer,
    selector=_often_none(exprs),
    not_selector=_often_none(exprs),
    nets=_often_none(_nets),
    not_nets=st.one_of(st.just(()), _nets),
    nodes=_often_none(exprs),
    domains=_often_none(st.lists(st.sampled_from(DOMAINS), max_size=2).map(tuple)),
)
_ranges = st.one_of(
    st.sampled_from((PortRange(80, 80), PortRange(53, 53), PortRange(80, 81), PortRange(0, 65_535))),
    st.builds(lambda a, b: PortRange(min(a, b), max(a, b)), st.sampled_from(PORTS), st.sampled_from(PORTS)),
)


def _seldom(strategy: st.SearchStrategy[tuple[object, ...]]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.one_of(st.just(()), st.just(()), strategy)


traffics: st.SearchStrategy[Traffic] = st.one_of(
    st.builds(
        Traffic,
        protocol=st.sampled_from((None, TCP, TCP, UDP, SCTP)),
        ports=st.lists(_ranges, max_size=2).map(tuple),
        names=st.lists(st.sampled_from(NAMES), max_size=2, unique=True).map(tuple),
        ip_version=st.sampled_from((None, None, 4, 6)),
        source_ports=_seldom(st.lists(_ranges, max_size=2).map(tuple)),
        source_names=_seldom(st.lists(st.sampled_from(NAMES), max_size=2, unique=True).map(tuple)),
    ),
    st.builds(  # a code only with its type: 256 types' codes are more intervals than a set may have
        Traffic,
        protocol=st.sampled_from((None, ICMP, ICMP6, TCP)),
        icmp_type=st.sampled_from((0, 3, 8, 128)),
        icmp_code=st.sampled_from((None, 0, 4)),
        ip_version=st.sampled_from((None, None, 4, 6)),
    ),
    st.builds(Traffic, protocol=st.sampled_from((0, 47, ICMP, 255))),
)
rules: st.SearchStrategy[Rule] = st.builds(
    Rule,
    action=st.sampled_from((Action.ALLOW, Action.ALLOW, Action.DENY, Action.PASS, Action.LOG)),
    peers=st.one_of(st.none(), st.lists(peers, max_size=2).map(tuple)),
    local=_often_none(peers),
    traffic=st.one_of(st.none(), st.lists(traffics, max_size=2).map(tuple)),
    not_traffic=st.one_of(st.just(()), st.lists(traffics, max_size=1).map(tuple)),
)
_rules = st.one_of(st.none(), st.lists(rules, max_size=4).map(tuple))
TIERS = (
    Tier(name="first", order=1.0, default=Action.PASS),
    Tier(name="second", order=2.0, default=Action.DENY),
    Tier(name="third", order=3.0, default=Action.PASS),
)


@st.composite
def policy_sets(draw: st.DrawFn) -> PolicySet:
    """Up to five policies in three tiers whose defaults differ."""
    policies = [
        Policy(
            kind="Test",
            name=f"p{index}",
            tier=draw(st.sampled_from(TIERS)).name,
            order=draw(st.sampled_from((1.0, 2.0, float("inf")))),
            subject=draw(exprs),
            ingress=draw(_rules),
            egress=draw(_rules),
            staged=draw(st.integers(0, 9)) == 0,
            apply_on_forward=draw(st.booleans()),
            do_not_track=draw(st.integers(0, 9)) == 0,
        )
        for index in range(draw(st.integers(1, 5)))
    ]
    return PolicySet(tiers=TIERS, policies=tuple(policies))


_named = st.lists(
    st.builds(NamedPort, st.sampled_from(NAMES), st.sampled_from((TCP, UDP)), st.sampled_from((53, 80, 81))),
    max_size=2,
).map(tuple)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Workloads of both families, pods on a node's address, nodes, host endpoints, network sets, names."""
    endpoints = []
    for index in range(draw(st.integers(1, 3))):
        addresses = draw(st.sampled_from(((V4[index],), (V6[index],), (V4[index], V6[index]))))
        endpoints.append(
            Endpoint(
                name=f"w{index}",
                labels=draw(labels),
                addresses=addresses,
                named_ports=draw(_named),
                host_network=draw(st.integers(0, 5)) == 0,
            )
        )
    others = {
        EndpointKind.NODE: ((V4[3],), (V6[3],), (V4[3], V6[3]), (V4[0],)),
        EndpointKind.HOST: ((V4[3],), (V4[0], V6[3])),
    }
    for kind, places in others.items():
        if draw(st.booleans()):
            endpoints.append(
                Endpoint(
                    name=f"{kind}",
                    kind=kind,
                    labels=draw(labels),
                    addresses=draw(st.sampled_from(places)),
                    named_ports=draw(_named),
                    local_node=draw(st.booleans()),
                )
            )
    if draw(st.booleans()):
        endpoints.append(
            Endpoint(name="set", kind=EndpointKind.NETWORK_SET, labels=draw(labels), nets=draw(_nets))
        )
    resolved = st.lists(st.sampled_from((*V4, *V6)), max_size=2, unique=True).map(tuple)
    return Snapshot(
        endpoints=tuple(endpoints), domains=draw(st.dictionaries(st.sampled_from(DOMAINS), resolved))
    )


def flows(*source_ports: int) -> tuple[Flow, ...]:
    """Every service between every two addresses of a family, from each of these ports."""
    return tuple(
        Flow(
            source=source,
            destination=destination,
            protocol=protocol,
            source_port=None if port is None else source_port,
            port=port,
            icmp_type=kind,
            icmp_code=code,
        )
        for family in (V4, V6)
        for source in family
        for destination in family
        for protocol, port, kind, code in SERVICES
        for source_port in (source_ports if port is not None else source_ports[:1])
    )


def relabelled(snapshot: Snapshot, index: int, new: dict[str, str]) -> Snapshot:
    """The same world with other labels on one endpoint."""
    at = index % len(snapshot.endpoints)
    changed = msgspec.structs.replace(snapshot.endpoints[at], labels=new)
    return msgspec.structs.replace(
        snapshot, endpoints=(*snapshot.endpoints[:at], changed, *snapshot.endpoints[at + 1 :])
    )
