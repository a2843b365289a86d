"""The list of tests/netns/test_policy_evasion.py: each row is frames in order, and the fate of each.

A row is a generator: it is asked for its next frame when the one before has met its fate.
"""

from __future__ import annotations

import ipaddress
import platform
import struct
from collections.abc import Callable, Iterator
from typing import Any

from tests.dataplane import frames
from tests.dataplane.model import (
    AH,
    DSTOPTS,
    FRAGMENT,
    HOP,
    ROUTING,
    SCTP,
    TCP,
    UDP,
    UDPLITE,
)
from tests.netns.evasion import ACK, ECHO, SYN, SYN_ACK, Cast, Sent
from tests.netns.wires import vnet

Row = Callable[[Cast], Iterator[Sent]]
ROWS: dict[tuple[str, int], Row] = {}
#: TCP flags by what people call such a segment.
ODD_FLAGS = {
    "bare ACK": ACK,
    "SYN+ACK": SYN_ACK,
    "FIN": 0x01,
    "FIN+ACK": 0x11,
    "RST": 0x04,
    "null": 0x00,
    "xmas": 0x29,
    "SYN+FIN": 0x03,
    "SYN+RST": 0x06,
    "SYN+PSH+URG": 0x2A,
    "SYN+ECE+CWR": 0xC2,
    "all flags": 0xFF,
}


def row(name: str, *versions: int) -> Callable[[Row], Row]:
    """Enters a row under its name, for both families if none is named."""

    def enter(made: Row) -> Row:
        for version in versions or (4, 6):
            assert (name, version) not in ROWS, name
            ROWS[name, version] = made
        return made

    return enter


# -- what the policy says ----------------------------------------------------------------------------


@row("what is allowed passes, what is denied does not")
def _plain(c: Cast) -> Iterator[Sent]:
    yield c.opens("web", 80, "arrives")
    yield c.says("web", 80, "arrives")
    yield c.opens("web", 81, "policy")
    yield c.opens("vault", 80, "policy")
    yield c.says("vault", 80, "policy")
    yield c.opens("vault", 80, "arrives", who="client")


# -- fragments -----------------------------------------------------------------------------------------


@row("pieces of an allowed datagram")
def _pieces(c: Cast) -> Iterator[Sent]:
    whole = c.udp("web", 80, data=bytes(100))
    yield c.piece("web", UDP, whole[:48], 0, "held")
    yield c.piece("web", UDP, whole[48:80], 48, "held")
    yield c.piece("web", UDP, whole[80:], 80, "arrives", more=False)


@row("pieces of a denied datagram")
def _denied_pieces(c: Cast) -> Iterator[Sent]:
    whole = c.udp("web", 81, data=bytes(100))
    yield c.piece("web", UDP, whole[:48], 0, "policy")
    yield c.piece("web", UDP, whole[48:80], 48, "fragment_order")
    yield c.piece("web", UDP, whole[80:], 80, "fragment_order", more=False)


@row("a later piece before the first")
def _late_first(c: Cast) -> Iterator[Sent]:
    whole = c.udp("web", 80, data=bytes(100))
    yield c.piece("web", UDP, whole[48:], 48, "fragment_order", more=False)
    yield c.piece("web", UDP, whole[:48], 0, "held")
    yield c.piece("web", UDP, whole[48:], 48, "arrives", more=False)


@row("a second first piece, for a denied port")
def _second_first(c: Cast) -> Iterator[Sent]:
    good, bad = (c.udp("web", port, data=bytes(100)) for port in (80, 81))
    yield c.piece("web", UDP, good[:48], 0, "held")
    yield c.piece("web", UDP, bad[:48], 0, "policy")
    yield c.piece("web", UDP, good[48:], 48, "arrives", more=False)


