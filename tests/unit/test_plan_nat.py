"""NAT as values: mappings to elements, who holds a host port, scripts that read like a transcript."""

from __future__ import annotations

import ipaddress
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from portwright.model.errors import Conflict, InvalidInput
from portwright.model.port import PortAddress, PortMapping
from portwright.plan import nat
from portwright.plan.publish import (
    HostPorts,
    Publication,
    Purge,
    conflicts,
    elements,
    loopback_access,
    missing,
    purges,
)

BOTH = (
    PortAddress(address="10.88.0.2", gateway="169.254.1.1"),
    PortAddress(address="fd88::2", gateway="fe80::1"),
)
V4, V6 = BOTH[:1], BOTH[1:]


def mapping(port: int = 8080, proto: str = "tcp", host_ip: str = "", to: int = 80) -> PortMapping:
    """Short for a mapping."""
    return PortMapping(host_port=port, container_port=to, protocol=proto, host_ip=host_ip)


def publication(
    holder: str, *mappings: PortMapping, addresses: tuple[PortAddress, ...] = BOTH
) -> Publication:
    """Short for a publication."""
    return Publication(holder=holder, mappings=mappings, addresses=addresses)


def texts(*mappings: PortMapping, addresses: tuple[PortAddress, ...] = BOTH) -> list[str]:
    """Each mapping element as ``set { text }``, hairpin pairs left out."""
    return [f"{e.set_name} {{ {e.text()} }}" for e in elements(mappings, addresses) if e.data]


@pytest.mark.parametrize(
    ("given_mapping", "addresses", "expected"),
    [
        (mapping(), BOTH, ["any4 { tcp . 8080 : 10.88.0.2 . 80 }", "any6 { tcp . 8080 : fd88::2 . 80 }"]),
        (mapping(), V4, ["any4 { tcp . 8080 : 10.88.0.2 . 80 }"]),
        (mapping(proto="udp"), V6, ["any6 { udp . 8080 : fd88::2 . 80 }"]),
        (mapping(host_ip="0.0.0.0"), BOTH, ["any4 { tcp . 8080 : 10.88.0.2 . 80 }"]),
        (mapping(host_ip="::"), BOTH, ["any6 { tcp . 8080 : fd88::2 . 80 }"]),
        (mapping(host_ip="192.0.2.1"), BOTH, ["bound4 { 192.0.2.1 . tcp . 8080 : 10.88.0.2 . 80 }"]),
        (mapping(host_ip="2001:DB8:0::1"), BOTH, ["bound6 { 2001:db8::1 . tcp . 8080 : fd88::2 . 80 }"]),
        (mapping(host_ip="::ffff:192.0.2.1"), BOTH, ["bound4 { 192.0.2.1 . tcp . 8080 : 10.88.0.2 . 80 }"]),
        (mapping(proto="sctp"), V4, ["any4 { sctp . 8080 : 10.88.0.2 . 80 }"]),
    ],
)
def test_a_mapping_is_one_element_in_each_family(
    given_mapping: PortMapping, addresses: tuple[PortAddress, ...], expected: list[str]
) -> None:
    """A mapping goes to the family of its host address, or to every family that the port has."""
    assert texts(given_mapping, addresses=addresses) == expected


def test_first_address_of_a_family_is_the_target() -> None:
    """Further addresses of a family are not published, as with the reference portmap; plain text will do."""
    found = elements([mapping()], ["10.88.0.2", "10.88.0.3", "fd88::2"])
    assert {e.data for e in found if e.data} == {("10.88.0.2", "80"), ("fd88::2", "80")}
    assert [e.key for e in found if not e.data] == [("10.88.0.2",) * 2, ("fd88::2",) * 2]


