"""The judge of host endpoints by value: stages in order, what each leaves to the next, what always passes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from portwright.model.errors import InvalidInput
from portwright.policy.engine import Implicit
from portwright.policy.host.early import early_denies
from portwright.policy.host.judge import Judge
from portwright.policy.host.stages import (
    FAILSAFE_IN,
    FAILSAFE_OUT,
    Bound,
    Stage,
    bind,
    bound_to,
    local_endpoints,
    refuse,
)
from portwright.policy.labels import In
from portwright.policy.manifests.calico_hosts import HOST_INTERFACE, HOST_NODE
from portwright.policy.rules import (
    BUILT_IN_TIERS,
    ICMP6,
    TCP,
    UDP,
    Action,
    Direction,
    Endpoint,
    EndpointKind,
    Flow,
    Peer,
    Policy,
    PolicySet,
    PortRange,
    Rule,
    Snapshot,
    Tier,
    Traffic,
)

IN, OUT = Direction.INGRESS, Direction.EGRESS
HOST, PEER, BEHIND = "192.0.2.2", "198.51.100.1", "10.0.0.5"
FORWARD: dict[str, Any] = {"apply_on_forward": True}
PRE_DNAT: dict[str, Any] = {"apply_on_forward": True, "pre_dnat": True}
UNTRACKED: dict[str, Any] = {"apply_on_forward": True, "do_not_track": True}


def host(name: str = "eth0", interface: str = "eth0", *addresses: str, node: str = "n") -> Endpoint:
    """A host endpoint."""
    labels = {HOST_NODE: node} | ({HOST_INTERFACE: interface} if interface else {})
    return Endpoint(name=name, kind=EndpointKind.HOST, labels=labels, addresses=addresses)


def rule(action: Action, port: int | None = None, *, net: str = "", without: int | None = None) -> Rule:
    """A rule of TCP, by the destination's port."""

    def tcp(number: int) -> tuple[Traffic, ...]:
        return (Traffic(protocol=TCP, ports=(PortRange(number, number),)),)

    return Rule(
        action=action,
        peers=(Peer(nets=(net,)),) if net else None,
        traffic=tcp(port) if port else None,
        not_traffic=tcp(without) if without else (),
    )


def policy(name: str, *ingress: Rule, **fields: Any) -> Policy:
    """A policy of ingress alone, unless ``egress`` is among the fields."""
    given: dict[str, Any] = {"tier": "default", "order": 1.0, "ingress": ingress, **fields}
    return Policy(kind="GlobalNetworkPolicy", name=name, **given)


def judge(*policies: Policy, tiers: tuple[Tier, ...] = ()) -> Judge:
    """Of these policies; there is nobody else."""
    return Judge(PolicySet(tiers=(*BUILT_IN_TIERS, *tiers), policies=policies), Snapshot(endpoints=(host(),)))


def syn(port: int, source: str = PEER, destination: str = HOST) -> Flow:
    """A connection's first packet."""
    return Flow(source=source, destination=destination, protocol=TCP, source_port=40_000, port=port)


def test_an_endpoint_without_policies_is_closed_to_local_processes_alone() -> None:
    """Both ways, by the host's default; what is forwarded passes."""
    asked = judge()
    for direction in Direction:
        ruling = asked.local(host(), direction, syn(80))
        assert not ruling.allowed
        assert ruling.decision is not None
        assert ruling.decision.implicit is Implicit.HOST_DEFAULT
    passed = asked.forwarded(host(), host("far", "far"), syn(80, destination=BEHIND))
    assert (passed.allowed, passed.reason) == (True, "no-policy")


@pytest.mark.parametrize("flags", [{}, UNTRACKED, PRE_DNAT])
def test_failsafe_ports_are_open_whatever_denies(flags: dict[str, bool]) -> None:
    """Each of them, in its direction only."""
    egress = None if "pre_dnat" in flags else (Rule(action=Action.DENY),)
    asked = judge(policy("deny", Rule(action=Action.DENY), egress=egress, **flags))
    for direction, ports, other in ((IN, FAILSAFE_IN, FAILSAFE_OUT), (OUT, FAILSAFE_OUT, FAILSAFE_IN)):
        for protocol in (TCP, UDP):
            for port in {*ports[protocol], *other[protocol]}:
                flow = msgspec.structs.replace(syn(port), protocol=protocol)
                ruling = asked.local(host(), direction, flow)
                assert ruling.allowed is (port in ports[protocol]), (direction, protocol, port)


def test_replies_of_failsafe_ports_are_not_untracked() -> None:
    """A rule without connections would take the answer of a resolver for anything."""
    asked = judge(policy("deny", Rule(action=Action.DENY), **UNTRACKED))
    answer = Flow(source=PEER, destination=HOST, protocol=UDP, source_port=53, port=40_000)
    assert asked.local(host(), IN, answer).stage is Stage.LOCAL


