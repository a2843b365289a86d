"""The ends of a microVM's port: one MAC on guest's card, tap and device; offloads need not be one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from socket import SHUT_RDWR
from threading import Thread

import pytest

from portwright.kernel.monitor import LinkMonitor
from portwright.node.watch_ends import PACE
from tests.deadline import wait_until
from tests.faults.cni import Cni
from tests.fix_daemon import WORLD4, WORLD6, Daemon, Sandbox, SandboxFactory
from tests.fix_netns import NetnsFactory, TestNetns
from tests.netns.clone_lab import CLONE
from tests.netns.guest_lab import guest, switch_off
from tests.netns.policy_lab import connect, listening

pytestmark = pytest.mark.netns

OTHER = "02:00:00:00:be:ef"
BOTH = pytest.mark.parametrize("model", ["tcfilter", "macvtap"])
INSIDE = pytest.mark.parametrize("end", ["device", "tap"])


def _macs(box: Sandbox) -> dict[str, str]:
    """Of device and tap, as the kernel has them."""
    links = json.loads(box.run(["ip", "-j", "link", "show"]).stdout)
    return {link["ifname"]: link["address"] for link in links if link["ifname"] != "lo"}


def _ours(box: Sandbox) -> dict[str, str]:
    return dict.fromkeys(("eth0", box.port.tap), box.port.mac)


def _give(box: Sandbox, end: str, mac: str = OTHER) -> None:
    name = "eth0" if end == "device" else box.port.tap
    box.run(["ip", "link", "set", name, "address", mac])


def _alarms(daemon: Daemon) -> list[str]:
    with daemon.client() as client:
        return [alarm for alarm in client.node_status().alarms if "another MAC" in alarm]


@pytest.mark.parametrize(
    "options",
    [
        {"model": "tcfilter"},
        {"model": "tcfilter", "join": "mirred", "mac": OTHER},
        {"model": "tcfilter", "queues": 2},
        CLONE,
        {"model": "macvtap", "mac": OTHER},
    ],
    ids=["tcfilter", "mirred", "queues", "clone", "macvtap"],
)
def test_all_ends_have_the_guests_mac(
    sandboxes: SandboxFactory, daemon: Daemon, options: dict[str, object]
) -> None:
    """The record's, from the start, be it asked for or ours; and `port show` says so."""
    box = sandboxes(**options)
    assert box.port.mac == options.get("mac", box.port.mac)
    assert _macs(box) == _ours(box)
    with daemon.client() as client:
        shown = {end.end: end.mac for end in client.port_link(box.port.port_id).ends}
    assert shown.pop("representor") == "ee:ee:ee:ee:ee:ee"
    assert shown == dict.fromkeys(("guest", "tap", "device"), box.port.mac)


@BOTH
@INSIDE
def test_another_mac_is_put_back(
    sandboxes: SandboxFactory, netns_factory: NetnsFactory, daemon: Daemon, model: str, end: str
) -> None:
    """On device or tap, up or down; the guest is reached as before, and who looks at the namespace is told if
    it was the device's. A container's own is its business."""
    container = sandboxes()
    with _guest_and_box(sandboxes, netns_factory, model) as (box, vm):
        container.run(["ip", "link", "set", "eth0", "address", OTHER])
        _give(box, end)
        wait_until(lambda: _macs(box) == _ours(box), why="the MAC to be put back")
        name = "eth0" if end == "device" else box.port.tap
        box.run(["ip", "link", "set", name, "down", "address", OTHER])
        box.run(["ip", "link", "set", name, "up"])
        wait_until(lambda: _macs(box) == _ours(box), why="the MAC to be put back again")
        told = end == "device" or model == "macvtap"  # whose MAC is the device's
        wait_until(lambda: len(_alarms(daemon)) == told, why="the alarm, once")
        assert OTHER in container.run(["ip", "link", "show", "eth0"]).stdout
        with daemon.client() as client:
            assert client.port_show(box.port.port_id).mac == box.port.mac
        for address in ("169.254.1.1", "fe80::1%eth0"):
            wait_until(lambda to=address: vm.ping(to), why=f"{address} to answer the guest")  # type: ignore[misc]


