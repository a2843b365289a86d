"""The link monitor: what happens is told, in order, and a loss is told too."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from portwright.kernel import monitor as monitor_module
from portwright.kernel import rtnl
from portwright.kernel.monitor import LinkEvent, LinkMonitor
from portwright.kernel.netlink import NetlinkSocket, Request
from tests.deadline import wait_readable
from tests.fix_netns import NetnsFactory, TestNetns

pytestmark = pytest.mark.netns
MAC = "02:00:00:00:00:01"


def veth(name: str) -> Request:
    return rtnl.veth_create(name, mac=MAC, mtu=1500, peer_name=f"{name}p", peer_mac=MAC, peer_mtu=1500)


@pytest.fixture
def watched(netns_factory: NetnsFactory) -> Iterator[tuple[TestNetns, NetlinkSocket, LinkMonitor]]:
    ns = netns_factory()
    with NetlinkSocket(netns_fd=ns.fd) as sock, LinkMonitor(ns.fd) as monitor:
        yield ns, sock, monitor


def heard(monitor: LinkMonitor) -> list[tuple[str, str]]:
    wait_readable(monitor.fileno(), why="a link event")
    return [(event.kind, event.link.name if event.link else "") for event in monitor.read()]


def test_it_waits_for_nothing(watched: tuple[TestNetns, NetlinkSocket, LinkMonitor]) -> None:
    """Without news read() returns an empty list at once."""
    assert watched[2].read() == []


def test_made_changed_and_gone_are_told_in_order(
    watched: tuple[TestNetns, NetlinkSocket, LinkMonitor],
) -> None:
    """New for creation and for each change, with the state then; del with the last state."""
    _, sock, monitor = watched
    sock.execute([veth("pw1")])
    assert {("new", "pw1"), ("new", "pw1p")} <= set(heard(monitor))
    sock.execute([rtnl.link_set("pw1", mtu=1400)])
    changed = [e for e in monitor.read() if e.link is not None and e.link.mtu == 1400]
    assert {event.kind for event in changed} == {"new"}
    sock.execute([rtnl.link_del("pw1")])
    assert {("del", "pw1"), ("del", "pw1p")} <= set(heard(monitor))


def test_leaving_for_another_namespace_is_a_del(
    watched: tuple[TestNetns, NetlinkSocket, LinkMonitor], netns_factory: NetnsFactory
) -> None:
    """A link that moves away is gone from here."""
    _, sock, monitor = watched
    other = netns_factory()
    sock.execute([veth("pw1")])
    monitor.read()
    sock.execute([rtnl.link_set("pw1", netns_fd=other.fd)])
    assert ("del", "pw1") in heard(monitor)


def test_leaving_a_bridge_is_not_a_del(watched: tuple[TestNetns, NetlinkSocket, LinkMonitor]) -> None:
    """The bridge says RTM_DELLINK about a port that leaves it; nobody may take that for the link's end."""
    ns, sock, monitor = watched
    ns.run(["ip", "link", "add", "br0", "type", "bridge"])
    sock.execute([veth("pw1")])
    bridge = rtnl.link_by_name(sock, "br0")
    assert bridge is not None
    sock.execute([rtnl.link_set("pw1", master=bridge.index), rtnl.link_set("pw1", master=0)])
    events = heard(monitor)
    assert ("new", "pw1") in events
    assert not [event for event in events if event[0] == "del"]


def test_other_namespaces_are_not_heard(
    watched: tuple[TestNetns, NetlinkSocket, LinkMonitor], netns_factory: NetnsFactory
) -> None:
    """A subscription is to one namespace."""
    with NetlinkSocket(netns_fd=netns_factory().fd) as elsewhere:
        elsewhere.execute([veth("pw1")])
    assert watched[2].read() == []


def test_lost_events_are_told(
    watched: tuple[TestNetns, NetlinkSocket, LinkMonitor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the buffer overflows, the reader hears of it once, and the monitor goes on working.

    A read takes only so many datagrams, so that a storm does not hold the loop.
    """
    _, sock, monitor = watched
    monitor._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.execute([veth("pw1")])
    for number in range(10):
        sock.execute([rtnl.link_set("pw1", mtu=1400 + number)])
    events = monitor.read()
    assert [event for event in events if event.kind == "overflow"] == [LinkEvent(kind="overflow")]
    sock.execute([rtnl.link_set("pw1", mtu=1300)])
    assert 1300 in [event.link.mtu for event in monitor.read() if event.link]

    monkeypatch.setattr(monitor_module, "READ_MAX", 1)
    monitor._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
    sock.execute([rtnl.link_set("pw1", mtu=1301), rtnl.link_set("pw1", mtu=1302)])
    assert len(monitor.read()) == 1
    rest = [event.link.mtu for _ in range(20) for event in monitor.read() if event.link]
    assert rest[-1] == 1302