@pytest.mark.parametrize(
    ("given_mapping", "addresses", "field"),
    [
        (mapping(0), BOTH, "portMappings[0].hostPort"),
        (mapping(65536), BOTH, "portMappings[0].hostPort"),
        (mapping(to=0), BOTH, "portMappings[0].containerPort"),
        (mapping(proto="icmp"), BOTH, "portMappings[0].protocol"),
        (mapping(proto="tcp }; flush ruleset;"), BOTH, "portMappings[0].protocol"),
        (mapping(host_ip="localhost"), BOTH, "portMappings[0].hostIP"),
        (mapping(host_ip="fe80::1%eth0"), BOTH, "portMappings[0].hostIP"),
        (mapping(host_ip="224.0.0.1"), BOTH, "portMappings[0].hostIP"),
        (mapping(host_ip="192.0.2.1"), V6, "portMappings[0].hostIP"),
        (mapping(host_ip="::1"), V4, "portMappings[0].hostIP"),
        (mapping(), (), "portMappings[0].hostIP"),
        (mapping(), (PortAddress(address="10.0.0.0/8", gateway=""),), "addresses"),
    ],
)
def test_what_cannot_be_published_is_refused(
    given_mapping: PortMapping, addresses: tuple[PortAddress, ...], field: str
) -> None:
    """A mapping that is wrong, or that no address can serve, is refused by its field, never ignored."""
    with pytest.raises(InvalidInput) as caught:
        elements([given_mapping], addresses)
    assert caught.value.field == field


def test_one_port_cannot_map_a_host_port_twice() -> None:
    """The same host port twice in one request is an error of the request."""
    with pytest.raises(InvalidInput, match="8080/tcp"):
        elements([mapping(), mapping(to=81)], BOTH)


@pytest.mark.parametrize(
    ("held", "new", "clash"),
    [
        (mapping(), mapping(to=81), True),
        (mapping(), mapping(proto="udp"), False),
        (mapping(), mapping(8081), False),
        (mapping(), mapping(host_ip="192.0.2.1"), True),
        (mapping(host_ip="192.0.2.1"), mapping(), True),
        (mapping(host_ip="192.0.2.1"), mapping(host_ip="192.0.2.1"), True),
        (mapping(host_ip="192.0.2.1"), mapping(host_ip="192.0.2.2"), False),
        (mapping(host_ip="2001:db8::1"), mapping(host_ip="2001:0db8::0001"), True),
        (mapping(host_ip="0.0.0.0"), mapping(host_ip="::"), False),
        (mapping(host_ip="0.0.0.0"), mapping(), True),
        (mapping(host_ip="::1"), mapping(host_ip="127.0.0.1"), False),
    ],
)
def test_host_ports_collide_as_bind_would(held: PortMapping, new: PortMapping, clash: bool) -> None:
    """Equal host addresses collide, and "every address" collides with each; the error names the holder."""
    if not clash:
        conflicts([publication("first", held)], publication("second", new))
        return
    with pytest.raises(Conflict, match="held by port first") as caught:
        conflicts([publication("first", held)], publication("second", new))
    assert caught.value.kind == "host port"


def test_families_that_are_not_published_do_not_collide() -> None:
    """Two ports of one family each may share a host port number."""
    conflicts([publication("a", mapping(), addresses=V4)], publication("b", mapping(), addresses=V6))


def test_index_follows_claims_and_releases() -> None:
    """A refused claim changes nothing, one's own claim is no conflict, and a release frees its ports."""
    index = HostPorts([publication("a", mapping(), mapping(8081))])
    with pytest.raises(Conflict):
        index.claim(publication("b", mapping(9000), mapping(8081)))
    index.claim(publication("c", mapping(9000)))
    index.claim(publication("a", mapping(8080, host_ip="192.0.2.1")))  # a moves: 8081 is free now
    index.claim(publication("b", mapping(8081), mapping(8080, host_ip="192.0.2.2")))
    assert [p.holder for p in index.publications()] == ["c", "a", "b"]
    assert index.release("a") == publication("a", mapping(8080, host_ip="192.0.2.1"))
    assert index.release("a") is None
    index.claim(publication("d", mapping(8080, host_ip="192.0.2.1")))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c"]),
            st.integers(1, 3),
            st.sampled_from(["", "0.0.0.0", "::", "192.0.2.1", "2001:db8::1"]),
        ),
        max_size=12,
    )
)
def test_claims_never_share_a_kernel_element(claims: list[tuple[str, int, str]]) -> None:
    """Whatever claims are tried, those that were granted need no map key twice."""
    index = HostPorts()
    for holder, port, host_ip in claims:
        try:
            index.claim(publication(holder, mapping(port, host_ip=host_ip)))
        except Conflict:
            continue
    keys = [
        (e.set_name, e.key) for p in index.publications() for e in elements(p.mappings, p.addresses) if e.data
    ]
    assert len(keys) == len(set(keys))


