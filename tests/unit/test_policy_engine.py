"""The engine on rules made by hand, and against a second reading of the specification."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from portwright.model.errors import InvalidInput
from portwright.policy.engine import Engine, Implicit, connect, decide, tiers_in_order
from portwright.policy.labels import EVERYTHING, Has, In, Not
from portwright.policy.manifests.read import read
from portwright.policy.matching import World, in_net
from portwright.policy.rules import (
    ADMIN,
    BASELINE,
    BUILT_IN_TIERS,
    DEFAULT,
    ICMP,
    TCP,
    UDP,
    Action,
    Direction,
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

A = Endpoint(name="a", namespace="n", labels={"app": "a"}, addresses=("10.0.0.1", "fd00::1"))
B = Endpoint(
    name="b",
    namespace="n",
    labels={"app": "b"},
    addresses=("10.0.0.2",),
    named_ports=(NamedPort("http", TCP, 80), NamedPort("http", TCP, 81), NamedPort("http", UDP, 82)),
)
WORLD = Snapshot(endpoints=(A, B))
TO_B = Flow(source="10.0.0.1", destination="10.0.0.2", protocol=TCP, source_port=40_000, port=80)

ALLOW, DENY, PASS, LOG = (
    Rule(action=action) for action in (Action.ALLOW, Action.DENY, Action.PASS, Action.LOG)
)


def policy(name: str, *rules: Rule, tier: Tier = DEFAULT, order: float = 1.0, **more: Any) -> Policy:
    """A policy with these ingress rules for everybody."""
    return Policy(kind="Test", name=name, tier=tier.name, order=order, ingress=rules, **more)


def into_b(*policies: Policy, tiers: tuple[Tier, ...] = BUILT_IN_TIERS, flow: Flow = TO_B) -> Any:
    """The ingress decision at b."""
    return decide(PolicySet(tiers=tiers, policies=policies), WORLD, B, Direction.INGRESS, flow)


# --- tiers, order, actions ---


def test_nothing_selects() -> None:
    """Without a policy a side is allowed, and says why."""
    found = into_b()

    assert (found.verdict, found.implicit, found.tier, found.rule) == (
        Action.ALLOW,
        Implicit.NO_POLICY,
        None,
        None,
    )
    assert found.selected_by == ()


def test_a_rule_is_named() -> None:
    """A verdict by a rule carries its policy, its index, its tier, and all policies that select, in order."""
    one, two = policy("one", LOG, order=1), policy("two", Rule(action=Action.DENY, peers=()), ALLOW, order=2)

    found = into_b(two, one)

    assert (found.policy, found.index, found.rule, found.tier) == (two, 1, ALLOW, DEFAULT)
    assert found.implicit is Implicit.NONE
    assert found.selected_by == (one, two)
    assert [(log.policy, log.index) for log in found.logs] == [(one, 0)]


@pytest.mark.parametrize(
    ("rules", "tier", "verdict", "implicit"),
    [
        ((), DEFAULT, Action.DENY, Implicit.TIER_DEFAULT),
        ((LOG,), DEFAULT, Action.DENY, Implicit.TIER_DEFAULT),
        ((PASS,), DEFAULT, Action.ALLOW, Implicit.ALL_PASSED),
        ((PASS, DENY), DEFAULT, Action.ALLOW, Implicit.ALL_PASSED),
        ((LOG, PASS), DEFAULT, Action.ALLOW, Implicit.ALL_PASSED),
        ((), ADMIN, Action.ALLOW, Implicit.ALL_PASSED),
        ((), BASELINE, Action.ALLOW, Implicit.ALL_PASSED),
        ((DENY, ALLOW), ADMIN, Action.DENY, Implicit.NONE),
        ((ALLOW, DENY), ADMIN, Action.ALLOW, Implicit.NONE),
        ((LOG, DENY), BASELINE, Action.DENY, Implicit.NONE),
    ],
)
def test_actions(rules: tuple[Rule, ...], tier: Tier, verdict: Action, implicit: Implicit) -> None:
    """The first rule that matches decides; pass leaves the tier without its default; log goes on."""
    found = into_b(policy("p", *rules, tier=tier))

    assert (found.verdict, found.implicit) == (verdict, implicit)
    assert (found.tier == tier) is (implicit not in {Implicit.ALL_PASSED})


def test_order_of_tiers_and_policies() -> None:
    """Tiers by (order, name), policies by (order, name, namespace), however the set lists them."""
    late, early, tie = Tier(name="a", order=2), Tier(name="z", order=1), Tier(name="b", order=2)
    one = Policy(kind="T", name="a", namespace="m", tier="z", order=1.0)
    two = Policy(kind="T", name="z", namespace="", tier="z", order=1.0)
    three = Policy(kind="T", name="a", tier="z", order=float("inf"))

    found = tiers_in_order(PolicySet(tiers=(tie, late, early), policies=(three, two, one)))

    assert [tier.name for tier, _ in found] == ["z", "a", "b"]
    assert found[0][1] == (one, two, three)


def test_unknown_tier_is_refused() -> None:
    """A policy of a tier that is not there is an error with its name, never a policy that is skipped."""
    stray = Policy(kind="GlobalNetworkPolicy", name="p", tier="nowhere", order=1.0)

    with pytest.raises(InvalidInput, match=r"GlobalNetworkPolicy p: tier: there is no such tier.*nowhere"):
        Engine(PolicySet(policies=(stray,)), WORLD)


@pytest.mark.parametrize("address", ["", "10.0.0.256", "host", "10.0.0.1/32", "fe80::1%eth0x%"])
def test_malformed_address_is_refused(address: str) -> None:
    """What is no address is InvalidInput with the value, whether an endpoint's or a peer's net meets it."""
    net = policy("p", Rule(action=Action.ALLOW, peers=(Peer(nets=("10.0.0.0/8",)),)))

    with pytest.raises(InvalidInput, match="is no IP address"):
        World(Snapshot(endpoints=(replace(A, addresses=(address,)),)))
    with pytest.raises(InvalidInput, match="is no IP address"):
        into_b(net, flow=replace(TO_B, source=address))


def test_malformed_net_is_refused() -> None:
    """A net with host bits, or none at all, is InvalidInput."""
    for net in ("10.0.0.1/8", "10.0.0.0/33", "all"):
        with pytest.raises(InvalidInput, match="is no IP network"):
            in_net("10.0.0.1", net)


def test_directions_that_a_policy_says_nothing_of() -> None:
    """None is silence, () is isolation."""
    silent = replace(policy("p"), ingress=None, egress=())

    assert into_b(silent).implicit is Implicit.NO_POLICY
    found = decide(PolicySet(policies=(silent,)), WORLD, A, Direction.EGRESS, TO_B)
    assert found.implicit is Implicit.TIER_DEFAULT


@pytest.mark.parametrize("flag", ["staged", "do_not_track", "pre_dnat"])
def test_policies_of_other_stages_bind_no_workload(flag: str) -> None:
    """Staged, untracked and pre-DNAT policies decide nothing here."""
    assert into_b(replace(policy("p", DENY), **{flag: True})).implicit is Implicit.NO_POLICY
    assert not into_b(replace(policy("p", DENY), apply_on_forward=True)).allowed


# --- peers and traffic ---


@pytest.mark.parametrize(
    ("rule", "allowed"),
    [
        (Rule(action=Action.ALLOW), True),
        (Rule(action=Action.ALLOW, peers=()), False),
        (Rule(action=Action.ALLOW, traffic=()), False),
        (Rule(action=Action.ALLOW, peers=(Peer(),)), True),
        (Rule(action=Action.ALLOW, traffic=(Traffic(),)), True),
        (Rule(action=Action.ALLOW, peers=(Peer(nets=()),)), False),
        (Rule(action=Action.ALLOW, peers=(Peer(domains=()),)), False),
        (
            Rule(
                action=Action.ALLOW,
                peers=(Peer(selector=In("app", frozenset({"a"})), nets=("10.0.0.0/31",)),),
            ),
            True,
        ),
        (
            Rule(
                action=Action.ALLOW,
                peers=(Peer(selector=In("app", frozenset({"a"})), nets=("10.0.0.2/31",)),),
            ),
            False,
        ),
        (Rule(action=Action.ALLOW, peers=(Peer(selector=EVERYTHING, not_selector=Has("app")),)), False),
        (Rule(action=Action.ALLOW, local=Peer(selector=In("app", frozenset({"b"})))), True),
        (Rule(action=Action.ALLOW, local=Peer(selector=In("app", frozenset({"a"})))), False),
        (Rule(action=Action.ALLOW, local=Peer(not_nets=("10.0.0.2/32",))), False),
        (Rule(action=Action.ALLOW, not_traffic=(Traffic(protocol=TCP),)), False),
        (Rule(action=Action.ALLOW, not_traffic=(Traffic(protocol=UDP),)), True),
        (Rule(action=Action.ALLOW, traffic=(Traffic(ports=(PortRange(80, 80),)),)), True),
        (Rule(action=Action.ALLOW, traffic=(Traffic(protocol=UDP, ports=(PortRange(80, 80),)),)), False),
        (Rule(action=Action.ALLOW, traffic=(Traffic(names=("http",)),)), True),
        (Rule(action=Action.ALLOW, traffic=(Traffic(names=("web",), ports=(PortRange(80, 80),)),)), True),
        (Rule(action=Action.ALLOW, traffic=(Traffic(source_ports=(PortRange(1, 39_999),)),)), False),
        (Rule(action=Action.ALLOW, traffic=(Traffic(source_names=("http",)),)), False),
        (Rule(action=Action.ALLOW, traffic=(Traffic(icmp_type=8),)), False),
        (Rule(action=Action.ALLOW, traffic=(Traffic(ip_version=6),)), False),
        (Rule(action=Action.ALLOW, traffic=(Traffic(ip_version=4),)), True),
    ],
)
def test_rules(rule: Rule, allowed: bool) -> None:
    """None is anything and () nothing; fields of one peer or traffic are ANDed, several ORed."""
    assert into_b(policy("p", rule)).allowed is allowed


@pytest.mark.parametrize(
    ("protocol", "port", "allowed"),
    [(TCP, 80, True), (TCP, 81, True), (TCP, 82, False), (UDP, 82, True), (UDP, 80, False)],
)
def test_named_ports(protocol: int, port: int, allowed: bool) -> None:
    """A name is each of its numbers under the packet's protocol, and none of another protocol's."""
    rule = Rule(action=Action.ALLOW, traffic=(Traffic(names=("http",)),))

    assert into_b(policy("p", rule), flow=replace(TO_B, protocol=protocol, port=port)).allowed is allowed


def test_source_names_are_the_sources() -> None:
    """A source port's name is what the source calls it."""
    rule = Rule(action=Action.ALLOW, traffic=(Traffic(source_names=("http",)),))
    back = Flow(source="10.0.0.2", destination="10.0.0.1", protocol=TCP, source_port=80, port=9)
    policies = PolicySet(policies=(policy("p", rule),))

    assert connect(policies, WORLD, back).allowed
    assert not connect(policies, WORLD, replace(back, source_port=82)).allowed
    assert not connect(policies, WORLD, replace(back, source_port=None)).allowed


