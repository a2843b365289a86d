"""R5, R6, R18 of docs/semantics.md: what is delivered, what is missed, what is denied, and why."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Dot1Q, Ether

from portwright.model.network import GATEWAY_MAC
from tests.deadline import wait_until
from tests.fix_daemon import PORTWRIGHT, WORLD4, Daemon, SandboxFactory
from tests.fix_netns import TestNetns
from tests.netns.representor import dropped, ear, following, inject, stats, udp

pytestmark = pytest.mark.netns


@pytest.mark.usefixtures("each_attach")
def test_r05_what_the_host_transmits_on_a_representor_is_delivered(
    daemon: Daemon, sandboxes: SandboxFactory
) -> None:
    """A frame put on the representor reaches the sandbox as it is, and is not judged as between sandboxes.

    The same packet sent by the port whose address it bears, of a network out of reach, is refused.
    """
    a, stranger = sandboxes(), sandboxes("n2")
    spoof = bytes(
        Ether(src=GATEWAY_MAC, dst=a.port.mac)
        / IP(src=stranger.ip4, dst=a.ip4)
        / UDP(sport=1, dport=2)
        / b"R5"
    )
    before = stats(daemon, a).to_port
    with ear(a.ns, "eth0") as at_a:
        inject(stranger.ns, "eth0", udp(stranger, stranger.ip4, a.ip4, b"from a stranger"))
        inject(daemon.host, a.port.rep_name, *[spoof] * 50)
        assert at_a.hear(b"R5", 50) == [spoof] * 50
        assert not at_a.hear(b"stranger", timeout=0.1)

    assert not [why for way, why in dropped(daemon, a) if way == "to_port"]
    assert dropped(daemon, stranger)["from_port", "isolation"] == 1
    after = stats(daemon, a).to_port
    # The host's own neighbour discovery is in it too: a packet or two.
    assert 50 <= after.slow_path.packets - before.slow_path.packets < 60
    assert 50 * len(spoof) <= after.slow_path.bytes - before.slow_path.bytes < 60 * len(spoof) + 1000


def test_r05_odd_frames_are_delivered_too(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """ARP, a tagged frame and one that is no IP at all pass from the host to the sandbox untouched."""
    a = sandboxes()
    for frame in (
        bytes(Ether(src=GATEWAY_MAC, dst=a.port.mac) / Dot1Q(vlan=5) / IP(dst=a.ip4) / b"tagged"),
        bytes(Ether(src=GATEWAY_MAC, dst=a.port.mac, type=0x88B5) / b"experimental"),
        bytes(Ether(src=GATEWAY_MAC, dst=a.port.mac, type=0x0800) / b"\x45cut off"),
    ):
        before = stats(daemon, a).to_port.slow_path.packets
        inject(daemon.host, a.port.rep_name, frame)
        assert stats(daemon, a).to_port.slow_path.packets > before
    assert dropped(daemon, a) == {}


@contextmanager
def behind(host: TestNetns, dev: str, *addresses: str) -> Iterator[str]:
    """Count what a device receives *behind* our program, by destination: a table of the test's own."""
    table = f"pwt_{os.getpid()}"
    rules = "".join(f"  ip daddr {address} counter\n" for address in addresses)
    hook = f"type filter hook ingress device {dev} priority 0;"
    script = f"table netdev {table} {{\n chain c {{ {hook}\n{rules} }}\n}}\n"
    host.run(["nft", "-f", "-"], input=script)
    try:
        yield table
    finally:
        host.run(["nft", "delete", "table", "netdev", table])


def _received(host: TestNetns, table: str) -> dict[str, int]:
    listing = json.loads(host.run(["nft", "-j", "list", "table", "netdev", table]).stdout)["nftables"]
    rules = [entry["rule"]["expr"] for entry in listing if "rule" in entry]
    return {expr[0]["match"]["right"]: expr[1]["counter"]["packets"] for expr in rules}


