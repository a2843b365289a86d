"""Bridges: what we read of them and set on them is what ``bridge`` and ``ip`` see."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from portwright.kernel import rtnl, rtnl_bridge
from portwright.kernel.netlink import NetlinkSocket, RequestFailed
from tests.fix_netns import NetnsFactory, TestNetns
from tests.netns import bridge_lab as lab
from tests.netns.bridge_lab import BRIDGE, Member

pytestmark = pytest.mark.netns


@pytest.fixture
def host(netns_factory: NetnsFactory) -> TestNetns:
    """A namespace with a bridge."""
    made = netns_factory()
    lab.make_bridge(made)
    return made


@pytest.fixture
def sock(host: TestNetns) -> Iterator[NetlinkSocket]:
    """A socket in it."""
    with NetlinkSocket(netns_fd=host.fd) as opened:
        yield opened


def test_settings_of_a_port_come_back(
    host: TestNetns, sock: NetlinkSocket, netns_factory: NetnsFactory
) -> None:
    """Off the bridge there are none; on it again they are the kernel's own; set, they are what they were."""
    member = Member(netns_factory(), host, 11)
    index, bridge = lab.link(host, member.link).index, lab.link(host, BRIDGE).index
    host.run(
        ["bridge", "link", "set", "dev", member.link, "hairpin", "on", "isolated", "on", "learning", "off"]
    )
    before = rtnl_bridge.port_settings(sock, index)
    assert (before["hairpin"], before["isolated"], before["learning"]) == (1, 1, 0)
    sock.execute([rtnl.link_set(index, master=0)])
    assert rtnl_bridge.port_settings(sock, index) == {}
    sock.execute([rtnl.link_set(index, master=bridge)])
    assert rtnl_bridge.port_settings(sock, index) != before
    sock.execute([rtnl_bridge.port_set(index, before)])
    assert rtnl_bridge.port_settings(sock, index) == before
    assert rtnl_bridge.port_settings(sock, 9999) == {}


def test_the_fdb_has_what_was_heard(
    host: TestNetns, sock: NetlinkSocket, netns_factory: NetnsFactory
) -> None:
    """A container's MAC at its port, learnt; the port's own as local; of that bridge alone."""
    member = Member(netns_factory(), host, 11)
    index, bridge = lab.link(host, member.link).index, lab.link(host, BRIDGE).index
    lab.ip(host, "link add other type bridge", "link set other up")
    heard = [e.mac for e in rtnl_bridge.fdb(sock, bridge) if e.index == index and not e.local]
    assert heard == [member.mac]
    assert lab.link(host, member.link).mac in {e.mac for e in rtnl_bridge.fdb(sock, bridge) if e.local}
    assert not [e for e in rtnl_bridge.fdb(sock, lab.link(host, "other").index) if e.index == index]
    assert rtnl_bridge.fdb(sock, 9999) == []


def test_answers_for_addresses_elsewhere(host: TestNetns, sock: NetlinkSocket) -> None:
    """Added twice they are there once, in both families; deleted twice, there is none, the kernel says."""
    bridge = lab.link(host, BRIDGE).index
    for address in ("10.88.0.9", "fd88::9"):
        for _ in range(2):
            sock.execute([rtnl_bridge.answer_add(bridge, address)])
        family = "-6" if ":" in address else "-4"
        listed = json.loads(host.run(["ip", "-j", family, "neigh", "show", "proxy"]).stdout)
        assert [(entry["dst"], entry["dev"]) for entry in listed] == [(address, BRIDGE)]
        sock.execute([rtnl_bridge.answer_del(bridge, address)])
        with pytest.raises(RequestFailed):
            sock.execute([rtnl_bridge.answer_del(bridge, address)])


def test_a_bridge_is_made_with_its_mac(host: TestNetns, sock: NetlinkSocket) -> None:
    """As asked, down, without VLANs."""
    sock.execute([rtnl_bridge.bridge_create("br9", "02:00:00:00:00:09")])
    made = lab.link(host, "br9")
    assert (made.kind, made.mac, made.up) == ("bridge", "02:00:00:00:00:09", False)
    assert not rtnl_bridge.filters_vlans(sock, made.index)
