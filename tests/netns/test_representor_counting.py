"""R2, R3, R4 of docs/semantics.md: which way, how much of it by which path, and in what unit."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable

import pytest

from portwright.api.methods import PortStats
from tests.deadline import wait_until
from tests.fix_daemon import WORLD4, Daemon, Sandbox, SandboxFactory
from tests.netns.representor import carried, dropped, stats

pytestmark = pytest.mark.netns

#: Of struct tcp_info (include/uapi/linux/tcp.h): tcpi_segs_out and tcpi_segs_in, with 1 for each segment.
_SEGS = struct.Struct("=136xII")
STREAM = 8 << 20
#: Segments of TSO's super-packets are 64 KiB at most; neighbour discovery and the like are a few packets.
NOISE = 40


def both(daemon: Daemon, box: Sandbox) -> tuple[PortStats, dict[str, int], dict[str, int]]:
    """The port's counters, its representor's own, and its device's own."""
    return stats(daemon, box), carried(daemon.host, box.port.rep_name), carried(box.ns, "eth0")


def agree(check: Callable[[], bool], why: str) -> None:
    """Counters are read one after the other while a stray packet may pass: they agree once it is quiet."""
    wait_until(check, why=why)


@pytest.mark.usefixtures("each_attach")
def test_r02_the_direction_inverts(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """What the sandbox sends is from_port, and rx of the representor: the same packets and bytes.

    What it refused to carry was received too: rx = from_port + drops.
    """
    a = sandboxes()
    assert a.ping(WORLD4, 20)

    def from_port_is_rx() -> bool:
        port, rep, device = both(daemon, a)
        total = port.from_port.total
        assert port.from_port.slow_path.packets >= 20
        return (
            device["tx_packets"] == rep["rx_packets"] == total.packets + port.drops.from_port
            and device["tx_bytes"] == rep["rx_bytes"]
            and (rep["rx_bytes"] == total.bytes or port.drops.from_port > 0)
        )

    def slow_to_port_is_tx() -> bool:
        port, rep, _ = both(daemon, a)
        slow = port.to_port.slow_path
        assert slow.packets >= 20
        return (rep["tx_packets"], rep["tx_bytes"]) == (slow.packets, slow.bytes)

    agree(from_port_is_rx, "from_port and the representor's rx to be the same")
    agree(slow_to_port_is_tx, "to_port's slow path and the representor's tx to be the same")


@pytest.mark.usefixtures("each_attach")
def test_r03_totals_count_what_the_representor_does_not_see(
    daemon: Daemon, sandboxes: SandboxFactory
) -> None:
    """Total is all that the sandbox received; slow_path is the part that the representor transmitted.

    Between local ports the fast path carries the packets, and the representor's own tx stays behind.
    """
    a, b = sandboxes(), sandboxes()
    assert a.ping(b.ip4, 100)

    def totals_agree() -> bool:
        port, rep, device = both(daemon, b)
        total, slow = port.to_port.total, port.to_port.slow_path
        assert total.packets >= slow.packets
        assert port.from_port.total.packets >= port.from_port.slow_path.packets
        return (device["rx_packets"], device["rx_bytes"]) == (total.packets, total.bytes) and (
            rep["tx_packets"],
            rep["tx_bytes"],
        ) == (slow.packets, slow.bytes)

    agree(totals_agree, "the totals and the sandbox's own counters to agree")
    port, rep, _ = both(daemon, b)
    assert port.to_port.total.packets >= rep["tx_packets"] + 100
    assert port.from_port.total.packets - port.from_port.slow_path.packets >= 100


def test_r03_counters_survive_the_daemon(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """Counters are kept in the kernel: packets that pass while no daemon runs are counted as well."""
    a, b = sandboxes(), sandboxes()
    assert a.ping(b.ip4, 5)
    before = stats(daemon, a).from_port.total.packets
    daemon.kill()
    assert a.ping(b.ip4, 20)
    daemon.start()
    assert stats(daemon, a).from_port.total.packets >= before + 20


@pytest.mark.usefixtures("each_attach")
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_r04_a_super_packet_counts_as_its_segments(
    daemon: Daemon, sandboxes: SandboxFactory, family: socket.AddressFamily
) -> None:
    """With TSO on, packets are TCP's own count of segments; bytes are the devices' (headers once)."""
    a, b = sandboxes(), sandboxes()
    address = b.ip4 if family == socket.AF_INET else b.ip6
    assert a.ping(address)
    port_a, _, device_a = both(daemon, a)
    port_b, _, device_b = both(daemon, b)

    out, into = _stream(a, b, family, address)

    wait_until(lambda: stats(daemon, b).to_port.total.packets >= port_b.to_port.total.packets + out)
    after_a, _, now_a = both(daemon, a)
    after_b, _, now_b = both(daemon, b)
    sent = after_a.from_port.total.packets - port_a.from_port.total.packets
    received = after_b.to_port.total.packets - port_b.to_port.total.packets
    assert out <= sent <= out + NOISE
    assert max(out, into) <= received <= out + NOISE
    assert now_a["tx_packets"] - device_a["tx_packets"] < out / 4, "TSO was not at work"
    assert dropped(daemon, a) == dropped(daemon, b) == {} or after_a.drops.from_port < NOISE
    carried_bytes = after_b.to_port.total.bytes - port_b.to_port.total.bytes
    assert carried_bytes >= STREAM
    assert abs(carried_bytes - (now_b["rx_bytes"] - device_b["rx_bytes"])) < NOISE * 120


def _stream(a: Sandbox, b: Sandbox, family: socket.AddressFamily, address: str) -> tuple[int, int]:
    """Send STREAM bytes from a to b; (segments that a's TCP sent, segments that b's received)."""
    with b.ns.entered():
        server = socket.create_server((address, 0), family=family)
    with a.ns.entered():
        client = socket.socket(family, socket.SOCK_STREAM)
    with server, client:
        client.connect(server.getsockname()[:2])
        peer, _ = server.accept()
        with peer:
            thread = threading.Thread(target=client.sendall, args=(bytes(STREAM),))
            thread.start()
            left = STREAM
            while left:
                left -= len(peer.recv(1 << 20))
            thread.join()
            return _segments(client)[0], _segments(peer)[1]


def _segments(sock: socket.socket) -> tuple[int, int]:
    found: tuple[int, int] = _SEGS.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SEGS.size))
    return found
