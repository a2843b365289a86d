"""What stands in the tables: services, classes, sharing, built-in rules, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from portwright.model.errors import InvalidInput
from portwright.policy import compile as compiler
from portwright.policy import limits
from portwright.policy.compile import compile_policies
from portwright.policy.labels import EVERYTHING, Has, In
from portwright.policy.ranges import complement, contains, intersect, subtract, union
from portwright.policy.rules import (
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
from portwright.policy.services import EPHEMERAL, SERVICES_END, service_of, service_text, traffic_services
from portwright.policy.tables import LOCAL_NODE, MAX_INTERVALS, OWN_ADDRESS, PolicyTooLarge, lookup
from tests.fix_worlds import flows, traffics

ranges = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6))).map(
    lambda pairs: union((first, first + size) for first, size in pairs)
)


@given(left=ranges, right=ranges)
def test_ranges_are_sets(left: tuple[tuple[int, int], ...], right: tuple[tuple[int, int], ...]) -> None:
    """The algebra of ranges is that of sets of numbers, and equal sets are equal values."""
    one = {n for first, end in left for n in range(first, end)}
    other = {n for first, end in right for n in range(first, end)}

    def as_ranges(numbers: set[int]) -> tuple[tuple[int, int], ...]:
        return union((n, n + 1) for n in numbers)

    assert as_ranges(one | other) == union((*left, *right))
    assert as_ranges(one & other) == intersect(left, right)
    assert as_ranges(one - other) == subtract(left, right)
    assert as_ranges(set(range(40)) - one) == complement(left, 40)
    assert [contains(left, n) for n in range(40)] == [n in one for n in range(40)]


@pytest.mark.parametrize(
    ("flow", "service", "text"),
    [
        ((6, 80, None, None), 80, "tcp 80"),
        ((17, 53, None, None), 1 << 16 | 53, "udp 53"),
        ((132, 65_535, None, None), 2 << 16 | 65_535, "sctp 65535"),
        ((1, None, 8, 0), 3 << 16 | 8 << 8, "icmp type 8 code 0"),
        ((58, None, 1, 4), 4 << 16 | 1 << 8 | 4, "icmp6 type 1 code 4"),
        ((47, None, None, None), 5 << 16 | 47, "protocol 47"),
        ((6, None, None, None), 6 << 16 | 6, "later fragments of protocol 6"),
        ((1, None, None, None), 6 << 16 | 1, "later fragments of protocol 1"),
    ],
)
def test_service_numbers(
    flow: tuple[int, int | None, int | None, int | None], service: int, text: str
) -> None:
    """A packet's service is the number that the data path is told to compute, and reads as what it is."""
    protocol, port, kind, code = flow
    found = service_of(
        Flow(source="::1", destination="::2", protocol=protocol, port=port, icmp_type=kind, icmp_code=code)
    )

    assert found == service
    assert service_text(service, service + 1) == text


@given(traffic=traffics)
def test_traffic_is_ranges_of_services(traffic: Traffic) -> None:
    """Traffic means exactly the services of the flows that its fields are true of, when nothing has names."""
    found = traffic_services(traffic, lambda _name, _protocol: ())

    assert all(0 <= first < end <= SERVICES_END for first, end in found)
    for flow in flows(EPHEMERAL)[:30]:
        expected = (
            (traffic.protocol in {None, flow.protocol})
            and (
                not (traffic.ports or traffic.names)
                or any(flow.port in r for r in traffic.ports if flow.port is not None)
            )
            and traffic.icmp_type in {None, flow.icmp_type}
            and traffic.icmp_code in {None, flow.icmp_code}
        )
        assert contains(found, service_of(flow)) == expected, flow


def rule(**fields: object) -> Rule:
    """An allow rule."""
    return Rule(**{"action": Action.ALLOW, **fields})  # type: ignore[arg-type]


def policy(name: str = "p", **fields: object) -> Policy:
    """A policy of everybody in the default tier."""
    given_ = {"kind": "NetworkPolicy", "name": name, "tier": "default", "order": 1.0, "subject": EVERYTHING}
    return Policy(**{**given_, **fields})  # type: ignore[arg-type]


