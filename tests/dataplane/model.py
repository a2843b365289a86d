"""What the guard and the switch must do with a frame that a sandbox sends: an oracle, in plain Python.

Written from the specifications (named at each rule) and not from the C, to be compared with it.
It says *all* the reasons for which a frame deserves to be refused, so that the order in which a program
looks at them is its own business: a refused frame must be refused for one of these, and a frame
for which there is none must pass.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

TAGS = {0x8100, 0x88A8, 0x9100}
IP4, ARP, IP6 = 0x0800, 0x0806, 0x86DD
ICMP, TCP, UDP, ICMP6, SCTP, UDPLITE = 1, 6, 17, 58, 132, 136
HOP, ROUTING, FRAGMENT, AH, DSTOPTS = 0, 43, 44, 51, 60
EXTENSIONS = {HOP, ROUTING, FRAGMENT, AH, DSTOPTS}
EXT_MOST = 6
"""Extension headers that a packet may have here; RFC 8200 has each of five at most once, one twice."""


@dataclass(frozen=True)
class ModelPort:
    """A port as its owner describes it."""

    port_id: int
    ifindex: int
    net: int
    sandbox: int
    mac: bytes
    addresses: tuple[Address, ...]
    mtu: int = 1500
    gateway_mac: bytes = bytes.fromhex("eeeeeeeeeeee")
    gateways: tuple[Address, ...] = (ipaddress.ip_address("169.254.1.1"), ipaddress.ip_address("fe80::1"))

    @property
    def link_local(self) -> Address:
        """Of the MAC (RFC 4291, appendix A)."""
        eui = bytes([self.mac[0] ^ 2]) + self.mac[1:3] + b"\xff\xfe" + self.mac[3:]
        return ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + eui)

    def gateway(self, version: int) -> Address | None:
        """Of a family, if the port has it."""
        if not any(a.version == version for a in self.addresses):
            return None
        return next(g for g in self.gateways if g.version == version)


@dataclass(frozen=True)
class Topology:
    """All ports of the host, and who may reach whom."""

    ports: tuple[ModelPort, ...]
    reach: frozenset[tuple[int, int]] = frozenset()

    def owner(self, address: Address) -> ModelPort | None:
        """The port with this address."""
        return next((p for p in self.ports if address in p.addresses), None)

    def own(self, port: ModelPort) -> set[Address]:
        """What the port may use: its addresses, and its sandbox's others on the same network."""
        return {a for p in self.ports if (p.sandbox, p.net) == (port.sandbox, port.net) for a in p.addresses}


@dataclass
class Verdict:
    """``reasons``: why it must be refused, any of them. Else ``action``: answer, fast, or miss."""

    reasons: set[str] = field(default_factory=set)
    action: str = "miss"
    target: ModelPort | None = None


@dataclass
class _Packet:
    """What layer 3 said."""

    version: int
    src: Address
    dst: Address
    ttl: int
    proto: int
    l4: bytes = b""
    length: int = 0
    options: bool = False
    fragment: bool = False
    later: bool = False


class _Refused(Exception):
    """The frame can't be read further."""


def checksum(data: bytes) -> int:
    """RFC 1071; 0 for data that holds its own right checksum."""
    data += bytes(len(data) % 2)
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def judge(topology: Topology, port: ModelPort, frame: bytes, gso_size: int = 0) -> Verdict:
    """The verdict on ``frame``, sent by ``port``."""
    verdict = Verdict()
    try:
        _judge(topology, port, frame, gso_size, verdict)
    except _Refused as refused:
        verdict.reasons.add(str(refused))
    return verdict


def _judge(topology: Topology, port: ModelPort, frame: bytes, gso: int, verdict: Verdict) -> None:
    if len(frame) < 14:
        raise _Refused("truncated")
    dst, src, kind = frame[:6], frame[6:12], int.from_bytes(frame[12:14], "big")
    if src != port.mac:
        verdict.reasons.add("src_mac")
    if kind in TAGS:
        if len(frame) < 18:
            raise _Refused("truncated")
        raise _Refused("double_tag" if int.from_bytes(frame[16:18], "big") in TAGS else "vlan")
    group = bool(dst[0] & 1)
    if not group and dst != port.gateway_mac:
        verdict.reasons.add("dst_mac")
    if kind == ARP:
        _arp(topology, port, frame[14:], verdict)
        return
    if kind not in (IP4, IP6):
        raise _Refused("ethertype")
    packet = (_ipv4 if kind == IP4 else _ipv6)(frame[14:], bool(gso), verdict)
    _guard(topology, port, packet, verdict)
    wire = _wire_length(packet, len(frame) - 14, gso)
    if wire > port.mtu:
        verdict.reasons.add("mtu")
    if verdict.reasons:
        return
    if _answered(port, packet):
        verdict.action = "answer"
        return
    _deliver(topology, port, packet, verdict, group=group, payload=len(frame) - 14, wire=wire, gso=gso)


