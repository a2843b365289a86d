"""``port migrate``: guests leave a bridge of the host while their hypervisor holds the tap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from portwright.model.errors import Conflict
from tests.fix_daemon import WORLD4, Daemon
from tests.fix_netns import NetnsFactory, TestNetns
from tests.netns import bridge_lab as lab
from tests.netns.bridge_lab import BRIDGE, HOST4, HOST6, Member
from tests.netns.bridged_guests import Guest, Kata, heard

pytestmark = pytest.mark.netns


@pytest.fixture
def guests(daemon: Daemon, world: TestNetns, netns_factory: NetnsFactory) -> Iterator[list[Guest]]:
    """Two guests on a bridge, which have spoken to nobody yet, and a network for them."""
    lab.make_bridge(daemon.host)
    world.run(["ip", "route", "add", "10.88.0.0/24", "via", "192.0.2.2"])
    lab.network(daemon)
    with ExitStack() as stack:
        yield [Guest(netns_factory(), daemon.host, number, stack) for number in (21, 22)]


def test_connections_of_guests_survive(
    daemon: Daemon,
    world: TestNetns,
    guests: list[Guest],
    netns_factory: NetnsFactory,
    record_property: Callable[[str, object], None],
) -> None:
    """Between guests, to a container on the same bridge, to the host and to the world; their taps are held
    by who held them, with MACs and addresses as before."""
    a, b = guests
    host, box = daemon.host, Member(netns_factory(), daemon.host, 31)
    # The stand-in's frames go by threads of this process: a guest that nobody moves is the control.
    lab.make_bridge(elsewhere := netns_factory())
    with ExitStack() as stack:
        control = Guest(netns_factory(), elsewhere, 23, stack)
        heard(a, b, control)
        first = stack.enter_context(lab.idle(a.ns, b.ns, b.ip4, 22))
        second = stack.enter_context(lab.idle(b.ns, host, HOST6, 23))
        third = stack.enter_context(lab.idle(box.ns, a.ns, a.ip6, 24))
        fourth = stack.enter_context(lab.idle(a.ns, world, WORLD4, 25))
        running = stack.enter_context(
            lab.streams(
                ("control", control.ns, elsewhere, HOST4, 5000),
                ("guest to guest", a.ns, b.ns, b.ip4, 5001),
                ("guest to container, IPv6", b.ns, box.ns, box.ip6, 5002),
                ("guest to host", a.ns, host, HOST4, 5003),
                ("container to guest", box.ns, b.ns, b.ip4, 5004),
            )
        )
        with daemon.client() as client:
            done = client.port_migrate(BRIDGE, remove_bridge=True)
        moved = {p.adopted.link: p for p in done.bridges[0].ports if p.adopted}
        assert BRIDGE not in lab.names(host)
        noise, *gaps = [stream.advance() for stream in running]
        for idle in (first, second, third, fourth):
            idle.alive()
    assert (moved[a.link].mac, {x.address for x in moved[a.link].addresses}) == (a.mac, {a.ip4, a.ip6})
    lab.judge(noise, gaps, record_property)


def test_a_moved_guest_is_a_port(daemon: Daemon, guests: list[Guest]) -> None:
    """It finds its neighbours anew, may not be the other guest, is told apart from it, found whole by doctor
    and after a restart; deleted, its tap is closed and has nothing of ours."""
    a, b = guests
    heard(a, b)
    with daemon.client() as client:
        moved = {p.adopted.link: p for p in client.port_migrate().bridges[0].ports if p.adopted}
        for guest in guests:
            guest.ns.run(["ip", "neigh", "flush", "all"])
        for target in (b.ip4, b.ip6, HOST4, HOST6):
            assert a.ping(target), target
        lab.ip(a.ns, f"addr add {b.ip4}/32 dev eth0")
        a.ns.run(["ping", "-n", "-c1", "-W1", "-I", b.ip4, HOST4], check=False)
        assert {d.reason for d in client.drops(moved[a.link].port_id)} & {"src_ip", "arp_spoof"}
        lab.ip(a.ns, f"addr del {b.ip4}/32 dev eth0")
        checks = {check.name: check for check in client.doctor().checks}
        assert checks["data path"].ok, checks["data path"].detail
        assert checks["leaks"].ok, checks["leaks"].detail
    daemon.kill()
    daemon.start()
    assert "restored" not in daemon.tail()
    assert a.ping(b.ip4)
    with daemon.client() as client:
        client.port_delete(moved[a.link].port_id)
        left = lab.link(daemon.host, a.link)
        assert (left.altnames, left.up) == ((), False)
        assert b.ping(HOST4)


def test_a_guest_of_which_too_little_is_known(daemon: Daemon, guests: list[Guest]) -> None:
    """One that never spoke is refused, one whose address the host has not heard too; named, it is moved."""
    a, b = guests
    b.ns.run(["ip", "link", "set", "eth0", "down"])
    with daemon.client() as client:
        for each in guests:
            each.ns.run(["ip", "addr", "flush", "dev", "eth0"])
        daemon.host.run(["ip", "link", "set", b.link, "nomaster"])
        daemon.host.run(["ip", "neigh", "flush", "all"])
        lab.ip(a.ns, "link set eth0 down", "link set eth0 up", f"addr add {a.ip4}/24 dev eth0")
        a.ns.run(["ping", "-n", "-c1", "-W1", "10.88.0.99"], check=False)  # asks by ARP: the bridge learns
        daemon.host.run(["ip", "neigh", "flush", "all"])
        with pytest.raises(Conflict, match=f"--address {a.mac}=ADDRESS"):
            client.port_migrate(BRIDGE)
        done = client.port_migrate(BRIDGE, addresses={a.mac.upper(): [a.ip4, a.ip6]})
        assert {x.address for x in done.bridges[0].ports[0].addresses} == {a.ip4, a.ip6}
        assert a.ping(HOST4)


@pytest.fixture
def kata(daemon: Daemon, netns_factory: NetnsFactory) -> Iterator[Kata]:
    """One on a bridge of the host."""
    lab.make_bridge(daemon.host)
    lab.network(daemon)
    with ExitStack() as stack:
        made = Kata(netns_factory(), netns_factory(), daemon.host, 41, stack)
        yield made


def test_katas_bridge_inside_a_sandbox_goes_too(
    daemon: Daemon, kata: Kata, netns_factory: NetnsFactory, record_property: Callable[[str, object], None]
) -> None:
    """The guest's connections go on past both bridges, which are gone; its namespace's device is joined with
    its tap by us until the port is deleted."""
    box = Member(netns_factory(), daemon.host, 12)
    heard(kata)
    with (
        lab.idle(kata.ns, box.ns, box.ip4, 22) as first,
        lab.idle(daemon.host, kata.ns, kata.ip6, 23) as second,
        lab.streams(
            ("control", box.ns, box.ns, "127.0.0.1", 5000),
            ("guest to container", kata.ns, box.ns, box.ip6, 5001),
            ("host to guest", daemon.host, kata.ns, kata.ip4, 5002),
        ) as running,
        daemon.client() as client,
    ):
        done = client.port_migrate(BRIDGE, remove_bridge=True)
        noise, *gaps = [stream.advance() for stream in running]
        first.alive()
        second.alive()
        assert lab.names(kata.box) == {"lo", "eth0", "tap0_kata"}
        assert BRIDGE not in lab.names(daemon.host)
        port = next(p for p in done.bridges[0].ports if p.adopted and p.adopted.link == kata.link)
        assert (port.mac, port.tap, {x.address for x in port.addresses}) == (
            kata.mac,
            "tap0_kata",
            {kata.ip4, kata.ip6},
        )
        checks = {check.name: check for check in client.doctor().checks}
        assert checks["data path"].ok, checks["data path"].detail
        assert checks["leaks"].ok, checks["leaks"].detail
    with daemon.client() as client:  # when nobody speaks any more
        client.port_delete(port.port_id)
    for name in ("eth0", "tap0_kata"):
        assert "clsact" not in kata.box.run(["tc", "qdisc", "show", "dev", name]).stdout
    lab.judge(noise, gaps, record_property)


def test_katas_bridge_is_as_before_if_the_move_fails(
    daemon: Daemon, kata: Kata, netns_factory: NetnsFactory
) -> None:
    """Another sandbox can't be taken over: inside the first nothing of ours is left, and its bridge works."""
    box = Member(netns_factory(), daemon.host, 99)
    heard(kata)
    daemon.host.run(["tc", "qdisc", "add", "dev", box.link, "ingress"])
    before = lab.picture(kata.box), lab.picture(daemon.host)
    with daemon.client() as client, pytest.raises(Conflict, match="held by an ingress qdisc"):
        client.port_migrate(BRIDGE)
    assert (lab.picture(kata.box), lab.picture(daemon.host)) == before
    assert kata.ping(box.ip4)