def test_shared_address_is_found_by_either_endpoint() -> None:
    """Where two endpoints have one address, a selector finds either, and not_selector excludes by either."""
    host = Endpoint(name="h", kind=EndpointKind.HOST, labels={"if": "eth0"}, addresses=A.addresses)
    world = Snapshot(endpoints=(host, A, B))

    def allowed(peer: Peer) -> bool:
        policies = PolicySet(policies=(policy("p", Rule(action=Action.ALLOW, peers=(peer,))),))
        return decide(policies, world, B, Direction.INGRESS, TO_B).allowed

    assert allowed(Peer(selector=Has("if")))
    assert allowed(Peer(selector=Has("app")))
    assert allowed(Peer(selector=Not(Has("app"))))
    assert not allowed(Peer(not_selector=Has("if")))
    assert not allowed(Peer(not_selector=Has("app")))


def test_host_endpoint() -> None:
    """A host endpoint denies what no policy allows, once it is there; it is no side of a connection."""
    host = Endpoint(name="h", kind=EndpointKind.HOST, labels={"if": "eth0"}, addresses=("192.0.2.1",))
    world = Snapshot(endpoints=(A, host))
    flow = replace(TO_B, destination="192.0.2.1")

    assert decide(PolicySet(), world, host, Direction.INGRESS, flow).implicit is Implicit.HOST_DEFAULT
    allowed = PolicySet(policies=(policy("p", ALLOW, subject=Has("if")),))
    assert decide(allowed, world, host, Direction.INGRESS, flow).allowed
    assert connect(allowed, world, flow).ingress is None