def world(count: int, **fields: object) -> Snapshot:
    """Workloads in both families with a label that half of them have."""
    return Snapshot(
        endpoints=tuple(
            Endpoint(
                name=f"w{i}",
                labels={"name": f"w{i}", **({"half": ""} if i % 2 else {})},
                addresses=(f"10.0.{i >> 8}.{i & 255}", f"fd00::{i:x}"),
                **fields,  # type: ignore[arg-type]
            )
            for i in range(count)
        )
    )


def tcp(*ports: int) -> tuple[Traffic, ...]:
    """TCP to these ports."""
    return (Traffic(protocol=6, ports=tuple(PortRange(p, p) for p in ports)),)


def test_replicas_share_one_set() -> None:
    """200 workloads under the same policies have one set per direction, and make two classes of peers."""
    allow = rule(peers=(Peer(selector=Has("half")),), traffic=tcp(80))
    compiled = compile_policies(PolicySet(policies=(policy(ingress=(allow,), egress=()),)), world(200))

    assert compiled.size.sets == 2
    assert compiled.size.classes == 2
    assert compiled.size.cells == 1
    assert {entry.set_in for entry in compiled.addresses.values()} == {1}


def test_exceptions_of_nets_are_classes() -> None:
    """Nested nets and their exceptions become classes: where the same rules hold it is the same class."""
    nets = Peer(nets=("10.0.0.0/8",), not_nets=("10.1.0.0/16",))
    more = Peer(nets=("10.1.2.0/24", "192.0.2.0/24"), not_nets=("10.1.2.128/25",))
    same = Peer(nets=("10.2.0.0/16", "10.0.0.0/8"), not_nets=("10.1.0.0/16",))
    rules = (rule(peers=(nets,)), rule(peers=(more,)), rule(peers=(same,)))
    compiled = compile_policies(PolicySet(policies=(policy(egress=rules),)), world(1))
    classes = compiled.prefixes

    nested = ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.128/25", "192.0.2.0/24"]
    assert sorted(classes) == ["0.0.0.0/0", *nested]
    assert classes["10.1.0.0/16"] == classes["10.1.2.128/25"] == classes["0.0.0.0/0"] == 0
    assert classes["10.1.2.0/24"] == classes["192.0.2.0/24"] != classes["10.0.0.0/8"]


def test_whole_family_needs_no_cells() -> None:
    """A rule for 0.0.0.0/0 and ::/0 is one for anybody: it is the default, not a cell of each class."""
    anybody = rule(peers=(Peer(nets=("0.0.0.0/0", "::/0")),), traffic=tcp(443))
    by_name = tuple(
        rule(peers=(Peer(selector=In("name", frozenset({f"w{i}"}))),), traffic=tcp(80)) for i in range(9)
    )
    compiled = compile_policies(PolicySet(policies=(policy(egress=(anybody, *by_name)),)), world(10))

    assert (compiled.size.cells, compiled.prefixes) == (9, {"0.0.0.0/0": 0})


def test_services_that_behave_alike_are_one_class() -> None:
    """80 and 443 under one rule are one class of ports, and so are all that no rule names."""
    compiled = compile_policies(
        PolicySet(policies=(policy(ingress=(rule(traffic=tcp(80, 443)),)),)), world(1)
    )
    table = compiled.sets[1]

    assert table.starts == (0, 80, 81, 443, 444)
    assert table.port_classes == (0, 1, 0, 1, 0)
    assert [verdict.allow for verdict in table.defaults] == [False, True]


def test_named_port_is_the_destinations() -> None:
    """An egress rule by a port's name means, of each peer, the number that this peer gives to it."""
    one, two = (
        Endpoint(name=n, addresses=(a,), named_ports=(NamedPort("web", 6, p),))
        for n, a, p in (("one", "10.0.0.1", 80), ("two", "10.0.0.2", 8080))
    )
    by_name = rule(traffic=(Traffic(protocol=6, names=("web",)),))
    compiled = compile_policies(
        PolicySet(policies=(policy(egress=(by_name,)),)), Snapshot(endpoints=(one, two))
    )

    def allowed(source: str, destination: str, port: int) -> bool:
        return lookup(compiled, Flow(source=source, destination=destination, protocol=6, port=port)).allowed

    assert [allowed("10.0.0.1", "10.0.0.2", port) for port in (80, 8080)] == [False, True]
    assert [allowed("10.0.0.2", "10.0.0.1", port) for port in (80, 8080)] == [True, False]


