"""What host endpoints drop, told as it happens: nftables' drops packet by packet, XDP's by source net."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from portwright.api.methods import DropEvent
from portwright.cli.observe import drop_line
from portwright.kernel.nflog import PacketLog
from portwright.model.errors import NetlinkFailed
from portwright.node.paths import Paths
from portwright.plan.hosts import told_group
from tests.deadline import wait_until
from tests.fix_daemon import HOST4, HOST6, WORLD4, WORLD6, Daemon, SandboxFactory
from tests.fix_netns import TestNetns
from tests.netns.test_policy_hosts import DENY_ALL, FORWARD, PRE_DNAT, UNTRACKED, ends, host, policy

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("family", [4, 6])
#: Nothing else sends to these ports: what proves that a follower hears, and what ends it.
HELLO, END = 901, 902


class Follower:
    """``drops --follow`` in a thread, which hears when this is made, until :meth:`finish`."""

    def __init__(self, daemon: Daemon) -> None:
        self.heard: list[DropEvent] = []
        self._client = daemon.client()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for event in self._client.drops_follow():
            self.heard.append(event)
            if f".{END} " in event.summary:
                return

    @property
    def events(self) -> list[DropEvent]:
        """What was told of, but for the proofs that it hears and that it ends."""
        return [e for e in self.heard if not any(f".{port} " in e.summary for port in (HELLO, END))]

    def lost(self) -> int:
        """How many it was told that it missed."""
        return sum(event.lost for event in self.heard)

    def begin(self, world: TestNetns) -> None:
        """Return once it hears."""

        def hears() -> bool:
            send(world, HOST4, HELLO)
            return bool(self.heard)

        wait_until(hears, why="the first event")

    def finish(self, world: TestNetns) -> None:
        """Have one more packet dropped, which ends the reading."""

        def ended() -> bool:
            send(world, HOST4, END)
            return not self._thread.is_alive()

        wait_until(ended, why="the follower to end", timeout=20)
        self._thread.join()
        self._client.close()


@contextmanager
def following(daemon: Daemon, world: TestNetns) -> Iterator[Follower]:
    """A follower that hears."""
    follower = Follower(daemon)
    try:
        follower.begin(world)
        yield follower
    finally:
        follower.finish(world)


def send(source: TestNetns, address: str, port: int, count: int = 1) -> None:
    """Datagrams; that an output hook refuses one is no error here."""
    with source.entered():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    with closing(sock):
        for _ in range(count):
            try:
                sock.sendto(b"question", (address, port))
            except PermissionError:
                continue


@BOTH
def test_each_stage_tells_of_its_drops(
    daemon: Daemon, world: TestNetns, sandboxes: SandboxFactory, family: int
) -> None:
    """A dropped packet comes with its interface, direction, stage, rule, and both addresses and ports."""
    mine, theirs = ends(family)
    box = sandboxes()
    denies = "[{{action: Deny, protocol: UDP, destination: {{ports: [{}]}}}}]"
    manifests = (
        host()
        + policy("raw", f"types: [Ingress]\ningress: {denies.format(1001)}", flags=UNTRACKED)
        + policy("pre", f"types: [Ingress]\ningress: {denies.format(1002)}", flags=PRE_DNAT)
        + policy("way", f"types: [Egress]\negress: {denies.format(1003)}", flags=FORWARD)
    )
    with daemon.client() as api:
        api.policy_apply([("h.yaml", manifests)])
    expected = {
        ("ingress", "host-untracked", "GlobalNetworkPolicy raw ingress[0]", 1001),
        ("ingress", "host-pre-dnat", "GlobalNetworkPolicy pre ingress[0]", 1002),
        ("egress", "host-forward", "GlobalNetworkPolicy way egress[0]", 1003),
        ("ingress", "host-local", "host-default", 1004),
        ("egress", "host-local", "tier-default default egress", 1005),
    }
    with following(daemon, world) as follower:
        for port in (1001, 1002, 1004):
            send(world, mine, port)
        send(box.ns, theirs, 1003)
        send(daemon.host, theirs, 1005)
        wait_until(lambda: len(follower.events) >= len(expected), why="an event of each stage")
        events = list(follower.events)
    found = {
        (e.direction, e.reason, e.rule, int(e.summary.split(" udp")[0].rsplit(".", 1)[1])) for e in events
    }
    assert found == expected
    assert {(e.port_id, e.rep, e.lost) for e in events} == {("host:up0", "uplink", 0)}
    outer = {
        e.summary.split(" > ")[0].split()[1].rsplit(".", 1)[0] for e in events if e.direction == "ingress"
    }
    assert outer == {theirs}
    size = 28 if family == 4 else 48
    assert all(e.summary.endswith(f"udp length {size + 8}") for e in events)


def test_a_flood_is_told_of_in_part_and_counted_whole(daemon: Daemon, world: TestNetns) -> None:
    """A rule tells of 64 packets a second; how many it kept to itself the next event says, so that both
    together are what ``drops`` counts."""
    with daemon.client() as api:
        api.policy_apply([("h.yaml", host() + DENY_ALL)])
        with following(daemon, world) as follower:
            send(world, HOST4, 1001, count=1000)

            def told() -> bool:
                send(world, HOST4, 1001)
                return follower.lost() >= 800

            wait_until(told, why="the packets that were not shown", timeout=20)
            shown = len(follower.events)
        assert 64 <= shown < 1000
        counted = sum(d.packets for d in api.drops() if d.port_id == "host:up0")
        # A packet that is between its counter and its event is taken for one that is not shown.
        assert len(follower.heard) + follower.lost() <= counted + (os.cpu_count() or 1)


def test_two_follow_and_nobody_is_left_behind(daemon: Daemon, world: TestNetns) -> None:
    """Both hear the same; when the last one has gone the kernel's place for a listener is free."""
    group = told_group(Paths(daemon.run_dir, daemon.state_dir).instance)

    def is_free() -> bool:
        with daemon.host.entered():
            try:
                PacketLog(group).close()
            except NetlinkFailed as error:
                if error.errno != errno.EPERM:
                    raise
                return False
        return True

    with daemon.client() as api:
        api.policy_apply([("h.yaml", host() + DENY_ALL)])
    assert is_free()
    with following(daemon, world) as one, following(daemon, world) as other:
        assert not is_free()
        send(world, HOST6, 1001)
        for follower in (one, other):
            wait_until(lambda f=follower: f.events, why="the event")  # type: ignore[misc]
    wait_until(is_free, why="the listener to end")