@pytest.mark.parametrize("kind", [EndpointKind.NODE, EndpointKind.NETWORK_SET])
def test_peers_only(kind: EndpointKind) -> None:
    """No policy selects a node or a network set."""
    thing = Endpoint(name="t", kind=kind, addresses=("192.0.2.1",), nets=("192.0.2.0/24",))

    found = decide(
        PolicySet(policies=(policy("p", DENY),)), Snapshot(endpoints=(thing,)), thing, Direction.INGRESS, TO_B
    )

    assert found.implicit is Implicit.NO_POLICY


# --- what is built in ---


def test_built_in_rules_stand_before_admin() -> None:
    """Own addresses of both families, and the local node into its workloads, whatever an admin denies."""
    node = Endpoint(name="n1", kind=EndpointKind.NODE, addresses=("192.0.2.1",), local_node=True)
    other = Endpoint(name="n2", kind=EndpointKind.NODE, addresses=("192.0.2.2",))
    both = replace(policy("p", DENY, tier=ADMIN), egress=(DENY,))
    engine = Engine(PolicySet(policies=(both,)), Snapshot(endpoints=(A, B, node, other)))

    def ask(source: str, destination: str) -> tuple[bool, str]:
        found = engine.connect(Flow(source=source, destination=destination, protocol=ICMP))
        side = found.ingress or found.egress
        assert side is not None
        return found.allowed, side.implicit

    assert ask("10.0.0.1", "10.0.0.1") == (True, Implicit.OWN_ADDRESS)
    assert ask("10.0.0.1", "fd00::1") == (True, Implicit.OWN_ADDRESS)
    assert ask("10.0.0.1", "10.0.0.2") == (False, "")
    assert ask("192.0.2.1", "10.0.0.2") == (True, Implicit.LOCAL_NODE)
    assert ask("192.0.2.2", "10.0.0.2") == (False, "")
    assert ask("10.0.0.1", "192.0.2.1") == (False, "")