@contextmanager
def _guest_and_box(
    sandboxes: SandboxFactory, netns_factory: NetnsFactory, model: str
) -> Iterator[tuple[Sandbox, Sandbox]]:
    """The namespace of a port, and its guest."""
    box, inside = sandboxes(model=model), netns_factory()
    with guest(box.ns, inside, box.port):
        yield box, Sandbox(inside, box.port)


@BOTH
@INSIDE
def test_another_mac_is_put_back_after_the_daemon_was_away(
    sandboxes: SandboxFactory, daemon: Daemon, model: str, end: str
) -> None:
    """As an MTU is followed."""
    box = sandboxes(model=model)
    daemon.kill()
    _give(box, end)
    daemon.start()
    wait_until(lambda: _macs(box) == _ours(box), why="the MAC to be put back")


def test_who_sets_a_mac_again_and_again_does_not_keep_the_daemon_busy(
    sandboxes: SandboxFactory, daemon: Daemon
) -> None:
    """It is put back at the watcher's pace and no faster, told once, and right in the end."""
    box = sandboxes(model="tcfilter")
    macs = [f"02:00:00:00:be:{number % 250:02x}" for number in range(600)]
    batch = "\n".join(f"link set eth0 address {mac}" for mac in macs)
    with LinkMonitor(box.ns.fd) as monitor:
        begun = time.monotonic()
        box.ns.run(["ip", "-batch", "-"], input=batch)
        wait_until(lambda: _macs(box) == _ours(box), 20, "the MAC to be put back")
        took = time.monotonic() - begun
        events = [event for _ in range(20) for event in monitor.read()]
    assert all(event.kind == "new" for event in events)
    heard = [event.link.mac for event in events if event.link is not None and event.link.name == "eth0"]
    assert len(heard) > len(macs)
    back = sum(mac == box.port.mac != before for before, mac in zip(macs[:1] + heard, heard, strict=False))
    assert 1 <= back <= took / PACE + 1
    assert len(_alarms(daemon)) == 1
    assert daemon.log.read_text().count("another MAC") == 1


@BOTH
def test_check_is_content_with_a_mac_that_was_put_back(
    daemon: Daemon, netns_factory: NetnsFactory, model: str
) -> None:
    """What the answer of ADD says is so again, be it another plugin of the chain that set another."""
    ns, cni = netns_factory(), Cni(daemon, "vms", model=model)
    added = cni.add("vm-1", ns)
    assert added.ok, added
    _representor, device, _tap, card = added.answer["interfaces"]
    ns.run(["ip", "link", "set", "eth0", "address", OTHER])
    wait_until(lambda: OTHER not in ns.run(["ip", "link"]).stdout, why="the MAC to be put back")
    assert cni.run("CHECK", "vm-1", ns.path, prevResult=added.answer).ok
    assert device["mac"] == card["mac"]
    assert f"link/ether {card['mac']}" in ns.run(["ip", "link", "show", "eth0"]).stdout
    assert cni.delete("vm-1", ns).ok


@pytest.mark.parametrize("away", [False, True], ids=["watched", "unwatched"])
@pytest.mark.parametrize("model", ["veth", "tcfilter", "tap"])
def test_r12_the_representors_mac_is_put_back(
    sandboxes: SandboxFactory, netns_factory: NetnsFactory, daemon: Daemon, model: str, away: bool
) -> None:
    """It is the gateway's: with another nothing of the sandbox's would reach the host's own stack. So of the
    model tap, whose tap it is."""
    box = sandboxes(model=model)
    if away:
        daemon.kill()
    daemon.host.run(["ip", "link", "set", box.port.rep_name, "address", OTHER])
    if away:
        daemon.start()

    def shown() -> str:
        return daemon.host.run(["ip", "link", "show", box.port.rep_name]).stdout

    wait_until(lambda: OTHER not in shown(), why="the MAC to be put back")
    assert "ee:ee:ee:ee:ee:ee" in shown()
    with daemon.client() as client:
        assert client.port_show(box.port.port_id).state == "attached"
        wait_until(lambda: any(OTHER in alarm for alarm in client.node_status().alarms), why="the alarm")
    with ExitStack() as running:
        inside = box.ns
        if model != "veth":
            running.enter_context(guest(box.ns, inside := netns_factory(), box.port))
        for address in ("169.254.1.1", WORLD4, WORLD6):
            assert Sandbox(inside, box.port).ping(address), address
        for address in (box.ip4, box.ip6):
            assert daemon.host.run(["ping", "-n", "-c1", "-W2", address], check=False).returncode == 0, (
                address
            )