def test_purges_of_an_added_mapping() -> None:
    """Only UDP is purged, by host port and host address, wherever it leads."""
    assert purges([mapping(), mapping(53, "udp"), mapping(54, "udp", "192.0.2.1")], BOTH, added=True) == [
        Purge(proto="udp", family=2, orig_dst_port=53),
        Purge(proto="udp", family=10, orig_dst_port=53),
        Purge(proto="udp", family=2, orig_dst_port=54, orig_dst="192.0.2.1"),
    ]


def test_purges_of_a_removed_mapping() -> None:
    """Every protocol is purged, but only what leads to this very target."""
    assert purges([mapping(), mapping(53, "udp", "192.0.2.1")], BOTH, added=False) == [
        Purge(proto="tcp", family=2, orig_dst_port=8080, reply_src="10.88.0.2", reply_src_port=80),
        Purge(proto="tcp", family=10, orig_dst_port=8080, reply_src="fd88::2", reply_src_port=80),
        Purge(
            proto="udp", family=2, orig_dst_port=53, orig_dst="192.0.2.1", reply_src="10.88.0.2",
            reply_src_port=80,
        ),
    ]  # fmt: skip


def test_loopback_needs_only_what_is_asked_for() -> None:
    """A mapping of every or of a loopback address asks for the loopback of its family, others for nothing."""
    rep = "pw0000001f"
    sysctl, route = (("net/ipv4/conf/pw0000001f/route_localnet", "1"),), (("::1/128", "local", 31),)
    both = loopback_access(rep, [mapping(), mapping(8081)], BOTH)
    assert (both.sysctls, both.local_routes) == (sysctl, route)
    four = loopback_access(rep, [mapping(host_ip="127.0.0.2")], BOTH)
    assert (four.sysctls, four.local_routes) == (sysctl, ())
    six = loopback_access(rep, [mapping(host_ip="::1")], BOTH)
    assert (six.sysctls, six.local_routes) == ((), route)
    none = loopback_access(rep, [mapping(host_ip="192.0.2.1")], BOTH)
    assert (none.sysctls, none.local_routes) == ((), ())


def test_loopback_routes_of_two_ports_differ() -> None:
    """Each representor's route has a metric of its own, never lo's 0; another's name is refused."""
    names = ["pw00000000", "pw00000002", "pwffffffff"]
    metrics = {loopback_access(name, [mapping()], BOTH).local_routes[0][2] for name in names}
    assert metrics == {1, 2, 0xFFFFFFFF}
    with pytest.raises(InvalidInput):
        loopback_access("eth0", [mapping()], BOTH)


@pytest.mark.parametrize("instance", ["a-b", "x" * 33, "a b", "é", "a;flush ruleset"])
def test_instance_names_are_checked(instance: str) -> None:
    """An instance's name can't be anything but a part of a table's name."""
    with pytest.raises(InvalidInput):
        nat.table_name(instance)


def test_scripts_read_like_a_transcript() -> None:
    """What is sent for a port is what a person would have typed."""
    assert nat.table_name() == "portwright"
    assert nat.port_elements_add("t1", [mapping()], BOTH, holder="0123456789abcdef").splitlines() == [
        'create element inet portwright_t1 any4 { tcp . 8080 comment "0123456789abcdef" : 10.88.0.2 . 80 }',
        'create element inet portwright_t1 any6 { tcp . 8080 comment "0123456789abcdef" : fd88::2 . 80 }',
        "add element inet portwright_t1 hairpin4 { 10.88.0.2 . 10.88.0.2 }",
        "add element inet portwright_t1 hairpin6 { fd88::2 . fd88::2 }",
    ]
    delete = nat.port_elements_delete("t1", [mapping(), mapping(81)], V4, remaining=[mapping(81)])
    assert delete.splitlines() == [
        "add element inet portwright_t1 any4 { tcp . 8080 : 10.88.0.2 . 80 }",
        "delete element inet portwright_t1 any4 { tcp . 8080 : 10.88.0.2 . 80 }",
    ]
    assert nat.each(delete) == [delete]
    assert len(nat.each(nat.port_elements_delete("t1", [mapping()], BOTH))) == 4
    assert nat.commands(nat.remove_table("")) == [
        "nft 'add table inet portwright'",
        "nft 'delete table inet portwright'",
    ]
    assert nat.port_elements_add("", [], BOTH) == nat.port_elements_delete("", [], BOTH) == ""