def test_built_in_decision_tells_who_selects() -> None:
    """What a built-in rule allows still names the policies that select."""
    denied = policy("p", DENY)
    found = decide(
        PolicySet(policies=(denied,)), WORLD, B, Direction.INGRESS, replace(TO_B, source="10.0.0.2")
    )

    assert (found.implicit, found.selected_by) == (Implicit.OWN_ADDRESS, (denied,))


def test_strangers_have_no_side() -> None:
    """An address of no workload has no side; between two of them everything is allowed here."""
    found = connect(
        PolicySet(policies=(policy("p", DENY),)),
        WORLD,
        replace(TO_B, source="8.8.8.8", destination="9.9.9.9"),
    )

    assert (found.egress, found.ingress, found.allowed) == (None, None, True)


# --- an engine that is asked often ---


RULES = st.builds(
    Rule,
    action=st.sampled_from(Action),
    peers=st.sampled_from([None, (), (Peer(selector=Has("app")),), (Peer(nets=("10.0.0.0/31",)),)]),
    traffic=st.sampled_from(
        [None, (Traffic(protocol=TCP),), (Traffic(protocol=TCP, ports=(PortRange(80, 90),)),)]
    ),
)
POLICIES = st.builds(
    Policy,
    kind=st.just("T"),
    name=st.sampled_from("abcdef"),
    tier=st.sampled_from([tier.name for tier in BUILT_IN_TIERS]),
    order=st.sampled_from([1.0, 2.0]),
    subject=st.sampled_from([EVERYTHING, In("app", frozenset({"b"}))]),
    ingress=st.none() | st.lists(RULES, max_size=3).map(tuple),
    egress=st.none() | st.lists(RULES, max_size=3).map(tuple),
)
FLOWS = st.builds(
    Flow,
    source=st.sampled_from(["10.0.0.1", "10.0.0.2", "192.0.2.1"]),
    destination=st.sampled_from(["10.0.0.1", "10.0.0.2", "192.0.2.1"]),
    protocol=st.sampled_from([TCP, UDP]),
    port=st.sampled_from([80, 91, None]),
)


@given(st.lists(POLICIES, max_size=5, unique_by=lambda p: p.name), st.lists(FLOWS, min_size=2, max_size=8))
@settings(max_examples=150, deadline=None)
def test_engine_remembers_nothing_wrong(policies: list[Policy], flows: list[Flow]) -> None:
    """An engine asked many times, in whatever order, says each time what a fresh one says."""
    whole = PolicySet(policies=tuple(policies))
    kept = Engine(whole, WORLD)

    for flow in [*flows, *reversed(flows)]:
        assert kept.connect(flow) == connect(whole, WORLD, flow)


