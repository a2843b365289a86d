"""Real sandboxes with a hand on each wire: frames sent and received by the byte, by AF_PACKET.

The sandboxes' own stacks are silenced (no addresses, no IPv6), so that nothing but the test's frames is on
the wires, and what arrives is what the switch and the host made of them. The test's thread keeps to
one CPU: a veth's backlog is a queue of the CPU, so what was sent first arrives first, and a mark
sent behind it says that it is through.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from portwright.dataplane import values
from portwright.dataplane.abi import PwCounters, PwState, PwStateFlag
from portwright.kernel.bpf import Map
from portwright.model.port import Port
from tests.dataplane.frames import FRAGMENT_ID
from tests.dataplane.model import ModelPort, Topology, checksum
from tests.fix_daemon import Daemon, Sandbox
from tests.fix_netns import TestNetns

Arrival = tuple[tuple[int, ...], bytes]
"""What matters of a vnet header, and the frame."""
Reach = frozenset[tuple[int, int]]

_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_SO_RCVBUFFORCE = 33
_VNET = struct.Struct("=BBHHHH")
"""struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset."""
_NEEDS_CSUM = 1
PLAIN = bytes(_VNET.size)
_MARK = b"pwt-mark"
_ATTEMPTS = 5
_PATIENCE = (
    "net.ipv4.ipfrag_time=3600",
    "net.ipv6.ip6frag_time=3600",
    "net.netfilter.nf_conntrack_frag6_timeout=3600",
    "net.ipv4.ipfrag_high_thresh=67108864",
    "net.ipv6.ip6frag_high_thresh=67108864",
    "net.netfilter.nf_conntrack_frag6_high_thresh=67108864",
)
"""The host keeps pieces of datagrams that never become whole: else it reports them, in some later run."""
_ROUNDS = 4
"""Hops from one sandbox to another through the host's stack, and one to spare."""


def vnet(gso_type: int, head: int, size: int, csum_start: int, csum_offset: int) -> bytes:
    """The header of a packet whose checksum is to be finished at ``csum_start``, a super-packet or not."""
    return _VNET.pack(_NEEDS_CSUM, gso_type, head, size, csum_start, csum_offset)


class Tap:
    """A device's wire: all frames that it receives, and a way to send any."""

    def __init__(self, ns: TestNetns, device: str) -> None:
        """Open it in ``ns``; close it at the end."""
        with ns.entered():
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
            self._sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 32 << 20)
            self._sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            self._sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
            self._sock.bind((device, _ETH_P_ALL))

    def send(self, frame: bytes, header: bytes = PLAIN) -> bool:
        """Transmit; False if the sender's own kernel refused it (too long, odd super-packet)."""
        try:
            self._sock.send(header + frame)
        except OSError:
            return False
        return True

    def option(self, name: int, value: int) -> None:
        """Set an option of the socket's own level (SOL_SOCKET), such as the mark of what is sent."""
        self._sock.setsockopt(socket.SOL_SOCKET, name, value)

    def until(self, mark: bytes, timeout: float = 10) -> list[tuple[bytes, bytes]]:
        """(header, frame) of what came before the frame that ends in ``mark``, in order."""
        out: list[tuple[bytes, bytes]] = []
        deadline = time.monotonic() + timeout
        while True:
            try:
                raw = self._sock.recv(1 << 17)
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"the mark {mark!r} did not come; {len(out)} others did") from None
                select.select([self._sock], [], [], left)
                continue
            if raw.endswith(mark):
                return out
            if _MARK not in raw[-40:]:
                out.append((raw[: _VNET.size], raw[_VNET.size :]))

    def close(self) -> None:
        """Let go of it."""
        self._sock.close()


@dataclass(frozen=True)
class Seen:
    """What one batch of frames led to, by name of the wire, and what was counted meanwhile."""

    arrived: dict[str, list[Arrival]]
    totals: dict[str, tuple[int, int, int, int]]
    """(packets, bytes) from the port and to it."""
    slow: int
    """Packets that ports received by the host's stack."""
    drops: dict[tuple[str, str, str], tuple[int, int]]
    accepted: list[bool]