def test_what_a_link_needs_passes_every_stage() -> None:
    """A neighbour's solicitation, under denials of everything."""
    deny = (Rule(action=Action.DENY),)
    asked = judge(policy("a", *deny, **UNTRACKED), policy("b", *deny, **PRE_DNAT), policy("c", *deny))
    flow = Flow(source="fe80::1", destination="ff02::1", protocol=ICMP6, icmp_type=135, icmp_code=0)
    assert asked.local(host(), IN, flow).reason == "on-link"
    assert not asked.local(host(), IN, msgspec.structs.replace(flow, icmp_type=128)).allowed


def test_tiers_come_in_order_and_a_pass_ends_one() -> None:
    """The first tier's pass leads to the next, its default denies what it leaves."""
    first = Tier(name="first", order=1.0)
    asked = judge(
        policy("gate", rule(Action.PASS, 80), rule(Action.PASS, 81), rule(Action.ALLOW, 82), tier="first"),
        policy("web", rule(Action.ALLOW, 80), rule(Action.ALLOW, 83)),
        tiers=(first,),
    )
    verdicts = {port: asked.local(host(), IN, syn(port)) for port in (80, 81, 82, 83)}
    assert {port: ruling.allowed for port, ruling in verdicts.items()} == {
        80: True,
        81: False,
        82: True,
        83: False,
    }
    said = {port: r.decision.tier.name for port, r in verdicts.items() if r.decision and r.decision.tier}
    assert said == {80: "default", 81: "default", 82: "first", 83: "first"}


def test_policies_of_a_tier_come_in_their_order() -> None:
    """The lower one's deny stands before the other's allow."""
    asked = judge(
        policy("b", rule(Action.ALLOW, 80), order=2.0), policy("c", rule(Action.DENY, 80), order=1.0)
    )
    assert not asked.local(host(), IN, syn(80)).allowed


def test_forwarded_traffic_is_bound_by_apply_on_forward_alone() -> None:
    """In the direction in which such a policy selects, at either interface."""
    plain, web = policy("plain"), policy("web", rule(Action.ALLOW, 80), **FORWARD)
    near, far = host(), host("far", "far")
    flows = [syn(port, destination=BEHIND) for port in (80, 81)]
    assert [judge(plain).forwarded(near, far, f).allowed for f in flows] == [True, True]
    assert [judge(plain, web).forwarded(near, far, f).allowed for f in flows] == [True, False]
    assert [judge(web).forwarded(None, far, f).allowed for f in flows] == [True, True]
    out = policy("out", egress=(rule(Action.ALLOW, 81),), apply_on_forward=True)
    out = msgspec.structs.replace(out, ingress=None)
    assert [judge(out).forwarded(near, far, f).allowed for f in flows] == [False, True]
    assert [judge(out).forwarded(near, None, f).allowed for f in flows] == [True, True]


def test_before_dnat_there_is_no_default_and_an_allow_ends_the_ingress_side() -> None:
    """By the port of before; what it leaves is judged by the port of after."""
    pre = policy("pre", rule(Action.DENY, 8080), rule(Action.ALLOW, 8081), **PRE_DNAT)
    asked = judge(pre, policy("web", rule(Action.ALLOW, 80)))
    after = syn(80)
    got = {before: asked.local(host(), IN, after, syn(before)) for before in (8080, 8081, 8082)}
    assert {b: (r.allowed, r.stage) for b, r in got.items()} == {
        8080: (False, Stage.PRE_DNAT),
        8081: (True, Stage.PRE_DNAT),
        8082: (True, Stage.LOCAL),
    }
    # Of what is forwarded it decides the way in, not the way out.
    out = msgspec.structs.replace(policy("out", egress=(), **FORWARD), ingress=None)
    closed = judge(pre, policy("closed", **FORWARD), out)
    flow, before = syn(80, destination=BEHIND), syn(8081)
    assert closed.forwarded(host(), None, flow, before).allowed
    assert not closed.forwarded(host(), host("far", "far"), flow, before).allowed


def test_an_untracked_allow_ends_all_stages() -> None:
    """Before DNAT, forward in and out, local; a deny ends it too; what it leaves goes on."""
    deny = (Rule(action=Action.DENY),)
    raw = policy("raw", rule(Action.ALLOW, 80), rule(Action.DENY, 81), egress=(), **UNTRACKED)
    asked = judge(raw, policy("pre", *deny, **PRE_DNAT), policy("all", *deny, egress=deny, **FORWARD))
    local = {port: asked.local(host(), IN, syn(port)) for port in (80, 81, 82)}
    assert {port: (r.allowed, r.stage) for port, r in local.items()} == {
        80: (True, Stage.UNTRACKED),
        81: (False, Stage.UNTRACKED),
        82: (False, Stage.PRE_DNAT),
    }
    assert asked.forwarded(host(), host("far", "far"), syn(80, destination=BEHIND)).allowed


