"""Links, addresses, routes and neighbours: what we make and what we read is what ip sees."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from portwright.kernel import rtnl
from portwright.kernel.netlink import NetlinkSocket, Request, RequestFailed
from portwright.kernel.rtnl import LinkInfo
from portwright.model.errors import InvalidInput
from tests.deadline import wait_until
from tests.fix_netns import NetnsFactory, TestNetns

pytestmark = pytest.mark.netns

MAC, PEER_MAC = "ee:ee:ee:ee:ee:ee", "02:00:00:00:00:01"
BOTH = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])


class Pair:
    """A veth pair between two fresh namespaces, with a socket in each."""

    def __init__(self, host: TestNetns, sandbox: TestNetns) -> None:
        self.host, self.sandbox = host, sandbox
        self.h, self.s = NetlinkSocket(netns_fd=host.fd), NetlinkSocket(netns_fd=sandbox.fd)
        self.h.execute([veth("pw1", sandbox.fd)])
        self.rep = index_of(self.h, "pw1")
        self.dev = index_of(self.s, "eth0")


@pytest.fixture
def pair(netns_factory: NetnsFactory) -> Iterator[Pair]:
    made = Pair(netns_factory(), netns_factory())
    with made.h, made.s:
        yield made


def veth(name: str, peer_netns_fd: int, **more: int) -> Request:
    return rtnl.veth_create(
        name,
        mac=MAC,
        mtu=1500,
        peer_name="eth0",
        peer_mac=PEER_MAC,
        peer_mtu=1400,
        peer_netns_fd=peer_netns_fd,
        **more,
    )


def index_of(sock: NetlinkSocket, name: str) -> int:
    link = rtnl.link_by_name(sock, name)
    assert link is not None
    return link.index


def ip(ns: TestNetns, *arguments: str) -> list[dict[str, Any]]:
    """What iproute2 sees: the independent witness."""
    return json.loads(ns.run(["ip", "-json", "-details", *arguments]).stdout or "[]")  # type: ignore[no-any-return]


def test_a_veth_pair_is_born_with_everything_it_was_given(netns_factory: NetnsFactory) -> None:
    """Names, MACs, MTUs, both indexes and the peer's namespace, in one request, seen by ip."""
    host, sandbox = netns_factory(), netns_factory()
    with NetlinkSocket(netns_fd=host.fd) as sock:
        sock.execute([veth("pw1", sandbox.fd, index=1001, peer_index=1002)])
    (rep,) = ip(host, "link", "show", "pw1")
    (dev,) = ip(sandbox, "link", "show", "eth0")
    assert (rep["ifindex"], rep["address"], rep["mtu"]) == (1001, MAC, 1500)
    assert (dev["ifindex"], dev["address"], dev["mtu"]) == (1002, PEER_MAC, 1400)
    assert rep["linkinfo"]["info_kind"] == "veth"
    assert "UP" not in rep["flags"] + dev["flags"]
    assert [link["ifname"] for link in ip(host, "link", "show")] == ["lo", "pw1"]


def test_a_taken_name_or_index_is_refused_without_traces(pair: Pair) -> None:
    """EEXIST, and neither end of the refused pair is anywhere."""
    for request in (veth("pw1", pair.sandbox.fd), veth("pw2", pair.host.fd, index=pair.rep)):
        with pytest.raises(RequestFailed) as caught:
            pair.h.execute([request])
        assert caught.value.errno in (errno.EEXIST, errno.EBUSY)
    assert len(rtnl.links(pair.h)) == len(rtnl.links(pair.s)) == 2