@row("a denied first piece, then an allowed one")
def _denied_first(c: Cast) -> Iterator[Sent]:
    good, bad = (c.udp("web", port, data=bytes(100)) for port in (80, 81))
    yield c.piece("web", UDP, bad[:48], 0, "policy")
    yield c.piece("web", UDP, good[:48], 0, "held")
    yield c.piece("web", UDP, good[48:], 48, "arrives", more=False)


@row("a piece over the flags that the first showed")
def _over_flags(c: Cast) -> Iterator[Sent]:
    shown, hidden = c.tcp("web", 80, ACK, data=bytes(28)), c.tcp("web", 80, SYN, data=bytes(28))
    yield c.piece("web", TCP, shown[:24], 0, "held")
    yield c.piece("web", TCP, hidden[8:], 8, "fragment", more=False)


@row("a piece over the ports that stand behind an extension header", 6)
def _over_ports(c: Cast) -> Iterator[Sent]:
    options = bytes([UDP, 0, 1, 4, 0, 0, 0, 0])
    shown, hidden = c.udp("web", 80, data=bytes(40)), c.udp("web", 81, data=bytes(40))
    # Receivers read the next header of the first piece only (RFC 8200, 4.5): the second's may be a lie, and
    # its place that of the ports.
    yield c.piece("web", DSTOPTS, options + shown[:40], 0, "fragment")
    yield c.piece("web", UDP, hidden, 8, "fragment_order", more=False)


@row("a piece that overlaps behind the headers")
def _over_data(c: Cast) -> Iterator[Sent]:
    whole = c.udp("web", 80, data=bytes(100))
    yield c.piece("web", UDP, whole[:48], 0, "held")
    yield c.piece("web", UDP, whole[40:64], 40, "held")


@row("a first piece that ends before the flags")
def _no_flags(c: Cast) -> Iterator[Sent]:
    whole = c.tcp("web", 80, SYN)
    yield c.piece("web", TCP, whole[:8], 0, "fragment")
    yield c.piece("web", TCP, whole[8:], 8, "fragment", more=False)


@row("a SYN against the way of a flow, its flags in the second piece")
def _hidden_syn(c: Cast) -> Iterator[Sent]:
    yield c.opens("evil", 7000, "arrives", who="vault")
    whole = c.tcp("vault", 6000, SYN, sport=7000)
    yield c.piece("vault", TCP, whole[:8], 0, "fragment")


@row("a first piece without ports")
def _no_ports(c: Cast) -> Iterator[Sent]:
    if c.version == 4:
        yield c.piece("web", UDP, b"", 0, "fragment")
    else:
        yield c.piece("web", DSTOPTS, bytes([UDP, 0, 1, 4, 0, 0, 0, 0]), 0, "fragment")
    yield c.piece("web", UDP, c.udp("web", 81, data=bytes(24))[8:], 16, "fragment_order", more=False)


@row("another protocol under the same identification")
def _other_protocol(c: Cast) -> Iterator[Sent]:
    yield c.piece("web", UDP, c.udp("web", 80, data=bytes(40)), 0, "held")
    yield c.piece("web", TCP, bytes(48), 48, "fragment_order", more=False)


@row("the same identification for another receiver")
def _other_receiver(c: Cast) -> Iterator[Sent]:
    yield c.piece("web", UDP, c.udp("web", 80, data=bytes(40)), 0, "held")
    yield c.piece("vault", UDP, bytes(48), 48, "fragment_order", more=False)


@row("pieces of a denied echo request")
def _echo_pieces(c: Cast) -> Iterator[Sent]:
    whole = c.icmp("vault", ECHO[c.version][0], bytes(60))
    yield c.piece("vault", c.icmp_proto, whole[:40], 0, "policy")
    yield c.piece("vault", c.icmp_proto, whole[40:], 40, "fragment_order", more=False)


@row("atomic fragments", 6)
def _atomic(c: Cast) -> Iterator[Sent]:
    yield c.piece("web", TCP, c.tcp("web", 81, SYN), 0, "policy", more=False)
    yield c.piece("web", TCP, c.tcp("web", 80, SYN), 0, "arrives", more=False)