def test_which_endpoints_are_ours_and_which_interfaces_they_are() -> None:
    """By name, by an address, all others; the first by name wins, and ports' devices are nobody's."""
    ends = (
        host("b", "eth0"),
        host("a", "", "192.0.2.2"),
        host("every", "*"),
        host("c", "", "192.0.2.9", "2001:db8::9"),
        host("d", "", "127.0.0.1", "10.0.0.1"),
        host("x", "eth9", node="other"),
    )
    mine = local_endpoints(Snapshot(endpoints=ends), "n")
    assert [e.name for e in mine] == ["a", "b", "c", "d", "every"]
    addresses = {
        "eth0": ["192.0.2.2"],
        "eth1": ["192.0.2.9"],
        "eth2": ["2001:db8::9"],
        "lo": ["127.0.0.1"],
        "pw01234567": ["10.0.0.1"],
    }
    bound = bind(mine, addresses)
    assert [(b.endpoint.name, b.interfaces, b.every) for b in bound] == [
        ("a", ("eth0",), False),
        ("c", ("eth1", "eth2"), False),
        ("every", (), True),
    ]
    found = {name: bound_to(bound, name) for name in ("eth0", "eth7", "lo", "pw01234567")}
    assert {name: end and end.name for name, end in found.items()} == {
        "eth0": "a",
        "eth7": "every",
        "lo": None,
        "pw01234567": None,
    }
    assert bind(mine[1:2], {}) == (Bound(mine[1], ("eth0",)),)


@pytest.mark.parametrize("name", ["eth*", 'a"b', "a b", "a\nb", "a;b", "{", "\\*", "é", "lo", "pw01234567"])
def test_names_that_are_refused(name: str) -> None:
    """Patterns, what nft would read otherwise, the loopback, ports; also where an address leads to one."""
    with pytest.raises(InvalidInput, match="interfaceName"):
        refuse(PolicySet(), [host("h", name)])
    if name in {"lo", "pw01234567"}:
        return
    with pytest.raises(InvalidInput, match="rename it"):
        bind([host("h", "", "192.0.2.2")], {name: ["192.0.2.2"]})


def test_two_endpoints_of_one_interface_are_refused() -> None:
    """One of them would be without effect."""
    with pytest.raises(InvalidInput, match="HostEndpoint a is this interface already"):
        refuse(PolicySet(), [host("a"), host("b")])


def test_domain_names_are_refused_where_they_would_count() -> None:
    """In a policy that selects a host endpoint of this node, in any stage."""
    asks = (Rule(action=Action.ALLOW, peers=(Peer(domains=("example.com",)),)),)
    named = msgspec.structs.replace(policy("names", egress=asks), ingress=None)
    refuse(PolicySet(policies=(named,)), [])
    for flags in ({}, UNTRACKED, FORWARD):
        with pytest.raises(InvalidInput, match=r"names.*egress\[0\].*domains"):
            refuse(PolicySet(policies=(msgspec.structs.replace(named, **flags),)), [host()])


def test_what_may_be_dropped_early() -> None:
    """Nets and selectors of the denials that come before anything else, in both families."""
    web = Endpoint(name="web", labels={"app": "web"}, addresses=("10.0.0.5", "fd00::5"))
    plain = Rule(action=Action.DENY, peers=(Peer(nets=("203.0.113.0/24", "2001:db8::/32")),))
    chosen = Rule(action=Action.DENY, peers=(Peer(selector=In("app", frozenset({"web"}))),))
    some = rule(Action.DENY, 80, net="198.51.100.0/24")
    bound = Bound(host(), ("eth0",))

    def denied(*rules: Rule, **flags: bool) -> list[str]:
        policies = PolicySet(policies=(policy("raw", *rules, **(flags or UNTRACKED)),))
        found = early_denies(policies, Snapshot(endpoints=(web,)), bound)
        return list(found)

    assert denied(plain, chosen) == ["203.0.113.0/24", "2001:db8::/32", "10.0.0.5", "fd00::5"]
    both = early_denies(
        PolicySet(policies=(policy("raw", plain, chosen, **UNTRACKED),)), Snapshot(endpoints=(web,)), bound
    )
    assert [both["203.0.113.0/24"], both["fd00::5"]] == [
        f"GlobalNetworkPolicy raw ingress[{number}]" for number in (0, 1)
    ]
    assert denied(plain, some, chosen) == ["203.0.113.0/24", "2001:db8::/32"]
    assert denied(rule(Action.ALLOW, 80), plain) == []
    assert denied(Rule(action=Action.DENY)) == ["0.0.0.0/0", "::/0"]
    assert (
        denied(Rule(action=Action.DENY, peers=(Peer(nets=("10.0.0.0/8",), not_nets=("10.1.0.0/16",)),))) == []
    )
    assert denied(plain, apply_on_forward=True) == []