def test_somebody_elses_listener_stays(daemon: Daemon, world: TestNetns, sandboxes: SandboxFactory) -> None:
    """Where the group is taken that is left so; ports' drops are told of all the same."""
    group = told_group(Paths(daemon.run_dir, daemon.state_dir).instance)
    box = sandboxes()
    strict = """
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: quiet}
spec: {podSelector: {}, policyTypes: [Egress]}
"""
    with daemon.host.entered():
        theirs = PacketLog(group)
    with closing(theirs), daemon.client() as api:
        api.policy_apply([("h.yaml", host() + DENY_ALL + strict)])
        events: list[DropEvent] = []

        def read() -> None:
            with daemon.client() as following_client:
                events.append(next(following_client.drops_follow()))

        thread = threading.Thread(target=read)
        thread.start()

        def told() -> bool:
            send(world, HOST4, 1001)
            send(box.ns, WORLD4, 1001)
            return not thread.is_alive()

        wait_until(told, why="a port's drop")
        thread.join()
        assert events[0].port_id == box.port.port_id
        assert theirs.read()


@pytest.mark.parametrize("address", [WORLD4, WORLD6])
def test_what_xdp_drops_is_told_of_by_its_net(daemon: Daemon, world: TestNetns, address: str) -> None:
    """Once a second, with the rule and how many packets; those and ``drops`` agree."""
    net = f"{address}/{128 if ':' in address else 32}"
    rule = f"ingress:\n- {{action: Deny, source: {{nets: ['{net}']}}}}"
    with daemon.client() as api:
        api.policy_apply([("h.yaml", host() + policy("deny", rule, flags=UNTRACKED) + DENY_ALL)])
        target = HOST6 if ":" in address else HOST4
        follower = Follower(daemon)
        try:

            def told() -> list[DropEvent]:
                send(world, target, 1001)
                return [e for e in follower.events if e.rule.endswith("by XDP")]

            first = wait_until(told, why="XDP's drops")[0]
            assert (first.port_id, first.rep, first.direction) == ("host:up0", "uplink", "ingress")
            assert (first.reason, first.rule) == (
                "host-untracked",
                "GlobalNetworkPolicy deny ingress[0], by XDP",
            )
            assert first.summary.startswith(f"from {address}: ")
            assert first.lost == int(first.summary.split()[2]) - 1
            [count] = [d for d in api.drops() if d.rule == first.rule]
            assert count.port_id == "host:up0"
            assert count.packets >= first.lost + 1
            api.policy_delete(["h.yaml"])
            api.policy_apply([("h.yaml", host() + DENY_ALL)])
        finally:
            follower.finish(world)


def test_the_command_prints_them(daemon: Daemon, world: TestNetns) -> None:
    """The line for people has interface, endpoint, stage and rule."""
    with daemon.client() as api:
        api.policy_apply([("h.yaml", host() + DENY_ALL)])
    with following(daemon, world) as follower:
        send(world, HOST4, 1001)
        event = wait_until(lambda: follower.events, why="the event")[0]
    line = drop_line(event)
    assert " host:up0 uplink ingress host-local rule=tier-default default ingress ipv4 " in line