class Wires:
    """Ports of a running daemon with a tap on each, the world's wire, and the maps of the switch."""

    def __init__(self, daemon: Daemon, world: TestNetns, sandboxes: dict[str, Sandbox], reach: Reach) -> None:
        """Silence the sandboxes and open everything."""
        self._stack = contextlib.ExitStack()
        self.sandboxes = sandboxes
        self._marks = 0
        self._daemon, self._host = daemon, daemon.host
        with self._host.entered():
            self.ports = {name: _model(box.port) for name, box in sandboxes.items()}
        self.topology = Topology(tuple(self.ports.values()), reach)
        self._attempts = 0
        for knob in ("net.ipv4.icmp_ratemask=0", "net.ipv6.icmp.ratemask=", *_PATIENCE):
            self._host.run(["sysctl", "-qw", knob])
        for box in sandboxes.values():
            box.run(["sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1"])
            box.run(["ip", "-4", "addr", "flush", "dev", "eth0"])
        world.run(["sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1"])
        world.run(["ip", "-4", "addr", "flush", "dev", "w0"])
        self.taps = {name: self._tap(box.ns, "eth0") for name, box in sandboxes.items()}
        self.taps["world"] = self._tap(world, "w0")
        self._behind = {name: self._tap(self._host, box.port.rep_name) for name, box in sandboxes.items()}
        self._behind["world"] = self._tap(self._host, "up0")
        # The world's stack is dead, and the host must not have to ask for it.
        for address in ("192.0.2.1", "192.0.2.9", "2001:db8::1", "2001:db8::9"):
            mac = "02:00:00:00:00:01"
            self._host.run(["ip", "neigh", "replace", address, "lladdr", mac, "dev", "up0"])
        maps = next(Path(daemon.run_dir, "bpf").glob("*/maps"))
        self.maps = {
            name: self._map(maps / name)
            for name in ("pw_state", "pw_counters", "pw_drops", "pw_slow_flows", "pw_addrs")
        }
        cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cpus)})
        self._stack.callback(os.sched_setaffinity, 0, cpus)

    def _tap(self, ns: TestNetns, device: str) -> Tap:
        return self._stack.enter_context(contextlib.closing(Tap(ns, device)))

    def _map(self, path: Path) -> Map:
        return self._stack.enter_context(contextlib.closing(Map.from_pin(path)))

    def close(self) -> None:
        """Let go of everything."""
        self._stack.close()

    def set_slow_only(self, on: bool) -> None:
        """What Switch.set_slow_only does, and no flow is known as translated."""
        raw = self.maps["pw_state"].lookup(bytes(4))
        assert raw is not None
        flags = PwStateFlag.SF_SLOW_ONLY if on else 0
        self.maps["pw_state"].update(bytes(4), PwState.unpack(raw)._replace(flags=flags, slow_flows=0).pack())
        for key in list(self.maps["pw_slow_flows"].keys()):
            self.maps["pw_slow_flows"].delete(key)

    def settle(self) -> dict[str, list[tuple[bytes, bytes]]]:
        """Send a mark down each wire, behind all that is under way; what came before it, by wire."""
        out: dict[str, list[tuple[bytes, bytes]]] = {name: [] for name in self.taps}
        for _ in range(_ROUNDS):
            self._marks += 1
            mark = _MARK + self._marks.to_bytes(4, "big")
            # IPv4 to nobody, protocol 253 (RFC 3692: for experiments): the host may send what it likes (R5).
            for name, tap in self._behind.items():
                head = struct.pack("!BBHHHBBHII", 0x45, 0, 20 + len(mark), 0, 0, 1, 253, 0, 0, 0)
                assert tap.send(bytes(12) + b"\x08\x00" + head + mark), name
            for name, tap in self.taps.items():
                out[name] += tap.until(mark)
        return out

    def counters(self) -> dict[str, PwCounters]:
        """Of each port."""
        out = {}
        for name, port in self.ports.items():
            raw = self.maps["pw_counters"].lookup_percpu(port.port_id.to_bytes(8, sys.byteorder))
            rows = [PwCounters.unpack(r) for r in raw or []]
            out[name] = PwCounters._make(map(sum, zip(*rows, strict=True)))
        return out

    def drops(self) -> dict[tuple[str, str, str], tuple[int, int]]:
        """By (port, direction, reason)."""
        out = {}
        for name, port in self.ports.items():
            for key in values.drop_keys(f"{port.port_id:016x}"):
                raw = self.maps["pw_drops"].lookup_percpu(key)
                if raw is not None:
                    rows = [struct.unpack("=QQ", r) for r in raw]
                    word = ("from_port", "to_port")[key[8]], values.reason_text(key[9])
                    out[(name, *word)] = (sum(r[0] for r in rows), sum(r[1] for r in rows))
        return out

    def run(self, batch: list[tuple[str, bytes, bytes]]) -> Seen:
        """Send (port, vnet header, frame) one after the other, and see what comes of them.

        Our marks are left out. Where the host's kernel spoke by itself meanwhile (MLD), all is done again.
        Each attempt's fragments have identifications of their own (stamped), for the host keeps pieces that
        never become whole, and those of one attempt would spoil the datagrams of the next.
        Asserts that each port was counted what arrived at it, unless there are super-packets.
        """
        plain = all(header == PLAIN for _, header, _ in batch)
        for _ in range(_ATTEMPTS):
            self._attempts += 1
            seen, noisy = self._once([(n, h, stamped(f, self._attempts)) for n, h, f in batch], plain)
            counted = {name: row[2:] for name, row in seen.totals.items()}
            arrived = {
                n: (len(a), sum(len(f) for _, f in a)) for n, a in seen.arrived.items() if n in counted
            }
            if not noisy and (counted == arrived or not plain):
                return seen
            self.forget_connections()
        raise AssertionError(f"counted {counted}, arrived {arrived}, noise {noisy}")

    def _once(self, batch: list[tuple[str, bytes, bytes]], plain: bool) -> tuple[Seen, bool]:
        """One attempt, and whether the host's kernel spoke."""
        noisy = any(map(is_noise, (f for a in self.settle().values() for _, f in a)))
        before, dropped = self.counters(), self.drops()
        accepted = [self.taps[name].send(frame, header) for name, header, frame in batch]
        came = self.settle()
        after = self.counters()
        # What was counted between the last mark and that look comes before the next mark. Of plain frames
        # ``run`` would see it: it compares.
        late = {} if plain else self.settle()
        noisy |= any(map(is_noise, (f for seen in (came, late) for a in seen.values() for _, f in a)))
        arrived = {name: [(_kept(h), _normal(f)) for h, f in items] for name, items in came.items()}
        mark = 14 + 20 + len(_MARK) + 4
        totals = {}
        for name, row in after.items():
            was = before[name]
            totals[name] = (
                row.from_total_packets - was.from_total_packets,
                row.from_total_octets - was.from_total_octets,
                row.to_total_packets - was.to_total_packets - _ROUNDS,
                row.to_total_octets - was.to_total_octets - _ROUNDS * mark,
            )
        drops = {
            key: (row[0] - dropped.get(key, (0, 0))[0], row[1] - dropped.get(key, (0, 0))[1])
            for key, row in self.drops().items()
            if row != dropped.get(key, (0, 0))
        }
        slow = sum(after[n].to_slow_packets - before[n].to_slow_packets - _ROUNDS for n in after)
        return Seen({n: sorted(a) for n, a in arrived.items()}, totals, slow, drops, accepted), noisy

    def forget_connections(self) -> None:
        """Empty the host's conntrack table."""
        self._host.run(["conntrack", "-F"])