def test_built_in_rules_have_names() -> None:
    """Own address and local node are allowed by rules of their own, whatever the policies deny."""
    node = Endpoint(name="n", kind=EndpointKind.NODE, addresses=("192.0.2.1",), local_node=True)
    snapshot = Snapshot(endpoints=(*world(1).endpoints, node))
    compiled = compile_policies(PolicySet(policies=(policy(ingress=(), egress=()),)), snapshot)
    own = lookup(compiled, Flow(source="10.0.0.0", destination="10.0.0.0", protocol=6, port=1))
    probe = lookup(compiled, Flow(source="192.0.2.1", destination="10.0.0.0", protocol=6, port=1))
    back = lookup(compiled, Flow(source="10.0.0.0", destination="192.0.2.1", protocol=6, port=1))

    assert own.egress is not None
    assert probe.ingress is not None
    assert (own.egress.rule, probe.ingress.rule) == (OWN_ADDRESS, LOCAL_NODE)
    assert (own.allowed, probe.allowed, back.allowed) == (True, True, False)


def test_rules_have_names_and_places() -> None:
    """Each verdict's rule number leads to its policy, direction, place in the list and meaning."""
    compiled = compile_policies(
        PolicySet(policies=(policy(namespace="shop", ingress=(rule(traffic=tcp(80)),)),)), world(1)
    )
    asked = (
        lookup(compiled, Flow(source="192.0.2.9", destination="10.0.0.0", protocol=6, port=port)).ingress
        for port in (80, 81)
    )

    titles = [compiled.rules[verdict.rule].title for verdict in asked if verdict is not None]
    assert titles == ["NetworkPolicy shop/p ingress[0]", "tier-default default ingress"]


@pytest.mark.parametrize("flag", ["do_not_track", "pre_dnat", "apply_on_forward"])
def test_policies_of_host_interfaces_are_kept_apart(flag: str) -> None:
    """Policies for the host interfaces' stages come out untouched; the first two select no workload."""
    given_ = msgspec.structs.replace(policy(ingress=()), **{flag: True})
    compiled = compile_policies(PolicySet(policies=(given_,)), world(1))

    assert compiled.host_policies == (given_,)
    assert compiled.size.sets == (1 if flag == "apply_on_forward" else 0)


def test_staged_policies_are_left_out() -> None:
    """A staged policy is in no table, and its faults stop nobody."""
    bad = policy(staged=True, ingress=(rule(traffic=(Traffic(source_ports=(PortRange(1, 1),)),)),))

    assert compile_policies(PolicySet(policies=(bad,)), world(1)).size.sets == 0


def from_ports(*ranges: tuple[int, int], names: tuple[str, ...] = ()) -> Traffic:
    """TCP from these ports."""
    return Traffic(protocol=6, source_ports=tuple(PortRange(*pair) for pair in ranges), source_names=names)


def test_source_ports_cut_a_set_into_sets() -> None:
    """One set for each stretch of source ports that the rules treat alike, shared by equal stretches; a
    packet's protocol counts, and one whose ports are not known is of no stretch that is asked for."""
    asks = rule(traffic=(from_ports((1000, 1999), (3000, 3999)),))
    compiled = compile_policies(PolicySet(policies=(policy(ingress=(asks,)),)), world(1))

    ((number, split),) = compiled.splits.items()
    assert split.starts == (0, 1000, 2000, 3000, 4000)
    assert (split.sets[0], split.sets[1]) == (split.sets[2], split.sets[3]) == (split.sets[4], split.sets[1])
    assert {*split.sets} == {*compiled.sets}
    assert {entry.set_in for entry in compiled.addresses.values()} == {number}
    allowed = {
        (protocol, source)
        for protocol in (6, 17)
        for source in (None, 999, 1000, 1999, 2000, 3000)
        if lookup(
            compiled,
            Flow(source="192.0.2.1", destination="10.0.0.0", protocol=protocol, source_port=source, port=80),
        ).allowed
    }
    assert allowed == {(6, 1000), (6, 1999), (6, 3000)}