@pytest.mark.usefixtures("each_attach")
def test_r06_hit_miss_and_deny_are_three_outcomes(
    daemon: Daemon, sandboxes: SandboxFactory, world: TestNetns
) -> None:
    """A hit is delivered without the host, a miss is received on the representor, a deny is counted.

    A miss is no drop: the host's stack decides, and here it knows the way to the world.
    """
    a, b, stranger = sandboxes(), sandboxes(), sandboxes("n2")
    assert a.ping(WORLD4)
    before = stats(daemon, a).from_port
    with (
        behind(daemon.host, a.port.rep_name, b.ip4, WORLD4, stranger.ip4) as table,
        ear(b.ns, "eth0") as at_b,
        ear(world, "w0") as outside,
        ear(stranger.ns, "eth0") as at_stranger,
    ):
        inject(
            a.ns,
            "eth0",
            *(udp(a, a.ip4, b.ip4, b"a hit") for _ in range(50)),
            *(udp(a, a.ip4, WORLD4, b"a miss") for _ in range(70)),
            *(udp(a, a.ip4, stranger.ip4, b"a deny") for _ in range(90)),
            *(udp(a, "10.66.6.6", b.ip4, b"a deny") for _ in range(30)),
        )
        assert len(at_b.hear(b"a hit", 50)) == 50
        assert len(outside.hear(b"a miss", 70)) == 70
        assert not at_stranger.hear(b"a deny", timeout=0.1)
        assert not at_b.hear(b"a deny", timeout=0.1)
        received = _received(daemon.host, table)

    assert received == {b.ip4: 0, WORLD4: 70, stranger.ip4: 0}
    assert dropped(daemon, a) == {("from_port", "isolation"): 90, ("from_port", "src_ip"): 30}
    after = stats(daemon, a).from_port
    # Router and multicast listener messages of a young device pass as misses too: a handful.
    assert 0 <= after.slow_path.packets - before.slow_path.packets - 70 < 20
    assert 0 <= after.total.packets - before.total.packets - 120 < 20


@pytest.mark.usefixtures("each_attach")
def test_r18_an_event_says_which_packet_where_and_why(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """A drop's event names port, representor, direction, reason, the rule that decided, and the headers."""
    a, b, stranger = sandboxes(), sandboxes(), sandboxes("n2")
    with following(daemon, a) as follower:
        inject(a.ns, "eth0", udp(a, "10.66.6.6", b.ip4, b"x"), udp(a, a.ip4, stranger.ip4, b"x"))
        wait_until(lambda: follower.of("isolation"), why="both events")

    (spoof,), (denied,) = follower.of("src_ip"), follower.of("isolation")
    assert (spoof.port_id, spoof.rep, spoof.direction) == (a.port.port_id, a.port.rep_name, "from_port")
    assert spoof.rule == "guard: src_ip"
    for part in (a.port.mac, GATEWAY_MAC, f"10.66.6.6.4000 > {b.ip4}.4001", "udp"):
        assert part in spoof.summary, spoof.summary
    assert str(stranger.port.net_id) in denied.rule
    assert f"{a.ip4}.4000 > {stranger.ip4}.4001" in denied.summary
    assert abs(spoof.time - denied.time) < 5


@pytest.mark.alone
def test_r18_a_flood_is_thinned_for_each_reason_and_nothing_is_unaccounted(
    daemon: Daemon, sandboxes: SandboxFactory
) -> None:
    """Events of one reason are bounded, and say how many were left out: together all that was dropped.

    A flood of one reason leaves the events of another alone.
    """
    a, b, stranger = sandboxes(), sandboxes(), sandboxes("n2")
    spoofed, denied = udp(a, "10.66.6.6", b.ip4, b"x"), udp(a, a.ip4, stranger.ip4, b"x")
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})  # budgets are kept for each CPU; a veth stays on the sender's
    try:
        with following(daemon, a) as follower:
            inject(a.ns, "eth0", *[spoofed] * 4000, denied)
            wait_until(lambda: follower.of("isolation"), why="the event of the other reason")

            def thinned() -> bool:
                inject(a.ns, "eth0", spoofed)
                return any(event.lost for event in follower.of("src_ip"))

            wait_until(thinned, why="an event after the flood")

            def accounted() -> bool:
                told = sum(1 + event.lost for event in follower.of("src_ip"))
                return told == dropped(daemon, a)["from_port", "src_ip"]

            wait_until(accounted, why="events and what they left out to be all drops")
    finally:
        os.sched_setaffinity(0, cpus)
    events = follower.of("src_ip")
    assert len(events) < 2000
    assert sum(event.lost for event in events) > 2000
    assert len(follower.of("isolation")) == 1
    assert follower.of("isolation")[0].lost == 0


def test_r18_the_command_line_follows(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """``portwright drops --follow --json`` prints one object a drop, at once."""
    a, b = sandboxes(), sandboxes()
    process = subprocess.Popen(
        ["nsenter", f"--net={daemon.host.path}", "--", str(PORTWRIGHT), "drops", "--follow", "--json"],
        env=daemon.env,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        lines: list[str] = []
        assert process.stdout is not None
        stdout = process.stdout
        reader = threading.Thread(target=lambda: lines.append(stdout.readline()))
        reader.start()

        def told() -> bool:
            inject(a.ns, "eth0", udp(a, "10.66.6.6", b.ip4, b"x"))
            return bool(lines)

        wait_until(told, timeout=10, why="a line")
        reader.join()
        event = json.loads(lines[0])
        assert (event["port_id"], event["reason"]) == (a.port.port_id, "src_ip")
    finally:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