@row("a fragment in a fragment", 6)
def _nested(c: Cast) -> Iterator[Sent]:
    inner = c.fragment_header(UDP, 0, True, ident=1)
    yield c.piece("web", FRAGMENT, inner + c.udp("web", 81, data=bytes(40)), 0, "policy", more=False)
    later = c.fragment_header(UDP, 48, False, ident=1)
    yield c.piece("web", FRAGMENT, later + bytes(48), 0, "fragment or fragment_order")


@row("IPv4's reserved fragment bit", 4)
def _evil_bit(c: Cast) -> Iterator[Sent]:
    yield c.send("web", TCP, c.tcp("web", 81, SYN), "policy", frag=0x8000)
    yield c.send("web", TCP, c.tcp("web", 81, SYN), "policy", frag=0xC000)


# -- extension headers, options, lengths ---------------------------------------------------------------


def _chained(kinds: list[int]) -> Row:
    def made(c: Cast) -> Iterator[Sent]:
        for port, fate in ((81, "policy"), (80, "arrives")):
            following, payload = frames.chain(kinds, TCP, c.tcp("web", port, SYN))
            yield c.send("web", following, payload, fate)

    return made


for _name, _kinds in {
    "hop-by-hop options": [HOP],
    "destination options": [DSTOPTS],
    "a routing header": [ROUTING],
    "an authentication header": [AH],
    "five headers": [HOP, DSTOPTS, ROUTING, AH, DSTOPTS],
}.items():
    row(f"{_name} before the port", 6)(_chained(_kinds))


@row("more extension headers than are followed", 6)
def _too_many(c: Cast) -> Iterator[Sent]:
    following, payload = frames.chain([DSTOPTS] * 7, TCP, c.tcp("web", 80, SYN))
    yield c.send("web", following, payload, "ext_headers")


@row("an extension header that ends behind the packet", 6)
def _long_header(c: Cast) -> Iterator[Sent]:
    head = bytes([TCP, 40, 1, 4, 0, 0, 0, 0])
    yield c.send("web", DSTOPTS, head + c.tcp("web", 80, SYN), "truncated")


@row("a routing header that names the denied peer", 6)
def _routed(c: Cast) -> Iterator[Sent]:
    # Type 0, one address left (RFC 5095 took it out of use): for web, and judged as for web.
    def head() -> bytes:
        return struct.pack("!BBBBI", TCP, 2, 0, 1, 0) + ipaddress.ip_address(c.at("vault")).packed

    yield c.send("web", ROUTING, head() + c.tcp("web", 80, SYN), "arrives")
    yield c.send("web", ROUTING, head() + c.tcp("web", 81, SYN), "policy")


@row("a loose source route by way of the host to the denied peer", 4)
def _source_route(c: Cast) -> Iterator[Sent]:
    address = ipaddress.ip_address(c.at("vault")).packed
    options = bytes([0x83, 7, 4]) + address + b"\1"
    packet = c.packet("host", TCP, c.tcp("host", 80, SYN), options=options)
    yield Sent("evil", "vault", c.framed("evil", packet), "policy")


@row("options before a denied port", 4)
def _options(c: Cast) -> Iterator[Sent]:
    for options in (b"\1" * 4, b"\x94\4\0\0", b"\7\x27\4" + bytes(37), b"\x83\7\4" + bytes(4) + b"\1"):
        yield c.send("web", TCP, c.tcp("web", 81, SYN), "policy", options=options)


@row("headers that other extension headers might follow", 6)
def _unknown_headers(c: Cast) -> Iterator[Sent]:
    # Mobility, HIP, shim6, experimental, none at all: what follows is not TCP by any rule's word.
    for kind in (135, 139, 140, 253, 59):
        head = bytes([TCP, 0, 0, 0, 0, 0, 0, 0])
        yield c.send("web", kind, head + c.tcp("web", 80, SYN), "policy")