def test_rules_without_source_ports_cut_nothing() -> None:
    """Not where a rule that asks for them decides nothing either."""
    open_ = rule()
    dead = rule(traffic=(Traffic(protocol=6, source_names=("nobody",)),))

    assert compile_policies(PolicySet(policies=(policy(ingress=(open_,)),)), world(1)).splits == {}
    assert compile_policies(PolicySet(policies=(policy(ingress=(dead,)),)), world(1)).splits == {}


def test_too_many_source_ports_name_their_policy() -> None:
    """More stretches than the data path searches are refused with the policy that adds most."""
    many = rule(traffic=(from_ports(*((port, port) for port in range(10, 1000, 4))),))
    with pytest.raises(PolicyTooLarge) as caught:
        compile_policies(PolicySet(policies=(policy(ingress=(many,)),)), world(1))
    assert (caught.value.what, caught.value.policy) == (
        "intervals of source ports for one endpoint",
        "NetworkPolicy p",
    )
    assert caught.value.need > caught.value.limit


def test_address_of_two_is_refused() -> None:
    """Two workloads of one address have no one policy; both are named."""
    twins = Snapshot(endpoints=tuple(Endpoint(name=n, addresses=("10.0.0.1",)) for n in ("a", "b")))

    with pytest.raises(InvalidInput, match=r"endpoint b: addresses: a has it too.*10\.0\.0\.1"):
        compile_policies(PolicySet(), twins)


def test_unknown_tier_is_refused() -> None:
    """A policy of a tier that is not there is not silently left out."""
    with pytest.raises(InvalidInput, match="no such tier"):
        compile_policies(PolicySet(tiers=(Tier(name="x", order=1.0),), policies=(policy(),)), world(1))


