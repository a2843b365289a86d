"""R8, R9, R10, R11, R16 of docs/semantics.md: the link that the representor gives, its MTU and its rates."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable

import pytest

from portwright.api.methods import LimitsChange
from portwright.model.port import Limits, PortState
from tests.deadline import wait_until
from tests.fix_daemon import WORLD4, WORLD6, Daemon, Sandbox, SandboxFactory
from tests.netns.representor import dropped, ear, inject, link, record, shown, stats, udp

pytestmark = pytest.mark.netns


def _by_command(daemon: Daemon, box: Sandbox, admin: str) -> None:
    daemon.cli("port", "set", box.port.port_id, "--admin", admin)


def _by_iproute(daemon: Daemon, box: Sandbox, admin: str) -> None:
    daemon.host.run(["ip", "link", "set", box.port.rep_name, admin])
    wait_until(lambda: record(daemon, box).admin == admin, why="the record to follow")


def carrier(box: Sandbox) -> bool:
    """Whether the sandbox's device sees a carrier."""
    return "LOWER_UP" in link(box.ns, "eth0")["flags"]


def all_ways(daemon: Daemon, a: Sandbox, b: Sandbox) -> bool:
    """Whether packets pass between the ports, to and from host and world, in both families."""
    return (
        all(a.ping(address) for address in (b.ip4, b.ip6, WORLD4, WORLD6))
        and b.ping(a.ip4)
        and b.ping(a.ip6)
        and all(
            daemon.host.run(["ping", "-c1", "-W1", address], check=False).returncode == 0
            for address in (a.ip4, a.ip6)
        )
    )


@pytest.mark.usefixtures("each_attach")
@pytest.mark.parametrize("disable", [_by_command, _by_iproute], ids=["port set", "ip link"])
def test_r08_r10_the_representors_state_is_the_sandboxes_carrier(
    daemon: Daemon, sandboxes: SandboxFactory, disable: Callable[[Daemon, Sandbox, str], None]
) -> None:
    """Link disable is the representor's admin down: no carrier inside, no packet either way, on any path.

    What other ports send to it is dropped with a reason. Up again, every way works as before.
    """
    a, b = sandboxes(), sandboxes()
    assert carrier(a)
    assert all_ways(daemon, a, b)

    disable(daemon, a, "down")
    assert not carrier(a)
    view = shown(daemon, a)
    assert (view["admin"], view["link"], view["opstate"]) == ("down", "down", "attached")
    frame = udp(b, b.ip4, a.ip4, b"to a port that is down")
    with ear(a.ns, "eth0") as at_a:
        inject(b.ns, "eth0", frame, frame)
        assert not at_a.hear(b"to a port", timeout=0.1)
    assert dropped(daemon, a)["to_port", "link_down"] == 2
    assert not a.ping(b.ip4)
    assert b.ping(WORLD4)
    with daemon.client() as client:
        assert client.node_status().ready

    disable(daemon, a, "up")
    wait_until(lambda: all_ways(daemon, a, b), timeout=20, why="every way to work again")
    assert shown(daemon, a)["admin"] == "up"


def test_r08_down_and_up_at_once_costs_no_route(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """The kernel flushes a link's routes when it goes down: they are back, however short that was."""
    a, b = sandboxes(), sandboxes()
    rep = a.port.rep_name
    assert daemon.process is not None
    os.kill(daemon.process.pid, signal.SIGSTOP)  # it shall see both at once
    try:
        daemon.host.run(["ip", "-batch", "-"], input=f"link set {rep} down\nlink set {rep} up\n")
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)
    wait_until(lambda: all_ways(daemon, a, b), timeout=20, why="every way to work again")
    with daemon.client() as client:
        assert client.node_status().alarms == ()


