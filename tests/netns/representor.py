"""Eyes and hands for the acceptance tests of docs/semantics.md: links, counters, frames, drops."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw

from portwright.api.methods import DropEvent, PortStats
from portwright.model.network import GATEWAY_MAC
from portwright.model.port import Port
from tests.deadline import PATIENCE, wait_until
from tests.fix_daemon import Daemon, Sandbox
from tests.fix_netns import TestNetns

_ETH_P_ALL = 3
_PACKET_OUTGOING = 4


def link(ns: TestNetns, name: str) -> dict[str, Any]:
    """What ``ip -d -s link show`` says of one link; {} if there is none."""
    done = ns.run(["ip", "-j", "-d", "-s", "link", "show", "dev", name], check=False)
    if done.returncode:
        return {}
    found: dict[str, Any] = json.loads(done.stdout)[0]
    return found


def carried(ns: TestNetns, name: str) -> dict[str, int]:
    """A link's own counters, flat: rx_packets, rx_bytes, tx_packets, tx_bytes, rx_dropped."""
    counts = link(ns, name)["stats64"]
    return {f"{side}_{what}": n for side in ("rx", "tx") for what, n in counts[side].items()}


def stats(daemon: Daemon, box: Sandbox) -> PortStats:
    """The port's counters."""
    with daemon.client() as client:
        return client.stats(box.port.port_id)[0]


def dropped(daemon: Daemon, box: Sandbox) -> dict[tuple[str, str], int]:
    """Packets dropped at the port by (direction, reason)."""
    with daemon.client() as client:
        return {(d.direction, d.reason): d.packets for d in client.drops(box.port.port_id)}


def record(daemon: Daemon, box: Sandbox) -> Port:
    """The port as it is on record now."""
    with daemon.client() as client:
        return client.port_show(box.port.port_id)


def shown(daemon: Daemon, box: Sandbox) -> dict[str, Any]:
    """``portwright port show --json``."""
    found: dict[str, Any] = json.loads(daemon.cli("port", "show", box.port.port_id, "--json").stdout)
    return found


def udp(box: Sandbox, src: str, dst: str, mark: bytes, *, size: int = 0) -> bytes:
    """A frame as ``box`` would send it to its gateway: IPv4 UDP 4000 to 4001 with ``mark`` in it.

    ``size`` pads the packet to that many bytes of layer 3.
    """
    payload = mark.ljust(size - 28, b".") if size else mark
    packet = Ether(src=box.port.mac, dst=GATEWAY_MAC) / IP(src=src, dst=dst) / UDP(sport=4000, dport=4001)
    return bytes(packet / Raw(payload))


def inject(ns: TestNetns, dev: str, *frames: bytes) -> None:
    """Transmit frames on a device, by an AF_PACKET socket."""
    with ns.entered():
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with raw:
        raw.bind((dev, 0))
        for frame in frames:
            raw.send(frame)


class Ear:
    """Hears what arrives at one device (not what leaves it), from the moment it is made."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def hear(self, mark: bytes, count: int = 1, timeout: float = 3.0) -> list[bytes]:
        """Up to ``count`` frames that hold ``mark``; fewer after ``timeout`` seconds (times PATIENCE)."""
        found: list[bytes] = []
        deadline = time.monotonic() + timeout * PATIENCE
        while len(found) < count:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._sock], [], [], left)[0]:
                break
            frame, address = self._sock.recvfrom(65600)
            if mark in frame and address[2] != _PACKET_OUTGOING:
                found.append(frame)
        return found


@contextmanager
def ear(ns: TestNetns, dev: str) -> Iterator[Ear]:
    """Listen at a device for the length of the block."""
    with ns.entered():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind((dev, _ETH_P_ALL))
        yield Ear(sock)


class Follower:
    """Reads the port's drop events in a thread, as ``portwright drops --follow --logged`` does."""

    def __init__(self, daemon: Daemon, box: Sandbox) -> None:
        self.events: list[DropEvent] = []
        self._client = daemon.client()
        self._port = box.port.port_id
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for event in self._client.drops_follow(self._port, logged=True):
            if event.reason == "vlan":
                return
            self.events.append(event)

    def of(self, reason: str) -> list[DropEvent]:
        """Those with this reason so far."""
        return [event for event in self.events if event.reason == reason]

    def finish(self, box: Sandbox) -> None:
        """Send a tagged frame, which ends the reading."""

        def ended() -> bool:
            inject(box.ns, "eth0", _tagged(box))
            return not self._thread.is_alive()

        wait_until(ended, why="the follower to end")
        self._thread.join()
        self._client.close()


def _tagged(box: Sandbox) -> bytes:
    return bytes(Ether(src=box.port.mac, dst=GATEWAY_MAC) / Dot1Q(vlan=5) / IP(src=box.ip4) / b"x")


@contextmanager
def following(daemon: Daemon, box: Sandbox) -> Iterator[Follower]:
    """A follower that is known to hear: it has reported one drop (of a wrong source MAC)."""
    follower = Follower(daemon, box)
    probe = bytes(Ether(src="02:00:00:00:00:99", dst=GATEWAY_MAC) / IP() / b"x")

    def hears() -> bool:
        inject(box.ns, "eth0", probe)
        return bool(follower.of("src_mac"))

    try:
        wait_until(hears, why="the first event")
        yield follower
    finally:
        follower.finish(box)