def test_everything_about_a_link_is_read(pair: Pair) -> None:
    """LinkInfo agrees with ip for every field, by index, name, short and long altname, and in the list."""
    long = "portwright-port-" + "x" * 80
    pair.h.execute(
        [
            rtnl.link_set("pw1", alias="pod a/b", txqlen=77, addrgenmode="none", up=True),
            rtnl.altname_add("pw1", ["short-alt", long]),
        ]
    )
    pair.s.execute([rtnl.link_set(pair.dev, up=True)])

    def carried() -> LinkInfo | None:
        return next((i for i in rtnl.links(pair.h) if i.name == "pw1" and i.operstate == "up"), None)

    info = wait_until(carried, why="carrier")
    assert info is not None
    (seen,) = ip(pair.host, "link", "show", "pw1")
    assert info.altnames == ("short-alt", long) == tuple(seen["altnames"])
    assert info.alias == "pod a/b" == seen["ifalias"]
    assert (info.mac, info.mtu, info.kind) == (seen["address"], seen["mtu"], "veth")
    assert info.txqlen == 77 == seen["txqlen"]
    assert (info.link_index, info.link_netnsid) == (pair.dev, seen["link_netnsid"])
    assert info.up
    assert info.carrier
    assert info.gso_max_size == seen["gso_max_size"]
    assert seen["inet6_addr_gen_mode"] == "none"
    assert info.master == 0
    for found in (
        rtnl.link_by_index(pair.h, pair.rep),
        *(rtnl.link_by_name(pair.h, name) for name in ("pw1", "short-alt", long)),
    ):
        assert found is not None
        assert (found.index, found.altnames) == (info.index, info.altnames)


def test_an_absent_link_is_none_or_enodev(pair: Pair) -> None:
    """Readers return None or nothing; changes are refused with ENODEV."""
    assert rtnl.link_by_name(pair.h, "nobody") is None
    assert rtnl.link_by_name(pair.h, "a-very-long-name-of-nobody") is None
    assert rtnl.link_by_index(pair.h, 999_999) is None
    assert rtnl.addresses(pair.h, 999_999) == []
    assert rtnl.neighbours(pair.h, 999_999) == []
    assert rtnl.routes(pair.h, oif=999_999) == []
    for request in (rtnl.link_set("nobody", up=True), rtnl.link_del(999_999)):
        with pytest.raises(RequestFailed) as caught:
            pair.h.execute([request])
        assert caught.value.errno == errno.ENODEV


def test_links_change_and_move(pair: Pair) -> None:
    """Rename, MAC, MTU, alias away, altname away, release and move to another namespace."""
    pair.h.execute([rtnl.link_set(pair.rep, alias="x"), rtnl.altname_add(pair.rep, ["alt1", "alt2"])])
    pair.h.execute(
        [
            rtnl.link_set(pair.rep, name="pw2", mac="02:00:00:00:00:09", mtu=1300, alias=""),
            rtnl.altname_del(pair.rep, ["alt1"]),
        ]
    )
    info = rtnl.link_by_index(pair.h, pair.rep)
    assert info is not None
    assert (info.name, info.mac, info.mtu, info.alias) == ("pw2", "02:00:00:00:00:09", 1300, "")
    assert info.altnames == ("alt2",)

    pair.host.run(["ip", "link", "add", "br0", "type", "bridge"])
    bridge = index_of(pair.h, "br0")
    pair.h.execute([rtnl.link_set("pw2", master=bridge)])
    assert [i.name for i in rtnl.links(pair.h) if i.master == bridge] == ["pw2"]
    pair.h.execute([rtnl.link_set("pw2", master=0)])
    assert not [i for i in rtnl.links(pair.h) if i.master]

    pair.h.execute([rtnl.link_set(pair.rep, netns_fd=pair.sandbox.fd, name="moved")])
    assert rtnl.link_by_name(pair.h, "pw2") is None
    assert rtnl.link_by_name(pair.s, "moved") is not None


def test_deleting_one_end_takes_the_other(pair: Pair) -> None:
    """Both ends are gone once the delete is acknowledged."""
    pair.h.execute([rtnl.link_del("pw1")])
    assert [i.name for i in rtnl.links(pair.h) + rtnl.links(pair.s)] == ["lo", "lo"]