def _arp(topology: Topology, port: ModelPort, data: bytes, verdict: Verdict) -> None:
    """RFC 826, RFC 5227: only the port's own binding may be told or asked with."""
    if len(data) < 28:
        raise _Refused("truncated")
    if data[:6] != bytes.fromhex("000108000604"):
        raise _Refused("arp_spoof")
    sender = ipaddress.IPv4Address(data[14:18])
    if data[8:14] != port.mac or (int(sender) and sender not in topology.own(port)):
        raise _Refused("arp_spoof")
    if data[6:8] == b"\x00\x01" and ipaddress.IPv4Address(data[24:28]) == port.gateway(4):
        verdict.action = "answer"


def _ipv4(data: bytes, gso: bool, verdict: Verdict) -> _Packet:
    """RFC 791."""
    if len(data) < 20:
        raise _Refused("truncated")
    head, total = (data[0] & 15) * 4, int.from_bytes(data[2:4], "big")
    if data[0] >> 4 != 4 or head < 20:
        raise _Refused("ip_version")
    if not total and gso:
        total = len(data)  # BIG TCP
    if total < head or total > len(data):
        raise _Refused("truncated")
    if checksum(data[:head]):
        verdict.reasons.add("ip_checksum")
    frag = int.from_bytes(data[6:8], "big") & 0x3FFF
    packet = _Packet(
        version=4,
        src=ipaddress.IPv4Address(data[12:16]),
        dst=ipaddress.IPv4Address(data[16:20]),
        ttl=data[8],
        proto=data[9],
        l4=data[head:total],
        length=total,
        options=head > 20,
        fragment=bool(frag),
        later=bool(frag & 0x1FFF),
    )
    # RFC 1858 and 3128: a first fragment too small for its header, and one that could overwrite it
    if frag & 0x1FFF == 1:
        raise _Refused("fragment")
    if packet.fragment and not packet.later and packet.proto in (TCP, UDP) and len(packet.l4) < 16:
        raise _Refused("fragment")
    if not packet.later:
        _upper(packet, "truncated")
    return packet


def _ipv6(data: bytes, gso: bool, _verdict: Verdict) -> _Packet:
    """RFC 8200."""
    if len(data) < 40:
        raise _Refused("truncated")
    if data[0] >> 4 != 6:
        raise _Refused("ip_version")
    total = int.from_bytes(data[4:6], "big") + 40
    if total == 40 and gso:
        total = len(data)
    if total > len(data):
        raise _Refused("truncated")
    src, dst = ipaddress.IPv6Address(data[8:24]), ipaddress.IPv6Address(data[24:40])
    if src.ipv4_mapped or dst.ipv4_mapped:
        raise _Refused("ip_version")
    packet = _Packet(6, src, dst, ttl=data[7], proto=data[6], length=total)
    at, count, frag = 40, 0, 0
    while packet.proto in EXTENSIONS and not packet.later:
        count += 1
        if count > EXT_MOST:
            raise _Refused("ext_headers")
        if at + 4 > len(data):
            raise _Refused("truncated")
        packet.options = True
        this, packet.proto = packet.proto, data[at]
        if this == FRAGMENT:
            frag = int.from_bytes(data[at + 2 : at + 4], "big")
            packet.later = bool(frag >> 3)
            packet.fragment |= bool(frag >> 3 or frag & 1)
            at += 8
        else:
            at += (data[at + 1] + 2) * 4 if this == AH else (data[at + 1] + 1) * 8
        if at > total:
            raise _Refused("truncated")
        # RFC 1858, for IPv6: a later piece could replace what the first one showed.
        if packet.later and packet.proto == TCP and frag >> 3 == 1:
            raise _Refused("fragment")
        if packet.fragment and not packet.later and packet.proto in EXTENSIONS:
            raise _Refused("fragment")
    packet.l4 = data[at:total]
    if not packet.later:
        # RFC 7112: the first fragment holds the whole chain
        _upper(packet, "fragment" if packet.fragment else "truncated")
        if packet.fragment and packet.proto == TCP and len(packet.l4) < 14:
            raise _Refused("fragment")
    return packet


def _upper(packet: _Packet, reason: str) -> None:
    """Enough of layer 4 to know what it is: the ports, or the ICMP type."""
    need = {TCP: 4, UDP: 4, SCTP: 4, UDPLITE: 4, ICMP: 1, ICMP6: 1}.get(packet.proto, 0)
    if len(packet.l4) < need:
        raise _Refused(reason)


