"""Attempts of a sandbox, and of the resolver that it chose, to take the proxy from others or the daemon."""

from __future__ import annotations

import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

import dns.message
import dns.rcode
import pytest

from portwright.api.errors import ConnectionLost
from portwright.domains.ledger import MAX_TTL
from tests.deadline import wait_until
from tests.fix_daemon import WORLD4, WORLD6, Daemon, Sandbox, SandboxFactory
from tests.fix_netns import NetnsFactory, TestNetns
from tests.netns.dns_lab import (
    NAMES,
    address,
    answer_to,
    ask,
    dnsmasq,
    give_addresses,
    look_ups,
    lying,
    nothing_is_steered,
    reaches,
    said,
    under_policy,
)
from tests.netns.policy_lab import connect, listening

pytestmark = pytest.mark.netns

SHOP = 10


@pytest.fixture
def box(daemon: Daemon, sandboxes: SandboxFactory, world: TestNetns) -> Sandbox:
    """A sandbox under the policy, beside a world that has a server."""
    give_addresses(world, SHOP)
    return under_policy(daemon, sandboxes)


def test_one_ports_answer_spoils_nobodys(daemon: Daemon, box: Sandbox, world: TestNetns) -> None:
    """An answer with an AAAA record of the class ANY, the first of that type that the daemon sees, is just
    that: the next AAAA is read as what it is."""

    def odd(wire: bytes) -> list[bytes]:
        end = 12 + len(b"\3www\4shop\7example\0") + 4
        record = b"\xc0\x0c" + struct.pack("!HHIH", 28, 255, 60, 16) + bytes(16)
        return [wire[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + wire[12:end] + record]

    with listening(world, 80):
        with lying(world, odd):
            _say(box, dns.message.make_query("www.shop.example", "A").to_wire())
        with lying(world, lambda wire: [answer_to(wire, f"www.shop.example. 60 AAAA {address(SHOP, 6)}")]):
            assert said(ask(box, "www.shop.example", "AAAA")) == [address(SHOP, 6)]
        assert reaches(daemon, box, address(SHOP, 6))


@pytest.mark.parametrize("where", [WORLD4, WORLD6])
def test_a_stream_of_nonsense_keeps_nobody_waiting(
    daemon: Daemon, box: Sandbox, world: TestNetns, where: str
) -> None:
    """Messages by TCP as fast as they go: one that can't be read ends its stream, and readable ones leave
    others their turn: 500 a second are served, as of packets."""
    nonsense = struct.pack("!H", 12) + bytes(12)
    with dnsmasq(world, f"host-record=www.shop.example,{address(SHOP)},60"):
        with closing(connect(box.ns, where, 53)) as sock:
            sock.sendall(nonsense * 2)
            assert sock.recv(14, socket.MSG_WAITALL) == struct.pack("!H", 12) + b"\0\0\x80\x01" + bytes(8)
            with suppress(ConnectionResetError):  # of what it said and nobody read
                assert sock.recv(14) == b""
        query = dns.message.make_query("www.shop.example", "A").to_wire()
        with _pouring(box, where, struct.pack("!H", len(query)) + query), daemon.client() as api:
            for _ in range(20):
                assert api.node_status().ready
            assert _queries(daemon) < 5_000


def test_a_resolver_that_floods_is_given_up(daemon: Daemon, box: Sandbox, world: TestNetns) -> None:
    """After sixteen messages that answer something else the look-up fails, whatever else is to come."""

    def say(wire: bytes) -> list[bytes]:
        true = answer_to(wire, f"www.shop.example. 60 A {address(SHOP)}")
        return [bytes([wire[0] ^ 1]) + true[1:]] * 20 + [true]

    with lying(world, say):
        assert ask(box, "www.shop.example").rcode() == dns.rcode.SERVFAIL
    assert look_ups(daemon).startswith("0 addresses")
    assert "17 bad answers" in look_ups(daemon)


def test_what_becomes_the_hosts_is_closed(
    daemon: Daemon, box: Sandbox, netns_factory: NetnsFactory, world: TestNetns
) -> None:
    """A name for an address of nobody, and later a network of this host has it, its gateway or another: with
    the network's first port it is open no more, whatever its TTL says, and stays so through a restart."""

    def say(wire: bytes) -> list[bytes]:
        return [answer_to(wire, *(f"www.shop.example. 3600 A 10.99.0.{number}" for number in (1, 77)))]

    with lying(world, say), daemon.client() as api:
        assert len(said(ask(box, "www.shop.example"))) == 2
        assert look_ups(daemon).startswith("2 addresses")
        api.network_create("later", subnets=["10.99.0.0/24"])
        api.port_create("later", netns_factory().path, name="later")
        assert look_ups(daemon).startswith("0 addresses")
        assert not reaches(daemon, box, "10.99.0.1")
    daemon.kill()
    daemon.start()
    assert look_ups(daemon).startswith("0 addresses")


def test_a_clock_that_was_set_back_prolongs_nothing(
    daemon: Daemon, box: Sandbox, world: TestNetns, host: TestNetns
) -> None:
    """What the record says to be open for years is so for a day, and two seconds."""
    with lying(world, lambda wire: [answer_to(wire, f"www.shop.example. 60 A {address(SHOP)}")]):
        ask(box, "www.shop.example")
    daemon.stop()
    with closing(sqlite3.connect(daemon.state_dir / "state.db")) as record:
        record.execute("UPDATE resolved SET until = until + 1e9")
        record.commit()
    daemon.start()
    with lying(world, lambda wire: [answer_to(wire, f"www.shop.example. 1 A {address(SHOP)}")]):
        ask(box, "www.shop.example")

    def until() -> float:
        with closing(sqlite3.connect(daemon.state_dir / "state.db")) as record:
            return float(record.execute("SELECT until FROM resolved").fetchone()[0])

    wait_until(lambda: until() < time.time() + MAX_TTL + 60, 5, "the record to be put right")


@pytest.mark.parametrize(
    "place", ["steer:recorded", "steer:routed", "unsteer:chains", "unsteer:routed", "unsteer:done"]
)
def test_killed_at_any_step_leaves_nothing(
    host: TestNetns, daemon: Daemon, box: Sandbox, world: TestNetns, place: str
) -> None:
    """Around each step of steering and of its end: the next start goes on, and with the policy all goes."""
    with daemon.client() as api:
        if place.startswith("steer"):
            api.policy_delete(["names.yaml"])
    daemon.stop()
    daemon.start(PORTWRIGHT_DIE_AT=place)
    with daemon.client() as api, ExitStack() as stack:
        stack.enter_context(pytest.raises(ConnectionLost))
        if place.startswith("steer"):
            api.policy_apply([("names.yaml", NAMES)])
        else:
            api.policy_delete(["names.yaml"])
    daemon.wait()
    daemon.start()
    if place.startswith("steer"):
        with dnsmasq(world, f"host-record=www.shop.example,{address(SHOP)},60"):
            assert said(ask(box, "www.shop.example")) == [address(SHOP)]
        with daemon.client() as api:
            api.policy_delete(["names.yaml"])
    nothing_is_steered(host)


def _say(box: Sandbox, query: bytes) -> None:
    """A query, and an answer to it that this process must not read: it would believe it too."""
    with box.ns.entered():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with closing(sock):
        sock.settimeout(5)
        sock.sendto(query, (WORLD4, 53))
        assert sock.recv(512)[3] & 0xF == dns.rcode.NOERROR


def _queries(daemon: Daemon) -> int:
    words = look_ups(daemon).replace(",", ";").split("; ")
    return next((int(word.split()[0]) for word in words if word.endswith(" queries")), 0)


@contextmanager
def _pouring(box: Sandbox, where: str, message: bytes, streams: int = 2) -> Iterator[None]:
    """Streams that say this message again and again, as fast as they are read, and hear nothing."""
    over, much = threading.Event(), message * 1000

    def pour(sock: socket.socket) -> None:
        while not over.is_set():
            try:
                sock.send(much)
                while sock.recv(1 << 16, socket.MSG_DONTWAIT):
                    pass
            except TimeoutError:
                continue
            except BlockingIOError:
                continue
            except OSError:
                return

    with ExitStack() as stack:
        threads = []
        for _ in range(streams):
            sock = stack.enter_context(closing(connect(box.ns, where, 53)))
            sock.settimeout(0.2)
            threads.append(threading.Thread(target=pour, args=(sock,)))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()