def test_r12_a_representor_with_another_mac_goes_with_its_port(
    daemon: Daemon, netns_factory: NetnsFactory
) -> None:
    """Set, and the port deleted, while no daemon ran: the next one leaves nothing."""
    ns, cni = netns_factory(), Cni(daemon, "n1", model="tcfilter")
    added = cni.add("c1", ns)
    assert added.ok, added
    representor = added.answer["interfaces"][0]["name"]
    daemon.kill()
    daemon.host.run(["ip", "link", "set", representor, "address", OTHER])
    assert cni.delete("c1", ns).ok
    daemon.start()
    wait_until(lambda: representor not in daemon.host.run(["ip", "link"]).stdout, why="it to be gone")
    assert ns.run(["ip", "-o", "link"]).stdout.count("\n") == 1


#: Some 180 segments of an MTU.
SAID = bytes(range(256)) * 1000
#: What is switched off, and where.
OFF = [(end, what) for end in ("guest", "device", "tap", "representor") for what in ("tso", "checksum")]


@pytest.mark.parametrize("model", ["tcfilter", "tcfilter-mirred", "macvtap", "tap"])
@pytest.mark.parametrize("family", [4, 6])
def test_an_offload_that_one_end_lacks_costs_no_byte(
    sandboxes: SandboxFactory, netns_factory: NetnsFactory, daemon: Daemon, model: str, family: int
) -> None:
    """While all ends take them a stream is super-packets on the tap, both ways; with whatever is switched off
    on any of them, one after the other, it arrives whole all the same. They are counted as segments."""
    name, _, join = model.partition("-")
    box = sandboxes(model=name, **({"join": join} if join else {}))
    inside, other = netns_factory(), sandboxes()
    ends = {"guest": (inside, "eth0"), "representor": (daemon.host, box.port.rep_name)}
    tap = ends["representor"] if model == "tap" else (box.ns, box.port.tap)
    if model != "tap":
        ends["device"] = box.ns, "eth0"
    if name == "tcfilter":  # a macvtap lets nobody set them
        ends["tap"] = tap
    segments = len(SAID) // 1448
    with guest(box.ns, inside, box.port):
        before = _frames(*tap)
        _both_ways(Sandbox(inside, box.port), other, family)
        after = _frames(*tap)
        assert all(now - was < segments for now, was in zip(after, before, strict=True)), (before, after)
        for end, what in OFF:
            if end in ends:
                switch_off(*ends[end], what)
                _both_ways(Sandbox(inside, box.port), other, family)
        times = 1 + sum(end in ends for end, _ in OFF)
        with daemon.client() as client:
            (carried,) = client.stats(box.port.port_id)
    for way in (carried.from_port, carried.to_port):
        assert way.total.packets >= times * segments


def _frames(ns: TestNetns, name: str) -> tuple[int, int]:
    """Those that a device has received and sent, each super-packet as one."""
    (link,) = json.loads(ns.run(["ip", "-j", "-s", "link", "show", name]).stdout)
    return link["stats64"]["rx"]["packets"], link["stats64"]["tx"]["packets"]


def _both_ways(one: Sandbox, other: Sandbox, family: int) -> None:
    """What one says the other hears, and the other way round."""
    for near, far in ((one, other), (other, one)):
        with listening(far.ns, 80) as server:
            sock = connect(near.ns, far.ip4 if family == 4 else far.ip6, 80)
            accepted, _ = server.accept()
            with sock, accepted:
                for each in (sock, accepted):
                    each.settimeout(60)  # of sendall the whole of it
                saying = Thread(target=sock.sendall, args=(SAID,))
                saying.start()
                try:
                    heard = bytearray()
                    while len(heard) < len(SAID) and (piece := accepted.recv(1 << 20)):
                        heard += piece
                finally:
                    sock.shutdown(SHUT_RDWR)  # that the thread ends, whatever came
                    saying.join()
                assert heard == SAID