@given(st.lists(POLICIES, max_size=5, unique_by=lambda p: p.name), FLOWS)
@settings(max_examples=150, deadline=None)
def test_the_sets_own_order_is_nothing(policies: list[Policy], flow: Flow) -> None:
    """However a set lists its tiers, policies and endpoints, the answer is the same."""
    one = connect(PolicySet(policies=tuple(policies)), WORLD, flow)
    turned = PolicySet(tiers=BUILT_IN_TIERS[::-1], policies=tuple(policies[::-1]))

    assert connect(turned, Snapshot(endpoints=(B, A)), flow) == one


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine forgets pairs at its bound, and answers on."""
    monkeypatch.setattr("portwright.policy.engine._REMEMBERED", 4)
    engine = Engine(
        PolicySet(policies=(policy("p", Rule(action=Action.ALLOW, peers=(Peer(nets=("10.0.0.0/8",)),))),)),
        WORLD,
    )

    for last in range(3, 40):
        assert engine.connect(replace(TO_B, source=f"10.0.0.{last}")).allowed
        assert not engine.connect(replace(TO_B, source=f"11.0.0.{last}")).allowed
    assert len(engine._near) <= 4


def test_endpoints_are_remembered_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is asked about ever new endpoint values keeps few of them and mixes none up."""
    monkeypatch.setattr("portwright.policy.engine._REMEMBERED", 4)
    engine = Engine(PolicySet(policies=(policy("p", subject=In("app", frozenset({"b"}))),)), WORLD)

    for turn in range(40):
        endpoint = replace(B, labels={"app": "b" if turn % 3 else "a"})
        assert engine.decide(endpoint, Direction.INGRESS, TO_B).allowed is (turn % 3 == 0)
    assert len(engine._selecting) <= 4


# --- NetworkPolicy once more, from the nine rules of the specification ---

Body = dict[str, Any]
NAMESPACES: dict[str, dict[str, str]] = {"x": {"team": "red"}, "y": {"team": "blue"}, "z": {}}
PODS: dict[str, tuple[str, dict[str, str], str, dict[tuple[str, str], int]]] = {
    # address: (namespace, labels, name, numbers of (port name, protocol))
    "10.1.0.1": ("x", {"app": "a"}, "a", {("web", "TCP"): 80}),
    "10.1.0.2": ("x", {"app": "b", "tier": ""}, "b", {("web", "TCP"): 81, ("web", "UDP"): 80}),
    "10.1.0.3": ("y", {"app": "a"}, "c", {}),
    "10.1.0.4": ("z", {}, "d", {("web", "TCP"): 80}),
}
OUTSIDE = "192.0.2.9"


def selects(selector: Body, labels: dict[str, str]) -> bool:
    """Rule 9."""
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for each in selector.get("matchExpressions") or []:
        there, values = labels.get(each["key"]), each.get("values") or []
        holds = {
            "In": there in values,
            "NotIn": there not in values,
            "Exists": there is not None,
            "DoesNotExist": there is None,
        }
        if not holds[each["operator"]]:
            return False
    return True


def is_peer(peer: Body, namespace: str, address: str) -> bool:
    """Rules 5 and 6."""
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        found = ipaddress.ip_address(address)
        return found in ipaddress.ip_network(block["cidr"]) and not any(
            found in ipaddress.ip_network(hole) for hole in block.get("except") or []
        )
    if address not in PODS:
        return False
    its, labels, _, _ = PODS[address]
    if "namespaceSelector" in peer:
        name = {"kubernetes.io/metadata.name": its}
        if not selects(peer["namespaceSelector"], {**NAMESPACES[its], **name}):
            return False
    elif its != namespace:
        return False
    return selects(peer.get("podSelector") or {}, labels)


def is_port(port: Body, protocol: str, number: int, destination: str) -> bool:
    """Rule 7."""
    if port.get("protocol", "TCP") != protocol:
        return False
    wanted: Any = port.get("port")
    if isinstance(wanted, str):
        return destination in PODS and PODS[destination][3].get((wanted, protocol)) == number
    return wanted is None or bool(wanted <= number <= port.get("endPort", wanted))


def side_allows(policies: list[Body], own: str, other: str, egress: bool, protocol: str, number: int) -> bool:
    """Rules 1 to 4."""
    if own not in PODS:
        return True
    namespace, labels, _, _ = PODS[own]
    field, peers, kind = ("egress", "to", "Egress") if egress else ("ingress", "from", "Ingress")
    isolated = False
    for each in policies:
        spec = each["spec"]
        types = spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])
        if each["metadata"]["namespace"] != namespace or kind not in types:
            continue
        if not selects(spec.get("podSelector") or {}, labels):
            continue
        isolated = True
        for rule in spec.get(field) or []:
            from_there = not rule.get(peers) or any(is_peer(p, namespace, other) for p in rule[peers])
            destination = other if egress else own
            through = not rule.get("ports") or any(
                is_port(port, protocol, number, destination) for port in rule["ports"]
            )
            if from_there and through:
                return True
    return not isolated


