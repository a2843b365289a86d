"""The thinnest true path: a daemon, two ports, packets between them and to the world."""

from __future__ import annotations

import pytest

from tests.fix_daemon import WORLD4, WORLD6, Daemon, SandboxFactory
from tests.fix_netns import TestNetns

pytestmark = pytest.mark.netns


def test_two_ports_reach_each_other_the_gateway_and_the_world(
    daemon: Daemon, sandboxes: SandboxFactory
) -> None:
    """Ports of one network exchange packets in both families, and reach the gateway and the world."""
    a, b = sandboxes(), sandboxes()

    for address in (b.ip4, b.ip6, "169.254.1.1", "fe80::1%eth0", WORLD4, WORLD6):
        assert a.ping(address), address
    with daemon.client() as client:
        stats = {s.port_id: s for s in client.stats()}
    assert stats[a.port.port_id].from_port.total.packets > 0


def test_a_stopped_daemon_drops_no_packet(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """With the daemon killed, and after its restart, ports go on passing packets and are on record."""
    a, b = sandboxes(), sandboxes()
    daemon.kill()
    assert a.ping(b.ip4, 5)
    assert a.ping(b.ip6, 5)
    daemon.start()
    assert a.ping(b.ip4, 5)
    with daemon.client() as client:
        assert {p.port_id for p in client.port_list()} == {a.port.port_id, b.port.port_id}
        assert client.node_status().ready


def test_an_address_that_is_not_the_ports_own_is_refused(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """A packet with a made-up source is dropped, counted as src_ip, and never arrives."""
    a, b = sandboxes(), sandboxes()
    assert a.ping(b.ip4)  # the gateway's MAC is known: no ARP with the false address comes first
    a.run(["ip", "addr", "add", "10.77.0.99/32", "dev", "eth0"])
    done = a.run(["ping", "-c1", "-W1", "-I", "10.77.0.99", b.ip4], check=False)
    assert done.returncode != 0
    with daemon.client() as client:
        found = {(d.reason, d.direction) for d in client.drops(a.port.port_id)}
    assert ("src_ip", "from_port") in found


def test_a_ports_mtu_is_the_uplinks(daemon: Daemon, host: TestNetns, sandboxes: SandboxFactory) -> None:
    """Without another wish a port gets the MTU of the default route's device, on both of its ends."""
    host.run(["ip", "link", "set", "up0", "mtu", "1420"])
    sandbox = sandboxes()
    assert sandbox.port.mtu == 1420
    assert "mtu 1420" in sandbox.run(["ip", "link", "show", "eth0"]).stdout
    assert "mtu 1420" in host.run(["ip", "link", "show", sandbox.port.rep_name]).stdout