def test_a_group_is_deleted_as_one_and_nothing_else(netns_factory: NetnsFactory) -> None:
    """Every link of the group goes, the others stay; group 0, where everything is, is refused."""
    host = netns_factory()
    sandboxes = [netns_factory() for _ in range(4)]
    with NetlinkSocket(netns_fd=host.fd) as sock:
        sock.execute([veth(f"pw{n}", ns.fd) for n, ns in enumerate(sandboxes)])
        sock.execute([rtnl.link_set(f"pw{n}", group=7777) for n in range(3)])
        sock.execute([rtnl.link_del_group(7777)])
        assert [i.name for i in rtnl.links(sock)] == ["lo", "pw3"]
        with pytest.raises(RequestFailed) as caught:
            sock.execute([rtnl.link_del_group(7777)])
        assert caught.value.errno == errno.ENODEV
    with pytest.raises(InvalidInput):
        rtnl.link_del_group(0)


def test_a_long_list_of_links_is_read_whole(netns_factory: NetnsFactory) -> None:
    """A dump of many datagrams misses none and invents none."""
    host, sandbox = netns_factory(), netns_factory()
    names = [f"pw{n}" for n in range(60)]
    with NetlinkSocket(netns_fd=host.fd) as sock, NetlinkSocket(netns_fd=sandbox.fd) as other:
        sock.execute(
            [
                rtnl.veth_create(
                    n, mac=MAC, mtu=1500, peer_name=n, peer_mac=MAC, peer_mtu=1500, peer_netns_fd=sandbox.fd
                )
                for n in names
            ]
        )
        assert [i.name for i in rtnl.links(sock)] == ["lo", *names]
        assert [i.name for i in rtnl.links(sock, stats=False)] == ["lo", *names]
        other.execute([*(rtnl.link_set(n, group=7777) for n in names), rtnl.link_del_group(7777)])


def test_counters_are_the_devices(pair: Pair) -> None:
    """What the sandbox sends is received on the representor."""
    pair.h.execute([rtnl.link_set("pw1", up=True, addrgenmode="none")])
    pair.s.execute(
        [
            rtnl.link_set(pair.dev, up=True, addrgenmode="none"),
            rtnl.addr_add(pair.dev, "10.0.0.2/24"),
            rtnl.neigh_replace(pair.dev, "10.0.0.1", MAC),
        ]
    )
    # A carrier that is only just coming up still drops what is sent.
    wait_until(lambda: all(i.operstate == "up" for i in rtnl.links(pair.s)[1:]), why="carrier")
    before = rtnl.link_by_index(pair.h, pair.rep)
    with pair.sandbox.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for _ in range(5):
            udp.sendto(b"x" * 100, ("10.0.0.1", 9))
    assert before is not None

    def received() -> bool:
        # At least: the sandbox's kernel may have said something of its own (MLD).
        now = rtnl.link_by_index(pair.h, pair.rep)
        assert now is not None
        packets = now.stats64.rx_packets - before.stats64.rx_packets
        return packets >= 5 and now.stats64.rx_bytes - before.stats64.rx_bytes >= 5 * 142

    wait_until(received, why="five packets")
    assert {i.stats64 for i in rtnl.links(pair.h, stats=False)} == {rtnl.LinkStats()}


