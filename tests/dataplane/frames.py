"""Frames by the byte, and hypothesis strategies for honest, mistaken and hostile ones."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

from hypothesis import assume
from hypothesis import strategies as st

from tests.dataplane.model import (
    ARP,
    ICMP,
    ICMP6,
    IP4,
    IP6,
    TCP,
    UDP,
    Address,
    ModelPort,
    Topology,
    checksum,
)

BROADCAST = b"\xff" * 6
FRAGMENT_ID = b"PWTW"
"""What chain() identifies IPv6 datagrams by."""


def runnable(frame: bytes) -> bool:
    """Does BPF_PROG_TEST_RUN take it (net/bpf/test_run.c)? Newer kernels refuse a cut IP header there.

    What it does not take is sent for real in tests/netns/test_guard_frames.py.
    """
    least = {IP4: 34, IP6: 54}.get(int.from_bytes(frame[12:14], "big"), 15)
    return len(frame) >= least


def ethernet(src: bytes, dst: bytes, kind: int, payload: bytes, tags: tuple[int, ...] = ()) -> bytes:
    """A frame; each of ``tags`` is an ethertype of a VLAN tag, with VID 5."""
    stack = b"".join(struct.pack("!HH", tag, 5) for tag in tags)
    return dst + src + stack + struct.pack("!H", kind) + payload


def ipv4(
    src: str,
    dst: str,
    proto: int,
    payload: bytes,
    *,
    ttl: int = 64,
    frag: int = 0,
    options: bytes = b"",
    total: int | None = None,
    ihl: int | None = None,
    ident: int = 1,
    bad_sum: bool = False,
) -> bytes:
    """RFC 791; ``frag`` is flags and offset, ``total`` and ``ihl`` may lie. Multiples of four options."""
    words = 5 + len(options) // 4
    head = struct.pack(
        "!BBHHHBBH4s4s",
        0x40 | (words if ihl is None else ihl),
        0,
        words * 4 + len(payload) if total is None else total,
        ident,
        frag,
        ttl,
        proto,
        0,
        ipaddress.IPv4Address(src).packed,
        ipaddress.IPv4Address(dst).packed,
    )
    size = (words if ihl is None else ihl) * 4
    check = checksum((head + options + payload)[: max(size, 20)]) ^ (0x1234 if bad_sum else 0)
    return head[:10] + struct.pack("!H", check) + head[12:] + options + payload


def ipv6(
    src: str, dst: str, proto: int, payload: bytes, *, ttl: int = 64, length: int | None = None
) -> bytes:
    """RFC 8200; ``payload`` begins with the extension headers, if any, the first of which is ``proto``."""
    return (
        struct.pack(
            "!IHBB16s16s",
            6 << 28,
            len(payload) if length is None else length,
            proto,
            ttl,
            ipaddress.IPv6Address(src).packed,
            ipaddress.IPv6Address(dst).packed,
        )
        + payload
    )


def chain(
    kinds: list[int], upper: int, payload: bytes, *, frag: int = 0, length: int = 0
) -> tuple[int, bytes]:
    """Extension headers of these kinds before ``payload``: (the first next header, bytes).

    ``frag`` goes into fragment headers; ``length`` is what the others say of themselves beyond 8 bytes
    (in their unit), and they are as long as they say.
    """
    out, following = payload, upper
    for kind in reversed(kinds):
        if kind == 44:
            head = struct.pack("!BBH", following, 0, frag) + FRAGMENT_ID
        elif kind == 51:
            head = struct.pack("!BBHII", following, 2 + length, 0, 1, 1).ljust(16 + length * 4, b"\0")
        else:
            head = struct.pack("!BBHI", following, length, 0x0104, 0).ljust(8 + length * 8, b"\0")
        out, following = head + out, kind
    return following, out


def udp(src: Address, dst: Address, sport: int, dport: int, data: bytes) -> bytes:
    """With its checksum (RFC 768)."""
    head = struct.pack("!HHHH", sport, dport, 8 + len(data), 0)
    return _summed(src, dst, UDP, head + data, 6)


def tcp(src: Address, dst: Address, sport: int, dport: int, data: bytes, flags: int = 0x18) -> bytes:
    """With its checksum (RFC 9293)."""
    head = struct.pack("!HHIIBBHHH", sport, dport, 1, 1, 0x50, flags, 1000, 0, 0)
    return _summed(src, dst, TCP, head + data, 16)


def icmp(src: Address, dst: Address, kind: int, body: bytes, code: int = 0) -> bytes:
    """ICMP or ICMPv6 by the address: ``body`` is all after the checksum."""
    head = struct.pack("!BBH", kind, code, 0)
    if src.version == 6:
        return _summed(src, dst, ICMP6, head + body, 2)
    return head[:2] + struct.pack("!H", checksum(head + body)) + body


def pseudo(src: Address, dst: Address, proto: int, length: int) -> bytes:
    """The sum of the pseudo-header, not complemented: what an offloading sender leaves in the checksum."""
    return (~checksum(_pseudo(src, dst, proto, length)) & 0xFFFF).to_bytes(2, "big")


def _pseudo(src: Address, dst: Address, proto: int, length: int) -> bytes:
    tail = struct.pack("!HH", proto, length) if src.version == 4 else struct.pack("!II", length, proto)
    return src.packed + dst.packed + tail


def _summed(src: Address, dst: Address, proto: int, data: bytes, at: int) -> bytes:
    total = checksum(_pseudo(src, dst, proto, len(data)) + data) or (0xFFFF if proto == UDP else 0)
    return data[:at] + struct.pack("!H", total) + data[at + 2 :]


def arp(
    port: ModelPort, sender: str, target: str, *, op: int = 1, sha: bytes | None = None, pad: int = 18
) -> bytes:
    """A request by broadcast, padded to 60 bytes."""
    body = struct.pack(
        "!HHBBH6s4s6s4s",
        1,
        IP4,
        6,
        4,
        op,
        port.mac if sha is None else sha,
        ipaddress.IPv4Address(sender).packed,
        bytes(6),
        ipaddress.IPv4Address(target).packed,
    )
    return ethernet(port.mac, BROADCAST, ARP, body + bytes(pad))


def option(kind: int, mac: bytes, units: int = 1) -> bytes:
    """A link-layer address option of ND."""
    return (bytes([kind, units]) + mac).ljust(8 * max(units, 1), b"\0")


def nd(
    port: ModelPort, src: str, dst: str, kind: int, target: str | None, options: bytes, *, ttl: int = 255
) -> bytes:
    """A message of neighbour discovery (RFC 4861); ``target`` None where it has none."""
    body = bytes(4) + (b"" if target is None else ipaddress.IPv6Address(target).packed) + options
    a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
    group = b"\x33\x33" + b.packed[12:] if b.is_multicast else port.gateway_mac
    return ethernet(port.mac, group, IP6, ipv6(src, dst, ICMP6, icmp(a, b, kind, body), ttl=ttl))


# -- strategies ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """A frame, its sender, and (size, segments) if it is a super-packet."""

    port: ModelPort
    frame: bytes
    gso: tuple[int, int] = (0, 0)

    def __repr__(self) -> str:
        return f"Sent(net {self.port.net}, {self.frame[:80].hex()}, {len(self.frame)} bytes, {self.gso})"


def _interesting(topology: Topology, port: ModelPort, version: int) -> st.SearchStrategy[str]:
    known = [a for p in topology.ports for a in p.addresses if a.version == version]
    # Its own addresses once, those that it may reach often.
    near = {port.net} | {b for a, b in topology.reach if a == port.net}
    often = [a for p in topology.ports if p.net in near and p != port for a in p.addresses] * 15
    often = [a for a in often if a.version == version]
    odd4 = ["0.0.0.0", "255.255.255.255", "224.0.0.5", "127.0.0.1", "169.254.1.1", "192.0.2.9"]
    odd6 = [
        "::",
        "ff02::1",
        "ff02::16",
        "fe80::1",
        "::1",
        "::ffff:10.1.0.2",
        "::ffff:10.1.0.3",
        "2001:db8::9",
    ]
    odd6.append(str(port.link_local))
    return st.sampled_from([*map(str, known), *map(str, often), *(odd4 if version == 4 else odd6)])


@st.composite
def _l4(draw: st.DrawFn, src: str, dst: str) -> tuple[int, bytes]:
    a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
    number = st.sampled_from([53, 80, 40000] * 5 + [67, 68, 546, 547])
    data = draw(st.binary(max_size=40)) * draw(st.sampled_from([1, 1, 1, 60]))
    match draw(st.integers(0, 6)):
        case 0 | 1:
            return UDP, udp(a, b, draw(number), draw(number), data)
        case 2 | 3:
            return TCP, tcp(a, b, draw(number), draw(number), data)
        case 4:
            kinds = (
                [0, 3, 5, 8, 9, 11]
                if a.version == 4
                else [1, 2, 3, 128, 129, 131, 133, 134, 135, 136, 137, 143]
            )
            kind = draw(st.sampled_from(kinds))
            return ICMP if a.version == 4 else ICMP6, icmp(a, b, kind, bytes(4) + data)
        case 5:
            return draw(st.sampled_from([132, 136, 47, 50, 59, 4, 41, 1, 58])), data
        case _:
            return draw(st.integers(0, 255)), data


@st.composite
def _packet(draw: st.DrawFn, topology: Topology, port: ModelPort) -> tuple[int, bytes]:
    version = draw(st.sampled_from([4, 6]))
    own = [str(a) for a in port.addresses if a.version == version]
    address = _interesting(topology, port, version)
    src = draw(st.sampled_from(own)) if own and draw(st.integers(0, 9)) > 0 else draw(address)
    dst = draw(address)
    proto, payload = draw(_l4(src, dst))
    ttl = draw(st.sampled_from([64, 64, 64, 255, 2, 1, 0]))
    lie = draw(st.integers(0, 14)) == 0
    if version == 4:
        options = draw(
            st.sampled_from(
                [b"", b"", b"", b"", b"\x01" * 4, b"\x94\4\0\0", b"\x83\7\4\x0a\1\0\3\0", b"\7" * 40]
            )
        )
        frag = draw(st.sampled_from([0, 0, 0, 0, 0x4000, 0x8000, 0x2000, 0x2001, 1, 2, 185, 0x1FFF]))
        ihl = draw(st.integers(0, 15)) if lie and draw(st.booleans()) else None
        total = draw(st.integers(0, 1600)) if lie and ihl is None else None
        bad = draw(st.integers(0, 15)) == 0
        return IP4, ipv4(
            src, dst, proto, payload, ttl=ttl, frag=frag, options=options, total=total, ihl=ihl, bad_sum=bad
        )
    if draw(st.integers(0, 2)) == 0:
        kinds = draw(st.lists(st.sampled_from([0, 43, 44, 51, 60]), max_size=8))
        proto, payload = chain(
            kinds,
            proto,
            payload,
            frag=draw(st.sampled_from([0, 1, 8, 9, 1480])),
            length=draw(st.sampled_from([0, 0, 0, 1, 3])),
        )
        if draw(st.integers(0, 5)) == 0 and len(payload) > 1:
            payload = payload[:1] + bytes([draw(st.integers(0, 255))]) + payload[2:]
    length = draw(st.sampled_from([0, 1, 7, 8, 1500, 65535])) if lie else None
    return IP6, ipv6(src, dst, proto, payload, ttl=ttl, length=length)


@st.composite
def _neighbour(draw: st.DrawFn, topology: Topology, port: ModelPort) -> bytes:
    mac = st.sampled_from([port.mac, port.mac, port.mac, b"\2\0\0\0\0\x63"])
    if draw(st.booleans()):
        address = _interesting(topology, port, 4)
        frame = arp(
            port,
            draw(address),
            draw(address),
            op=draw(st.sampled_from([1, 1, 2, 3, 8])),
            sha=draw(mac),
            pad=draw(st.sampled_from([0, 18, 200])),
        )
        if draw(st.integers(0, 4)) == 0:
            at = draw(st.integers(14, 21))
            frame = frame[:at] + bytes([draw(st.integers(0, 255))]) + frame[at + 1 :]
        return frame
    address = _interesting(topology, port, 6)
    kind = draw(st.sampled_from([133, 134, 135, 135, 135, 136, 136, 137]))
    options = b"".join(
        option(draw(st.sampled_from([1, 2, 5, 14])), draw(mac), draw(st.sampled_from([1, 1, 1, 2, 0])))
        for _ in range(draw(st.integers(0, 5)))
    )
    return nd(
        port,
        draw(address),
        draw(address),
        kind,
        None if kind in (133, 134) else draw(address),
        options + draw(st.sampled_from([b"", b"", b"\1", b"\1\1\0"])),
        ttl=draw(st.sampled_from([255, 255, 255, 254, 64])),
    )


@st.composite
def sent(draw: st.DrawFn, topology: Topology) -> Sent:
    """Any frame of any port: mostly well-formed, each with a chance to lie somewhere."""
    port = draw(st.sampled_from(topology.ports))
    if draw(st.integers(0, 7)) == 0:
        frame = draw(_neighbour(topology, port))
        kind, payload = int.from_bytes(frame[12:14], "big"), frame[14:]
        dst = frame[:6]
    else:
        kind, payload = draw(_packet(topology, port))
        dst = port.gateway_mac
    other = draw(st.integers(0, 19))
    src = b"\2\0\0\0\0\x63" if other == 0 else port.mac
    if other == 1:
        dst = draw(st.sampled_from([BROADCAST, port.mac, b"\1\0\x5e\0\0\1", b"\2\0\0\0\0\x63"]))
    tags: tuple[int, ...] = ()
    if other == 2:
        tags = tuple(draw(st.lists(st.sampled_from([0x8100, 0x88A8, 0x9100]), min_size=1, max_size=3)))
    if other == 3:
        kind = draw(st.sampled_from([0x0026, 0x8847, 0x8863, 0x88CC, 0x8035, 0x22F0, IP4, IP6, ARP]))
    frame = ethernet(src, dst, kind, payload, tags)
    mangle, gso = draw(st.integers(0, 14)), (0, 0)
    if mangle == 0 and len(frame) > 15:
        frame = frame[: draw(st.integers(15, len(frame)))]
    elif mangle == 1:
        frame += bytes(draw(st.integers(1, 60)))
    elif mangle == 2:
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, min(len(frame) - 1, 90)))
            frame = frame[:at] + bytes([draw(st.integers(0, 255))]) + frame[at + 1 :]
    elif mangle == 3 and len(frame) > 100:
        gso = draw(st.sampled_from([1, 40, 1400, 1460, 9000, 0xFFFF])), draw(st.integers(1, 50))
    assume(runnable(frame))
    return Sent(port, frame, gso)