def _guard(topology: Topology, port: ModelPort, packet: _Packet, verdict: Verdict) -> None:
    own = topology.own(port)
    ports = b"" if packet.later or packet.proto != UDP else packet.l4[:4]
    source, target = int.from_bytes(ports[:2], "big"), int.from_bytes(ports[2:4], "big")
    if packet.version == 6:
        if packet.proto == ICMP6:
            _nd(own, port, packet, verdict)
        if packet.src not in own and packet.src != port.link_local and not _may_be_unspecified(packet):
            verdict.reasons.add("src_ip")
        if source == 547 or target == 546:  # RFC 8415, 7.2
            verdict.reasons.add("dhcp_server")
        return
    asks = packet.src == ipaddress.IPv4Address(0) and packet.dst == ipaddress.IPv4Address("255.255.255.255")
    if packet.src not in own and not (asks and (source, target) == (68, 67)):  # RFC 2131, 4.1
        verdict.reasons.add("src_ip")
    if source == 67 or target == 68:
        verdict.reasons.add("dhcp_server")
    if packet.proto == ICMP and not packet.later and packet.l4[0] in (5, 9):
        verdict.reasons.add("ra")


def _may_be_unspecified(packet: _Packet) -> bool:
    """:: speaks to groups only: DAD, router solicitation, MLD (RFC 4861, 4862, 3590, 3810)."""
    return (
        int(packet.src) == 0
        and packet.dst.is_multicast
        and packet.proto == ICMP6
        and not packet.later
        and packet.l4[0] in (131, 133, 135, 143)
    )


def _nd(own: set[Address], port: ModelPort, packet: _Packet, verdict: Verdict) -> None:
    """RFC 4861, RFC 6980."""
    if packet.later:
        return
    kind = packet.l4[0]
    if kind in (134, 137):
        verdict.reasons.add("ra")
    if 133 <= kind <= 137 and packet.fragment:
        verdict.reasons.add("nd_spoof")
    if kind not in (133, 135, 136):
        return
    options = packet.l4[8:]
    if kind != 133:
        if packet.ttl != 255:
            verdict.reasons.add("nd_spoof")
        if len(packet.l4) < 24:
            verdict.reasons.add("truncated")
            return
        target = ipaddress.IPv6Address(packet.l4[8:24])
        claims = kind == 136 or int(packet.src) == 0
        if claims and target not in own and target != port.link_local:
            verdict.reasons.add("nd_spoof")
        options = packet.l4[24:]
    seen = 0
    while len(options) >= 8:
        seen += 1
        if seen > 4 or options[1] == 0 or (options[0] in (1, 2) and options[2:8] != port.mac):
            verdict.reasons.add("nd_spoof")
            return
        options = options[options[1] * 8 :]
    if seen == 4 and options:
        verdict.reasons.add("nd_spoof")


def _answered(port: ModelPort, packet: _Packet) -> bool:
    """Whether it is a question that the gateway answers."""
    gateway = port.gateway(packet.version)
    if packet.later or gateway is None:
        return False
    if packet.proto == ICMP6 and packet.l4[0] == 135:
        asks = packet.l4[1] == 0 and ipaddress.IPv6Address(packet.l4[8:24]) == gateway
        return asks and int(packet.src) != 0 and not packet.options
    echo = {(ICMP, 8), (ICMP6, 128)}
    if packet.fragment or packet.options or len(packet.l4) < 8:
        return False
    # Either family's echo, by its own protocol only.
    return (
        (packet.proto, packet.l4[0]) in echo
        and packet.dst == gateway
        and (packet.proto == (ICMP if packet.version == 4 else ICMP6))
    )


def _deliver(
    topology: Topology,
    port: ModelPort,
    packet: _Packet,
    verdict: Verdict,
    *,
    group: bool,
    payload: int,
    wire: int,
    gso: int,
) -> None:
    if packet.dst.is_multicast or packet.dst == ipaddress.IPv4Address("255.255.255.255"):
        return
    target = topology.owner(packet.dst)
    if target is None:
        return
    if target == port:
        verdict.reasons.add("loop")
    if group:
        verdict.reasons.add("dst_mac")  # RFC 1812, 5.3.4
    if port.net != target.net and (port.net, target.net) not in topology.reach:
        verdict.reasons.add("isolation")
    if verdict.reasons:
        return
    verdict.target = target
    host_only = (
        packet.ttl <= 1
        or packet.options
        or packet.fragment
        or packet.src.is_link_local
        or packet.length != payload
        or wire > target.mtu
        or (gso and packet.proto not in (TCP, UDP))
    )
    verdict.action = "miss" if host_only else "fast"


def _wire_length(packet: _Packet, payload: int, gso: int) -> int:
    """Layer 3 bytes of the largest frame that a super-packet becomes."""
    if not gso:
        return payload
    if packet.proto == SCTP:
        return 0
    head = packet.length - len(packet.l4)
    if packet.proto != TCP:
        return head + 8 + gso
    return head + (packet.l4[12] >> 4 if len(packet.l4) > 12 else 5) * 4 + gso