@BOTH
def test_addresses_come_and_go(pair: Pair, family: int) -> None:
    """Usable at once (nodad), with the prefix, scope and flags given; EEXIST twice; gone after del."""
    cidr = "10.0.0.2/24" if family == socket.AF_INET else "fd00::2/64"
    pair.s.execute(
        [
            rtnl.link_set(pair.dev, up=True, addrgenmode="none"),
            rtnl.addr_add(pair.dev, cidr, noprefixroute=True),
        ]
    )
    (info,) = [a for a in rtnl.addresses(pair.s, pair.dev) if a.family == family]
    assert f"{info.address}/{info.prefixlen}" == cidr
    assert (info.index, info.scope) == (pair.dev, 0)
    assert not info.flags & 0x40  # IFA_F_TENTATIVE
    assert rtnl.routes(pair.s, table=254, family=family) == []
    with pytest.raises(RequestFailed) as caught:
        pair.s.execute([rtnl.addr_add(pair.dev, cidr)])
    assert caught.value.errno == errno.EEXIST
    pair.s.execute([rtnl.addr_del(pair.dev, cidr)])
    assert rtnl.addresses(pair.s, pair.dev) == []
    with pytest.raises(RequestFailed) as caught:
        pair.s.execute([rtnl.addr_del(pair.dev, cidr)])
    assert caught.value.errno == errno.EADDRNOTAVAIL


@BOTH
def test_a_routed_sandbox_gets_its_routes(pair: Pair, family: int) -> None:
    """Default via an on-link gateway with MTU and advmss, a metric, a table over 255, an unreachable one."""
    four = family == socket.AF_INET
    cidr, gw = ("10.0.0.2/32", "169.254.1.1") if four else ("fd00::2/128", "fe80::1")
    default, net, dead = (
        ("0.0.0.0/0", "10.9.0.0/16", "10.8.0.0/16") if four else ("::/0", "fd09::/16", "fd08::/16")
    )
    pair.s.execute(
        [
            rtnl.link_set(pair.dev, up=True, addrgenmode="none"),
            rtnl.addr_add(pair.dev, cidr),
            rtnl.route_add(
                default, oif=pair.dev, gw=gw, onlink=True, mtu=1300, advmss=1200, src=cidr.split("/")[0]
            ),
            rtnl.route_add(net, oif=pair.dev, priority=50, table=70_000),
            rtnl.route_add(dead, type="unreachable"),
            rtnl.neigh_replace(pair.dev, gw, MAC),
        ]
    )
    main = {r.dst: r for r in rtnl.routes(pair.s, table=254, family=family)}
    route = main[default]
    assert (route.gw, route.oif, route.mtu, route.advmss) == (gw, pair.dev, 1300, 1200)
    assert (route.src, route.proto, route.type) == (cidr.split("/")[0], rtnl.RTPROT_STATIC, "unicast")
    assert main[dead].type == "unreachable"
    assert net not in main
    (other,) = rtnl.routes(pair.s, table=70_000)
    assert (other.dst, other.priority, other.table, other.oif) == (net, 50, 70_000, pair.dev)
    assert net in {r.dst for r in rtnl.routes(pair.s, oif=pair.dev)}
    flag = "-4" if four else "-6"
    assert any(r["dst"] == "default" and r["gateway"] == gw for r in ip(pair.sandbox, flag, "route"))
    (neigh,) = [n for n in rtnl.neighbours(pair.s, pair.dev) if n.family == family and n.address == gw]
    assert (neigh.mac, neigh.state) == (MAC, 0x80)

    replaced = rtnl.route_replace(default, oif=pair.dev, gw=gw, onlink=True, mtu=1250)
    pair.s.execute([replaced, rtnl.route_del(net, table=70_000), rtnl.neigh_del(pair.dev, gw)])
    (route,) = [r for r in rtnl.routes(pair.s, table=254, family=family) if r.dst == default]
    assert route.mtu == 1250
    assert rtnl.routes(pair.s, table=70_000) == []
    assert not [n for n in rtnl.neighbours(pair.s, pair.dev) if n.address == gw and n.state == 0x80]
    with pytest.raises(RequestFailed) as caught:
        pair.s.execute([rtnl.route_del(net, table=70_000)])
    assert caught.value.errno in (errno.ESRCH, errno.ENOENT)