@row("an authentication header in IPv4", 4)
def _ah4(c: Cast) -> Iterator[Sent]:
    head = struct.pack("!BBHIII", TCP, 4, 0, 1, 1, 0) + bytes(8)
    yield c.send("web", AH, head + c.tcp("web", 80, SYN), "policy")


@row("other protocols with the ports where TCP has them")
def _other_protocols(c: Cast) -> Iterator[Sent]:
    body = c.udp("web", 80, data=bytes(24))
    for proto in (50, 33, UDPLITE, SCTP, 47, 253):
        yield c.send("web", proto, body, "policy")


@row("tunnels with an allowed packet inside")
def _tunnels(c: Cast) -> Iterator[Sent]:
    inner = c.packet("web", TCP, c.tcp("web", 80, SYN))
    yield c.send("vault", 4 if c.version == 4 else 41, inner, "policy")
    yield c.send("web", 4 if c.version == 4 else 41, inner, "policy")


@row("layer 4 cut off")
def _cut(c: Cast) -> Iterator[Sent]:
    for proto, body in (
        (TCP, c.tcp("web", 80, SYN)[:3]),
        (UDP, c.udp("web", 80)[:3]),
        (SCTP, b"\0\x50"),
        (TCP, b""),
        (c.icmp_proto, b""),
    ):
        yield c.send("web", proto, body, "truncated")
    yield c.send("vault", TCP, c.tcp("vault", 80, SYN)[:4], "policy")
    yield c.send("vault", SCTP, struct.pack("!HH", 80, 80), "policy")


@row("ports in the padding")
def _padded(c: Cast) -> Iterator[Sent]:
    short: dict[str, Any] = {"total": 20} if c.version == 4 else {"length": 0}
    packet = c.packet("web", TCP, c.tcp("web", 80, SYN), **short)
    yield Sent("evil", "web", c.framed("evil", packet), "truncated")


@row("a jumbogram that is none", 6)
def _jumbo(c: Cast) -> Iterator[Sent]:
    head = struct.pack("!BBBBI", TCP, 0, 0xC2, 4, 70_000)
    yield c.send("web", HOP, head + c.tcp("web", 80, SYN), "truncated", length=0)


@row("header lengths and versions that lie", 4)
def _lies(c: Cast) -> Iterator[Sent]:
    good = c.tcp("web", 80, SYN)
    yield c.send("web", TCP, good, "ip_version", ihl=4)
    yield c.send("web", TCP, good, "truncated", ihl=15)
    yield c.send("web", TCP, good, "ip_checksum", bad_sum=True)
    six = c.framed("evil", b"\x65" + c.packet("web", TCP, good)[1:])
    yield Sent("evil", "web", six, "ip_version")


# -- TCP out of state ----------------------------------------------------------------------------------


def _odd(flags: int) -> Row:
    def made(c: Cast) -> Iterator[Sent]:
        yield c.opens("vault", 80, "policy", flags)
        yield c.opens("web", 81, "policy", flags)

    return made


def _against(flags: int) -> Row:
    def made(c: Cast) -> Iterator[Sent]:
        yield c.opens("evil", 7000, "arrives", who="vault")
        # What has no SYN, or a SYN that answers, opens nothing in a TCP that is to be reached.
        answer = "policy" if flags & SYN_ACK == SYN else "arrives"
        yield c.opens("vault", 6000, answer, flags, sport=7000)
        yield c.opens("vault", 6001, "policy", flags, sport=7000)
        yield c.opens("vault", 6000, "policy", flags, sport=7001)
        yield c.opens("evil", 7000, "arrives", ACK, who="vault")

    return made


for _name, _flags in ODD_FLAGS.items():
    row(f"{_name} to a denied port")(_odd(_flags))
    row(f"{_name} from who was asked")(_against(_flags))