def test_too_many_cells_names_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is made, a policy that needs too many cells is refused by name, with the product."""
    monkeypatch.setattr(compiler, "MAX_CELLS", 200)
    each = tuple(
        rule(peers=(Peer(selector=In("name", frozenset({f"w{i}"}))),), traffic=tcp(i, 100 + i))
        for i in range(20)
    )
    wide = tuple(rule(peers=(Peer(selector=Has("half")),), traffic=tcp(1000 + i)) for i in range(20))
    small, big = policy("small", ingress=each), policy("big", ingress=(*each, *wide))

    assert compile_policies(PolicySet(policies=(small,)), world(40)).size.cells == 20
    with pytest.raises(PolicyTooLarge) as caught:
        compile_policies(PolicySet(policies=(big, policy("other", egress=()))), world(900))
    assert (caught.value.what, caught.value.limit, caught.value.policy) == ("cells", 200, "NetworkPolicy big")
    assert caught.value.need == 20 + 20 * 11
    assert "classes of ports" in caught.value.why


@pytest.mark.parametrize(("ports", "fits"), [((MAX_INTERVALS - 1) // 2, True), (MAX_INTERVALS, False)])
def test_too_many_ports_names_the_policy(ports: int, fits: bool) -> None:
    """A set has at most 255 intervals of services: 127 ports that stand alone; more name the policy."""
    many = policy("many", ingress=(rule(traffic=tcp(*range(1, 2 * ports, 2))),))
    policies = PolicySet(policies=(policy("few", ingress=(rule(traffic=tcp(7)),)), many))

    if fits:
        assert compile_policies(policies, world(1)).size.intervals == 2 * ports + 1
        return
    with pytest.raises(PolicyTooLarge, match="NetworkPolicy many adds") as caught:
        compile_policies(policies, world(1))
    assert caught.value.facts()["limit"] == MAX_INTERVALS


@pytest.mark.parametrize(
    ("limit", "what"),
    [
        ("MAX_PREFIXES", "prefixes"),
        ("MAX_CLASSES", "peer classes"),
        ("MAX_SETS", "sets"),
        ("MAX_ADDRESSES", "addresses"),
    ],
)
def test_each_table_has_its_limit(monkeypatch: pytest.MonkeyPatch, limit: str, what: str) -> None:
    """Every other table that would overflow is named, with the policy that asks for most."""
    nets = tuple(rule(peers=(Peer(nets=(f"172.16.{i}.0/24",)),), traffic=tcp(i)) for i in range(30))
    policies = PolicySet(
        policies=(
            *(
                policy(f"p{i}", subject=In("name", frozenset({f"w{i}"})), ingress=(rule(),))
                for i in range(12)
            ),
            policy("nets", egress=nets),
        )
    )
    compile_policies(policies, world(12))
    monkeypatch.setattr(limits, limit, 5)

    with pytest.raises(PolicyTooLarge, match="NetworkPolicy nets asks for 30") as caught:
        compile_policies(policies, world(12))
    assert (caught.value.what, caught.value.limit) == (what, 5)


def test_dead_rules_cost_nothing() -> None:
    """What stands after a rule for everything of everybody makes neither intervals nor classes."""
    dead = (rule(peers=(Peer(selector=Has("half")),), traffic=tcp(*range(1, 600, 2))),)
    compiled = compile_policies(PolicySet(policies=(policy(ingress=(rule(), *dead)),)), world(4))

    assert (compiled.size.intervals, compiled.size.classes, compiled.size.cells) == (1, 1, 0)


@pytest.mark.parametrize("count", [10, 1_000, 10_000])
def test_cells_grow_with_the_rules_alone(count: int, record_property: Callable[[str, object], None]) -> None:
    """N rules for N nets are N cells and N prefixes beside IPv4's root, whomever the policy selects."""
    nets = tuple(
        rule(
            peers=(Peer(nets=(f"172.{16 + (i >> 16)}.{i >> 8 & 255}.{i & 255}/32",)),),
            traffic=tcp(80 + i % 5),
        )
        for i in range(count)
    )
    started = time.process_time()
    compiled = compile_policies(PolicySet(policies=(policy(ingress=nets),)), world(20))
    took = time.process_time() - started

    record_property("compile_seconds", took)
    print(f"{count} rules: {took:.3f} s, {compiled.size}")
    assert compiled.size.cells == count
    assert compiled.size.prefixes == count + 1
    assert compiled.size.sets == 2


def test_thousand_endpoints(record_property: Callable[[str, object], None]) -> None:
    """1,000 workloads under 100 policies of ten each compile in under three seconds of processor time."""
    by_name = tuple(
        policy(
            f"p{i}",
            subject=In("name", frozenset(f"w{10 * i + n}" for n in range(10))),
            ingress=(rule(peers=(Peer(selector=In("name", frozenset({f"w{i}"}))),), traffic=tcp(80)),),
            egress=(rule(peers=(Peer(nets=("0.0.0.0/0",), not_nets=("10.0.0.0/8",)),), traffic=tcp(443)),),
        )
        for i in range(100)
    )
    snapshot = world(1_000)
    started = time.process_time()
    compiled = compile_policies(PolicySet(policies=by_name), snapshot)
    took = time.process_time() - started

    record_property("compile_seconds", took)
    print(f"1,000 workloads, 100 policies: {took:.3f} s, {compiled.size}")
    assert took < 3
    assert (
        compiled.size.sets == 201
    )  # per policy: in, and out for IPv4; for IPv6 nothing is allowed out, which is one


def test_policies_of_different_subjects_stay_in_order() -> None:
    """A later policy with the first one's subject does not overtake the one between them."""
    everybody, named = EVERYTHING, In("name", frozenset({"w0"}))
    policies = (
        policy("a", subject=everybody, order=1.0, ingress=(rule(traffic=tcp(1)),)),
        policy("b", subject=named, order=2.0, ingress=(rule(action=Action.DENY),)),
        policy("c", subject=everybody, order=3.0, ingress=(rule(),)),
    )
    compiled = compile_policies(PolicySet(policies=policies), world(2))
    flow = Flow(source="192.0.2.1", destination="10.0.0.0", protocol=6, port=80)

    assert not lookup(compiled, flow).allowed