def test_ipv4_by_an_ipv6_gateway(pair: Pair) -> None:
    """A gateway of the other family is sent, kept and read back (RTA_VIA)."""
    pair.s.execute(
        [
            rtnl.link_set(pair.dev, up=True),
            rtnl.addr_add(pair.dev, "10.0.0.2/32"),
            rtnl.route_add("0.0.0.0/0", oif=pair.dev, gw="fe80::1", onlink=True),
        ]
    )
    (route,) = rtnl.routes(pair.s, table=254, family=socket.AF_INET)
    assert (route.dst, route.gw) == ("0.0.0.0/0", "fe80::1")


@BOTH
def test_the_uplink_is_the_default_route_of_lowest_metric(pair: Pair, family: int) -> None:
    """None without a default route; with several, the lowest metric's device, a multipath one's first hop."""
    four = family == socket.AF_INET
    one, two, default = (
        ("10.1.0.2/24", "10.2.0.2/24", "0.0.0.0/0") if four else ("fd01::2/64", "fd02::2/64", "::/0")
    )
    gw1, gw2 = ("10.1.0.1", "10.2.0.1") if four else ("fd01::1", "fd02::1")
    pair.h.execute([veth("pw2", pair.host.fd), rtnl.link_set("pw1", up=True), rtnl.link_set("pw2", up=True)])
    pair.s.execute([rtnl.link_set("eth0", up=True)])
    pair.h.execute([rtnl.link_set("eth0", up=True)])
    second = index_of(pair.h, "pw2")
    pair.h.execute([rtnl.addr_add(pair.rep, one), rtnl.addr_add(second, two)])
    assert rtnl.default_uplink(pair.h, family) is None
    pair.h.execute([rtnl.route_add(default, oif=pair.rep, gw=gw1, priority=200)])
    found = rtnl.default_uplink(pair.h, family)
    assert found is not None
    assert found.name == "pw1"
    pair.h.execute([rtnl.route_add(default, oif=second, gw=gw2, priority=100)])
    found = rtnl.default_uplink(pair.h, family)
    assert found is not None
    assert found.name == "pw2"
    pair.host.run(
        [
            *("ip", "-4" if four else "-6", "route", "add", "default", "metric", "50"),
            *("nexthop", "via", gw1, "dev", "pw1", "nexthop", "via", gw2, "dev", "pw2"),
        ]
    )
    found = rtnl.default_uplink(pair.h, family)
    assert found is not None
    assert found.name == "pw1"


def test_ipv6_needs_no_router_or_kernel_address(pair: Pair) -> None:
    """With addrgenmode none a link comes up without a link-local address of its own."""
    pair.h.execute([rtnl.link_set("pw1", addrgenmode="none"), rtnl.link_set("pw1", up=True)])
    pair.s.execute([rtnl.link_set("eth0", up=True)])
    wait_until(lambda: any(a.index == pair.dev for a in rtnl.addresses(pair.s)), why="the peer's link-local")
    assert rtnl.addresses(pair.h, pair.rep) == []


@BOTH
def test_the_uplink_is_found_past_a_route_to_the_address_that_is_asked_about(pair: Pair, family: int) -> None:
    """A route to the very address of the look-up, by another device, does not hide the default route's."""
    four = family == socket.AF_INET
    own, default, asked = (
        ("10.1.0.2/24", "0.0.0.0/0", "198.51.100.0/24")
        if four
        else ("fd01::2/64", "::/0", "2001:db8:ffff:ffff::/64")
    )
    pair.h.execute([veth("pw2", pair.host.fd), rtnl.link_set("pw1", up=True), rtnl.link_set("pw2", up=True)])
    pair.s.execute([rtnl.link_set("eth0", up=True)])
    pair.h.execute([rtnl.link_set("eth0", up=True), rtnl.addr_add(pair.rep, own)])
    pair.h.execute([rtnl.route_add(default, oif=pair.rep)])
    pair.h.execute([rtnl.route_add(asked, oif=index_of(pair.h, "pw2"))])
    found = rtnl.default_uplink(pair.h, family)
    assert found is not None
    assert found.name == "pw1"