@row("simultaneous open")
def _simultaneous(c: Cast) -> Iterator[Sent]:
    yield c.opens("vault", 6000, "policy", sport=7000)
    yield c.opens("evil", 7000, "arrives", who="vault")
    yield c.opens("vault", 6000, "policy", sport=7000)
    yield c.opens("vault", 6000, "arrives", SYN_ACK, sport=7000)


@row("the same four-tuple after the flow was reset or closed")
def _reused(c: Cast) -> Iterator[Sent]:
    for sport, ending in ((6000, 0x14), (6100, 0x11)):
        yield c.opens("evil", 7000, "arrives", who="vault", sport=sport)
        yield c.opens("vault", sport, "arrives", SYN_ACK, sport=7000)
        yield c.opens("evil", 7000, "arrives", ending, who="vault", sport=sport)
        yield c.opens("vault", sport, "arrives", ending, sport=7000)
        yield c.opens("vault", sport, "policy", SYN, sport=7000)


# -- UDP, SCTP, ports ------------------------------------------------------------------------------------


@row("UDP beside the flow that was opened to it")
def _udp_beside(c: Cast) -> Iterator[Sent]:
    yield c.says("vault", 6000, "policy", sport=7000)
    yield c.says("evil", 7000, "arrives", who="vault")
    yield c.says("vault", 6000, "arrives", sport=7000)
    yield c.says("vault", 6001, "policy", sport=7000)
    yield c.says("vault", 6000, "policy", sport=7001)
    yield c.opens("vault", 6000, "policy", sport=7000)


@row("an SCTP association against the way of one")
def _sctp(c: Cast) -> Iterator[Sent]:
    def chunk(sport: int, dport: int, kind: int) -> bytes:
        return struct.pack("!HHIIBBHIIHHI", sport, dport, 0, 0, kind, 0, 20, 1, 1500, 1, 1, 1)

    yield c.send("vault", SCTP, chunk(7000, 6000, 1), "policy")
    yield c.send("evil", SCTP, chunk(6000, 7000, 1), "arrives", who="vault")
    yield c.send("vault", SCTP, chunk(7000, 6000, 2), "arrives")
    yield c.send("vault", SCTP, chunk(7000, 6000, 1), "policy")


@row("source ports of known services")
def _source_ports(c: Cast) -> Iterator[Sent]:
    for sport in (20, 53, 80, 123, 443):
        yield c.opens("vault", 80, "policy", sport=sport)
        yield c.says("vault", 53, "policy", sport=sport)


@row("port 0")
def _zero(c: Cast) -> Iterator[Sent]:
    yield c.says("web", 0, "policy")
    yield c.opens("web", 0, "policy")
    yield c.says("web", 80, "arrives", sport=0)


#: A socket can hand over UDP's super-packets since Linux 6.2 (VIRTIO_NET_HDR_GSO_UDP_L4).
_UDP_SEGMENTS = tuple(int(part) for part in platform.release().split(".")[:2]) >= (6, 2)


@row("super-packets")
def _super(c: Cast) -> Iterator[Sent]:
    head = 54 if c.version == 4 else 74
    for to, port, fate in (("vault", 80, "policy"), ("web", 81, "policy"), ("web", 80, "arrives")):
        segment = c.tcp(to, port, ACK, data=bytes(3000))
        packet = c.packet(to, TCP, segment)
        tcp = vnet(1 if c.version == 4 else 4, head, 1000, head - 20, 16)
        yield Sent("evil", to, c.framed("evil", packet), fate, header=tcp, packets=3)
        if not _UDP_SEGMENTS:
            continue
        packet = c.packet(to, UDP, c.udp(to, port, data=bytes(3000)))
        udp = vnet(5, head - 12, 1000, head - 20, 6)
        yield Sent("evil", to, c.framed("evil", packet), fate, header=udp, packets=3)