def test_r10_a_disabled_link_stays_disabled(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """Neither a new device nor a restart of the daemon enables a link that its owner disabled."""
    a, b = sandboxes(), sandboxes()
    _by_command(daemon, a, "down")
    daemon.kill()
    daemon.start()
    assert not carrier(a)
    a.run(["ip", "link", "del", "eth0"])
    wait_until(lambda: record(daemon, a).state is PortState.DETACHED, why="the port to be detached")
    daemon.cli("port", "plug", a.port.port_id, "--netns", a.ns.path)
    assert not carrier(a)
    assert not b.ping(a.ip4)
    _by_command(daemon, a, "up")
    wait_until(lambda: all_ways(daemon, a, b), timeout=20, why="every way to work")


def test_r10_a_change_while_the_daemon_was_away_is_followed(
    daemon: Daemon, sandboxes: SandboxFactory
) -> None:
    """What the operator did to a representor while no daemon ran is on record after the next start."""
    a, b = sandboxes(), sandboxes()
    daemon.kill()
    daemon.host.run(["ip", "link", "set", a.port.rep_name, "mtu", "1400", "down"])
    daemon.start()
    assert (record(daemon, a).admin, record(daemon, a).mtu) == ("down", 1400)
    frame = udp(b, b.ip4, a.ip4, b"x")
    inject(b.ns, "eth0", frame)
    assert dropped(daemon, a)["to_port", "link_down"] == 1


@pytest.mark.usefixtures("each_attach")
def test_r09_the_sandboxes_own_link_state_is_its_own_business(
    daemon: Daemon, sandboxes: SandboxFactory
) -> None:
    """A sandbox that sets its device down takes the carrier away, and changes nothing else.

    Admin, opstate, state, health, routes and the other ports stay; the three are shown apart.
    """
    a, b, c = sandboxes(), sandboxes(), sandboxes()
    routes = daemon.host.run(["ip", "route", "show", "dev", a.port.rep_name]).stdout
    assert shown(daemon, a)["link"] == "up"

    a.run(["ip", "link", "set", "eth0", "down"])
    wait_until(lambda: "NO-CARRIER" in link(daemon.host, a.port.rep_name)["flags"], why="no carrier")
    view = shown(daemon, a)
    assert (view["admin"], view["link"], view["opstate"], view["state"]) == (
        "up",
        "down",
        "attached",
        "attached",
    )
    assert (
        daemon.host.run(["ip", "route", "show", "dev", a.port.rep_name]).stdout.split()[0]
        == routes.split()[0]
    )
    assert b.ping(c.ip4, 3)
    with daemon.client() as client:
        status = client.node_status()
    assert status.ready
    assert not status.alarms

    a.ns.run(["ip", "-batch", "-"], input="link set eth0 up\nlink set eth0 down\n" * 20)
    a.run(["ip", "link", "set", "eth0", "up"])
    a.run(["ip", "route", "add", "default", "via", "169.254.1.1", "dev", "eth0", "onlink"])
    wait_until(lambda: b.ping(a.ip4), timeout=20, why="the port to answer again")
    view = shown(daemon, a)
    assert (view["admin"], view["link"], view["opstate"]) == ("up", "up", "attached")


@pytest.mark.usefixtures("each_attach")
@pytest.mark.parametrize("how", ["ip link", "port set"])
def test_r11_the_representors_mtu_is_the_sandboxes(
    daemon: Daemon, sandboxes: SandboxFactory, how: str
) -> None:
    """A new MTU of the representor is told to the sandbox's device, shown, and enforced both ways."""
    a, b = sandboxes(), sandboxes()
    if how == "ip link":
        daemon.host.run(["ip", "link", "set", a.port.rep_name, "mtu", "1400"])
    else:
        daemon.cli("port", "set", a.port.port_id, "--mtu", "1400")
    wait_until(lambda: link(a.ns, "eth0")["mtu"] == 1400, why="the sandbox's MTU to follow")
    assert link(daemon.host, a.port.rep_name)["mtu"] == 1400
    assert shown(daemon, a)["mtu"] == 1400
    assert all_ways(daemon, a, b)

    # From the port, whatever its device claims: at the limit it passes, above it does not.
    a.run(["ip", "link", "set", "eth0", "mtu", "9000"])
    with ear(b.ns, "eth0") as at_b:
        inject(
            a.ns,
            "eth0",
            udp(a, a.ip4, b.ip4, b"above", size=1401),
            udp(a, a.ip4, b.ip4, b"above", size=1404),
            udp(a, a.ip4, b.ip4, b"limit", size=1400),
        )
        with pytest.raises(OSError, match="No buffer space"):  # the pair itself refuses it
            inject(a.ns, "eth0", udp(a, a.ip4, b.ip4, b"above", size=1500))
        assert at_b.hear(b"limit")
        assert not at_b.hear(b"above", timeout=0.1)
    assert dropped(daemon, a)["from_port", "mtu"] == 2

    a.run(["ip", "link", "set", "eth0", "mtu", "1400"])
    # To the port: a sender that may not fragment is told, one that may gets through.
    told = b.run(["ping", "-c1", "-W1", "-M", "do", "-s", "1473", a.ip4], check=False)
    assert told.returncode != 0
    told = b.run(["ping", "-c1", "-W1", "-M", "do", "-s", "1400", a.ip4], check=False)
    assert told.returncode != 0
    assert "mtu" in (told.stdout + told.stderr).lower()
    assert b.run(["ping", "-c1", "-W2", "-M", "dont", "-s", "1400", a.ip4]).returncode == 0
    assert b.run(["ping", "-c1", "-W2", "-M", "do", "-s", "1372", a.ip4]).returncode == 0


def test_r11_the_mtu_is_the_ports_and_outlives_the_device(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """The next device of a port has the MTU that the last one was given."""
    a = sandboxes()
    daemon.host.run(["ip", "link", "set", a.port.rep_name, "mtu", "1380"])
    wait_until(lambda: record(daemon, a).mtu == 1380, why="the record to follow")
    daemon.cli("port", "unplug", a.port.port_id)
    daemon.cli("port", "plug", a.port.port_id, "--netns", a.ns.path)
    assert link(a.ns, "eth0")["mtu"] == link(daemon.host, a.port.rep_name)["mtu"] == 1380


def test_r11_a_renamed_device_is_told_too(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """The sandbox's end is found by the kernel's facts, not by a name that the sandbox may change."""
    a = sandboxes()
    for command in ("eth0 down", "eth0 name lan0", "lan0 up"):  # before Linux 6.2 only a device that is down
        a.run(["ip", "link", "set", *command.split()])
    daemon.cli("port", "set", a.port.port_id, "--mtu", "1400")
    assert link(a.ns, "lan0")["mtu"] == 1400


def test_r11_an_mtu_that_the_port_cannot_have_is_put_back(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """Below 1,280 bytes a port with IPv6 would lose it: refused, or put back with an alarm."""
    a, b = sandboxes(), sandboxes()
    refused = daemon.cli("port", "set", a.port.port_id, "--mtu", "1000", check=False)
    assert refused.returncode == 1
    assert "1280" in refused.stderr
    daemon.host.run(["ip", "link", "set", a.port.rep_name, "mtu", "1000"])
    wait_until(lambda: link(daemon.host, a.port.rep_name)["mtu"] == 1500, why="the MTU to be put back")
    with daemon.client() as client:
        wait_until(lambda: client.node_status().alarms, why="an alarm")
    wait_until(lambda: all_ways(daemon, a, b), timeout=20, why="every way to work again")


RATE, BURST = 20_000_000, 800_000  # bits a second, bits
BLAST = 1.0  # seconds


def _blast(sender: Sandbox, address: str) -> float:
    """Send UDP datagrams of 1,400 bytes as fast as it goes for BLAST seconds; returns how long it was."""
    with sender.ns.entered():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sock:
        sock.connect((address, 9))
        began = time.monotonic()
        while time.monotonic() - began < BLAST:
            for _ in range(16):
                try:
                    sock.send(bytes(1400))
                except ConnectionRefusedError:
                    continue  # nobody listens: the counters do
        return time.monotonic() - began


@pytest.mark.alone
@pytest.mark.usefixtures("each_attach")
@pytest.mark.parametrize("side", ["egress_rate", "ingress_rate"])
def test_r16_a_rate_is_named_from_the_sandboxes_view(
    daemon: Daemon, sandboxes: SandboxFactory, side: str
) -> None:
    """``egress_rate`` limits what the sandbox sends and nothing else, ``ingress_rate`` what it receives.

    In the time that was measured, no more passes than burst and rate give, and nine tenths of it does.
    """
    limits = Limits(**{side: RATE, side.replace("rate", "burst"): BURST})
    a, b = sandboxes(limits=limits), sandboxes()
    limited, free = ((a, b), (b, a)) if side == "egress_rate" else ((b, a), (a, b))
    direction = "from_port" if side == "egress_rate" else "to_port"

    before = stats(daemon, limited[1]).to_port.total.bytes
    seconds = _blast(limited[0], limited[1].ip4)
    passed = stats(daemon, limited[1]).to_port.total.bytes - before
    allowed = (BURST + RATE * seconds) / 8
    assert passed <= allowed * 1.02 + 3000
    assert passed >= allowed * 0.9
    assert dropped(daemon, a)[direction, "limit"] > 0
    assert set(dropped(daemon, a)) == {(direction, "limit")}

    lost = dropped(daemon, a)
    before = stats(daemon, free[1]).to_port.total.bytes
    seconds = _blast(free[0], free[1].ip4)
    passed = stats(daemon, free[1]).to_port.total.bytes - before
    assert passed > (BURST + RATE * seconds) / 8 * 1.5, "the other direction is limited too"
    # The few ICMP errors that answer the blast go the limited way, and stay far below its rate.
    assert dropped(daemon, a) == lost


@pytest.mark.alone
def test_r16_a_rate_can_be_changed_and_lifted(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """A limit set on a running port holds from then on; 0 lifts it, and no other setting changes."""
    a, b = sandboxes(), sandboxes()
    with daemon.client() as client:
        changed = client.port_set(a.port.port_id, limits=LimitsChange(egress_rate=RATE, egress_burst=BURST))
        assert (changed.limits.egress_rate, changed.mtu) == (RATE, a.port.mtu)
        before = stats(daemon, b).to_port.total.bytes
        seconds = _blast(a, b.ip4)
        passed = stats(daemon, b).to_port.total.bytes - before
        assert passed <= (BURST + RATE * seconds) / 8 * 1.02 + 3000
        client.port_set(a.port.port_id, limits=LimitsChange(egress_rate=0))
    lost = dropped(daemon, a)["from_port", "limit"]
    _blast(a, b.ip4)
    assert dropped(daemon, a)["from_port", "limit"] == lost