EXPRESSIONS = st.one_of(
    st.fixed_dictionaries(
        {
            "key": st.sampled_from(["app", "tier", "team"]),
            "operator": st.sampled_from(["In", "NotIn"]),
            "values": st.lists(st.sampled_from(["a", "b", "", "red"]), min_size=1, max_size=2),
        }
    ),
    st.fixed_dictionaries(
        {
            "key": st.sampled_from(["app", "tier", "team"]),
            "operator": st.sampled_from(["Exists", "DoesNotExist"]),
        }
    ),
)
SELECTORS: st.SearchStrategy[Body] = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"matchLabels": st.dictionaries(st.sampled_from(["app", "team"]), st.sampled_from(["a", "red"]))}
    ),
    st.fixed_dictionaries({"matchExpressions": st.lists(EXPRESSIONS, max_size=2)}),
)
PEERS = st.one_of(
    st.fixed_dictionaries({"podSelector": SELECTORS}),
    st.fixed_dictionaries({"namespaceSelector": SELECTORS}),
    st.fixed_dictionaries({"namespaceSelector": SELECTORS, "podSelector": SELECTORS}),
    st.sampled_from(
        [
            {"ipBlock": {"cidr": "10.1.0.0/30"}},
            {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.1.0.2/31", "192.0.2.0/24"]}},
            {"ipBlock": {"cidr": "::/0"}},
        ]
    ),
)
PORTS = st.sampled_from(
    [
        {},
        {"port": 80},
        {"port": 80, "protocol": "UDP"},
        {"port": "web"},
        {"port": "web", "protocol": "UDP"},
        {"protocol": "SCTP"},
        {"port": 79, "endPort": 81},
    ]
)


def rule_bodies(side: str) -> st.SearchStrategy[Body]:
    """Rules of one direction, with and without their fields."""
    return st.fixed_dictionaries(
        {}, optional={side: st.lists(PEERS, max_size=2), "ports": st.lists(PORTS, max_size=2)}
    )


SPECS = st.fixed_dictionaries(
    {},
    optional={
        "podSelector": SELECTORS,
        "ingress": st.none() | st.lists(rule_bodies("from"), max_size=2),
        "egress": st.none() | st.lists(rule_bodies("to"), max_size=2),
        "policyTypes": st.none() | st.lists(st.sampled_from(["Ingress", "Egress"]), max_size=2, unique=True),
    },
)


def manifests_of(specs: list[tuple[str, Body]]) -> list[Body]:
    """NetworkPolicies of these namespaces."""
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": f"p{n}", "namespace": namespace},
            "spec": spec,
        }
        for n, (namespace, spec) in enumerate(specs)
    ]


def cluster() -> list[Body]:
    """The pods and namespaces above as manifests."""
    found: list[Body] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
        for name, labels in NAMESPACES.items()
    ]
    for address, (namespace, labels, name, ports) in PODS.items():
        containers = [
            {"name": f"c{n}", "ports": [{"name": port, "protocol": protocol, "containerPort": number}]}
            for n, ((port, protocol), number) in enumerate(ports.items())
        ]
        found.append(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "namespace": namespace, "labels": labels},
                "spec": {"containers": containers},
                "status": {"podIP": address},
            }
        )
    return found


@given(st.lists(st.tuples(st.sampled_from(["x", "y"]), SPECS), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_engine_is_the_nine_rules(specs: list[tuple[str, Body]]) -> None:
    """Reader and engine give what a direct reading of the specification's nine rules gives."""
    policies = manifests_of(specs)
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": cluster() + policies})
    manifests = read([("random.json", text)])
    engine = Engine(manifests.policy_set, manifests.snapshot)

    for source in (*PODS, OUTSIDE):
        for destination in (*PODS, OUTSIDE):
            if source == destination:
                continue
            for protocol, number, port in (("TCP", TCP, 80), ("TCP", TCP, 81), ("UDP", UDP, 80)):
                flow = Flow(source=source, destination=destination, protocol=number, port=port)
                expected = side_allows(policies, source, destination, True, protocol, port) and side_allows(
                    policies, destination, source, False, protocol, port
                )
                assert engine.connect(flow).allowed is expected, flow
