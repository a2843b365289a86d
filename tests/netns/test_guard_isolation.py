"""Networks are apart unless both say otherwise, by every way that a sandbox has; with real sockets."""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Callable

import pytest

from portwright.model.port import PortMapping
from tests.deadline import wait_until
from tests.fix_daemon import HOST4, HOST6, Daemon, Sandbox
from tests.fix_netns import TestNetns

pytestmark = pytest.mark.netns

PORT, MAPPED = 8000, 18000
NOTHING_WITHIN = 0.3
"""Seconds that a datagram between two sandboxes of one host never takes."""


@pytest.fixture
def town(daemon: Daemon, netns_factory: Callable[[], TestNetns]) -> dict[str, Sandbox]:
    """A port in each of five networks, with host ports 18000, 18001, … in the order of the names.

    ``near`` is a second one in ``home``'s. home and friend name each other; fan names home, which does
    not answer; star opens itself to all, and home names it.
    """
    reach = {"home": ["friend", "star"], "friend": ["home"], "fan": ["home"], "star": ["*"], "other": []}
    boxes: dict[str, Sandbox] = {}
    with daemon.client() as client:
        for number, (name, names) in enumerate(reach.items()):
            subnets = [f"10.{80 + number}.0.0/24", f"fd00:{80 + number}::/64"]
            client.network_create(name, subnets=subnets, masquerade=True, reach=names)
        for number, name in enumerate([*reach, "near"]):
            ns = netns_factory()
            mappings = [
                PortMapping(host_port=MAPPED + number, container_port=PORT, protocol=proto)
                for proto in ("tcp", "udp")
            ]
            network = "home" if name == "near" else name
            port = client.port_create(network, ns.path, name=ns.name, port_mappings=mappings)
            boxes[name] = Sandbox(ns, port)
    return boxes


def mapped(town: dict[str, Sandbox], name: str) -> int:
    """The host port of a sandbox."""
    return MAPPED + list(town).index(name)


def udp(box: Sandbox, version: int, port: int = 0) -> socket.socket:
    """A socket inside, bound to the port."""
    with box.ns.entered():
        made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    made.bind(("", port))
    return made


def arrives(source: Sandbox, server: socket.socket, version: int, address: str, port: int) -> bool:
    """Return whether a datagram comes through, and an answer to it back."""
    with udp(source, version) as client:
        client.connect((address, port))
        client.send(b"question")
        if not select.select([server], [], [], NOTHING_WITHIN)[0]:
            return False
        data, peer = server.recvfrom(100)
        assert data == b"question"
        server.sendto(b"answer", peer)
        assert select.select([client], [], [], 5)[0], "the answer was lost"
        return client.recv(100) == b"answer"


@pytest.mark.parametrize("version", [4, 6])
def test_reach_takes_both_sides(daemon: Daemon, town: dict[str, Sandbox], version: int) -> None:
    """Datagrams pass inside a network and between two that name each other (or *), in both directions, and
    between no other two: neither straight, nor by the other's published port on the host. What
    is refused is counted as isolation."""
    open_pairs = {("home", "friend"), ("friend", "home"), ("home", "star"), ("star", "home")}
    host = HOST4 if version == 4 else HOST6
    for target in ("home", "friend", "fan", "star", "other", "near"):
        with udp(town[target], version, PORT) as server:
            for source in ("home", "friend", "fan", "other", "star"):
                if source == target:
                    continue
                allowed = (source, target) in open_pairs or {source, target} == {"home", "near"}
                if target == "near":
                    allowed = (source, "home") in open_pairs or source == "home"
                box = town[target]
                straight = box.ip4 if version == 4 else box.ip6
                assert arrives(town[source], server, version, straight, PORT) is allowed, (source, target)
                by_host = arrives(town[source], server, version, host, mapped(town, target))
                assert by_host is allowed, (source, target, "by the host")
    with daemon.client() as client:
        reasons = {(d.reason, d.direction) for d in client.drops()}
    assert reasons >= {("isolation", "from_port"), ("isolation", "to_port")}
    assert {r for r, _ in reasons} == {"isolation"}


@pytest.mark.parametrize("version", [4, 6])
def test_an_error_about_a_published_port_finds_its_way(town: dict[str, Sandbox], version: int) -> None:
    """A neighbour dials a published UDP port behind which nobody listens: the sandbox's ICMP error reaches
    the socket that sent, translated back, also once the redirect path is warm between the two."""
    host = HOST4 if version == 4 else HOST6
    near, home = town["near"], town["home"]
    assert near.ping(home.ip4 if version == 4 else home.ip6)
    for _ in range(2):
        with udp(near, version) as client:
            client.connect((host, mapped(town, "home")))
            client.send(b"anybody?")

            def refused(client: socket.socket = client) -> bool:
                return client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED

            wait_until(refused, 5, "the port unreachable")


@pytest.mark.parametrize("version", [4, 6])
def test_a_sandbox_reaches_itself_by_its_published_port(town: dict[str, Sandbox], version: int) -> None:
    """Hairpin: out by the host's address and in again, answered."""
    host = HOST4 if version == 4 else HOST6
    with udp(town["home"], version, PORT) as server:
        assert arrives(town["home"], server, version, host, mapped(town, "home"))