def test_a_holder_cannot_break_out_of_its_comment() -> None:
    """Whatever a holder is called, its comment is one short plain word."""
    script = nat.port_elements_add("", [mapping()], V4, holder='"}; flush ruleset\n' + "x" * 300)
    assert len(script.splitlines()) == 2
    assert script.count('"') == 2
    assert "flush ruleset" not in script


def test_subnets_are_declared_whole_and_without_overlaps() -> None:
    """Nested, doubled and neighbouring subnets become disjoint blocks; what is masqueraded is local, too."""
    script = nat.subnets("", ["10.1.0.0/16", "10.1.2.0/24", "fd01::/64"], ["10.2.0.0/25", "10.2.0.128/25"])
    assert script.splitlines() == [
        "flush set inet portwright local4",
        "add element inet portwright local4 { 10.1.0.0/16, 10.2.0.0/24 }",
        "flush set inet portwright local6",
        "add element inet portwright local6 { fd01::/64 }",
        "flush set inet portwright masq4",
        "add element inet portwright masq4 { 10.2.0.0/24 }",
        "flush set inet portwright masq6",
    ]
    for wrong in ("10.1.0.1/16", "x", "10.0.0.0/8 }; flush ruleset"):
        with pytest.raises(InvalidInput):
            nat.subnets("", [wrong], [])


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(8, 32)), max_size=20))
def test_subnet_blocks_cover_exactly_what_was_given(blocks: list[tuple[int, int]]) -> None:
    """The declared blocks are disjoint, and their union is the union of the subnets."""
    given_nets = [ipaddress.IPv4Network((a, length), strict=False) for a, length in blocks]
    line = [x for x in nat.subnets("", map(str, given_nets), []).splitlines() if "add element" in x]
    declared = [ipaddress.IPv4Network(t) for x in line for t in x.split("{ ")[1][:-2].split(", ")]
    assert not any(a.overlaps(b) for i, a in enumerate(declared) for b in declared[:i])
    assert all(any(net.subnet_of(d) for d in declared) for net in given_nets)
    assert list(ipaddress.collapse_addresses(given_nets)) == declared


def observed(*items: object, name: str = "any4", kind: str = "map") -> list[dict[str, object]]:
    """A set's JSON as libnftables 1.0.6 prints it."""
    return [{kind: {"family": "inet", "name": name, "table": "portwright", "elem": list(items)}}]


def test_observed_elements_are_read_with_and_without_comments() -> None:
    """Both shapes of a map's element, a set's plain element, a prefix and a range are understood."""
    pair = [{"concat": ["tcp", 8080]}, {"concat": ["10.88.0.2", 80]}]
    noted = [{"elem": {"val": {"concat": ["udp", 53]}, "comment": "p1"}}, {"concat": ["10.88.0.2", 53]}]
    found = nat.observed_elements(observed(pair, noted))
    assert [e.text(comment=True) for e in found] == [
        "tcp . 8080 : 10.88.0.2 . 80",
        'udp . 53 comment "p1" : 10.88.0.2 . 53',
    ]
    blocks = observed(
        "10.0.0.1", {"prefix": {"addr": "10.2.0.0", "len": 16}}, {"range": ["10.3.0.1", "10.3.0.9"]},
        name="masq4", kind="set",
    )  # fmt: skip
    assert [e.key for e in nat.observed_elements(blocks)] == [
        ("10.0.0.1",), ("10.2.0.0/16",), ("10.3.0.1-10.3.0.9",)
    ]  # fmt: skip
    assert nat.observed_elements(observed(pair, name="of a newer release")) == []
    assert missing(elements([mapping(), mapping(81)], V4), found) == [
        e for e in elements([mapping(81)], V4) if e.data or e.set_name == "hairpin4"
    ]


def test_strange_json_is_refused() -> None:
    """An element of no known shape is an error, not an element that is missing."""
    with pytest.raises(InvalidInput):
        nat.observed_elements(observed({"surprise": 1}))


def test_publications_survive_json() -> None:
    """A publication can be kept in a journal."""
    before = publication("a", mapping(), mapping(53, "udp", "192.0.2.1"))
    text = msgspec.json.encode(before)
    assert json.loads(text)["holder"] == "a"
    assert msgspec.json.decode(text, type=Publication) == before