def _model(port: Port) -> ModelPort:
    return ModelPort(
        port_id=int(port.port_id, 16),
        ifindex=socket.if_nametoindex(port.rep_name),
        net=port.net_id,
        sandbox=port.sandbox.cookie,
        mac=values.mac(port.mac),
        addresses=tuple(ipaddress.ip_address(a.address) for a in port.addresses),
        mtu=port.mtu,
    )


def _kept(header: bytes) -> tuple[int, ...]:
    """Of the vnet header: super-packet or not, and an unfinished checksum.

    Not VIRTIO_NET_HDR_F_DATA_VALID: conntrack's check of a checksum is an optimisation for the receiver.
    """
    flags, gso_type, _, size, start, offset = _VNET.unpack(header)
    if not flags & _NEEDS_CSUM:
        start = offset = 0
    return flags & _NEEDS_CSUM, gso_type, size, start, offset


def _normal(frame: bytes) -> bytes:
    """Without what differs from one run of the same to the next.

    That is the IP ID of the host's own ICMP, and of fragments, which carry the attempt in theirs (stamped);
    with the checksums over it, which are checked here, also where an ICMP error quotes it.
    """
    if frame[12:14] == b"\x08\x00" and len(frame) > 34:
        error = frame[23] == 1 and frame[14] == 0x45 and frame[34] in (3, 5, 11, 12)
        if not error and not frame[18] & 0x80:
            return frame
        assert checksum(frame[14 : 14 + (frame[14] & 15) * 4]) == 0
        frame = _blank(frame, 18, 24)
        if error and len(frame) > 62 and frame[46] & 0x80:
            assert checksum(frame[34:]) == 0
            frame = _blank(_blank(frame, 36), 46, 52)
        return frame
    plain = _STAMPED6.sub(FRAGMENT_ID, frame)
    if plain != frame and frame[20] == 58 and frame[54] < 128:
        pseudo = frame[22:54] + len(frame[54:]).to_bytes(4, "big") + b"\0\0\0\x3a"
        assert checksum(pseudo + frame[54:]) == 0
        plain = _blank(plain, 56)
    return plain


def _blank(frame: bytes, *fields: int) -> bytes:
    """The frame with these 16-bit fields zeroed."""
    for at in fields:
        frame = frame[:at] + b"\0\0" + frame[at + 2 :]
    return frame


_STAMPS = 1 << 10
_FRAGMENT6 = re.compile(re.escape(FRAGMENT_ID[:3]) + rb"(.)", re.DOTALL)
_STAMPED6 = re.compile(re.escape(FRAGMENT_ID[:2]) + rb"[\x80-\xff].", re.DOTALL)


def stamped(frame: bytes, attempt: int) -> bytes:
    """The frame as it is sent in an attempt, numbered up to 1023: a fragment has the number in its
    identification, beside the five low bits of what it had, so that pieces of two attempts never meet.

    Fragments of IPv4 by their header; of IPv6 by FRAGMENT_ID, the last byte of which may be another.
    """
    assert attempt < _STAMPS
    stamp = 0x8000 | attempt << 5
    if frame[12:14] == b"\x86\xdd":

        def identify(found: re.Match[bytes]) -> bytes:
            return FRAGMENT_ID[:2] + (stamp | found[1][0] & 31).to_bytes(2, "big")

        return _FRAGMENT6.sub(identify, frame)
    if frame[12:14] == b"\x08\x00" and len(frame) >= 34 and (frame[20] & 0x3F or frame[21]):
        head = slice(14, 14 + (frame[14] & 15) * 4)
        good = checksum(frame[head]) == 0
        frame = frame[:18] + (stamp | frame[19] & 31).to_bytes(2, "big") + frame[20:]
        if good:
            check = checksum(frame[14:24] + b"\0\0" + frame[26 : head.stop])
            frame = frame[:24] + check.to_bytes(2, "big") + frame[26:]
    return frame


def is_noise(frame: bytes) -> bool:
    """Multicast listener reports, router and neighbour solicitations: the host's kernel's own."""
    if frame[12:14] != b"\x86\xdd" or frame[6:12] == bytes(6):
        return False
    return frame[38] == 0xFF and (frame[20] == 0 or (frame[20] == 58 and frame[54] in (133, 135, 136, 143)))


@contextlib.contextmanager
def wired(daemon: Daemon, world: TestNetns, sandboxes: dict[str, Sandbox], reach: Reach) -> Iterator[Wires]:
    """As Wires, closed at the end."""
    made = Wires(daemon, world, sandboxes, reach)
    try:
        yield made
    finally:
        made.close()
