"""Each rule of the guard by example: the frame, and the one reason for which it is refused."""

from __future__ import annotations

import ipaddress
import struct

import pytest

from portwright.dataplane.abi import PwDir, PwFlow, PwPortFlag, PwStateFlag
from tests.dataplane import frames
from tests.dataplane.model import ARP, ICMP, ICMP6, IP4, IP6, TCP, UDP, checksum, judge
from tests.dataplane.rig import NEXT, REDIRECT, SHOT, Rig, reasons, topology

pytestmark = pytest.mark.netns

TOPOLOGY = topology(list(range(1, 9)))
ONE, TWO, THREE, FOUR, V4, V6, LEG, FAR = TOPOLOGY.ports
A4, A6 = map(str, ONE.addresses)
B4, B6 = map(str, TWO.addresses)
LL = str(ONE.link_local)
STRANGER = b"\2\0\0\0\0\x63"
GROUP = "ff02::1:ff00:1"


def wrap(
    packet: bytes, *, src: bytes = ONE.mac, dst: bytes = ONE.gateway_mac, tags: tuple[int, ...] = ()
) -> bytes:
    """In Ethernet, of the family that the packet says."""
    return frames.ethernet(src, dst, IP4 if packet[0] >> 4 == 4 else IP6, packet, tags)


def udp4(src: str = A4, dst: str = B4, sport: int = 4000, dport: int = 53, **more: object) -> bytes:
    """A datagram of eight bytes."""
    a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
    return frames.ipv4(src, dst, UDP, frames.udp(a, b, sport, dport, b"12345678"), **more)  # type: ignore[arg-type]


def udp6(src: str = A6, dst: str = B6, sport: int = 4000, dport: int = 53, **more: object) -> bytes:
    """The same in IPv6."""
    a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
    return frames.ipv6(src, dst, UDP, frames.udp(a, b, sport, dport, b"12345678"), **more)  # type: ignore[arg-type]


def chained(kinds: list[int], upper: int = UDP, payload: bytes = bytes(16), **more: int) -> bytes:
    """IPv6 with extension headers, from one to two."""
    first, rest = frames.chain(kinds, upper, payload, **more)
    return frames.ipv6(A6, B6, first, rest)


def icmp(src: str, dst: str, kind: int, body: bytes, code: int = 0) -> bytes:
    """An ICMP or ICMPv6 message, by the addresses' family."""
    return frames.icmp(ipaddress.ip_address(src), ipaddress.ip_address(dst), kind, body, code)


def carrying(src: str, dst: str, message: bytes) -> bytes:
    """A packet around such a message."""
    return frames.ipv6(src, dst, ICMP6, message) if ":" in src else frames.ipv4(src, dst, ICMP, message)


def icmp6(kind: int, body: bytes, *, src: str = A6, dst: str = "ff02::1", ttl: int = 255) -> bytes:
    """An ICMPv6 packet."""
    return frames.ipv6(src, dst, ICMP6, icmp(src, dst, kind, body), ttl=ttl)


RA = icmp(A6, "ff02::1", 134, bytes(12))
JUMBO = frames.ipv6(A6, B6, 0, bytes([UDP, 0, 0xC2, 4]) + struct.pack("!I", 70000) + bytes(60), length=0)

REFUSED: list[tuple[str, str, bytes]] = [
    ("source MAC", "src_mac", wrap(udp4(), src=STRANGER)),
    ("source MAC of another port", "src_mac", wrap(udp4(src=B4), src=TWO.mac)),
    ("a neighbour's MAC as destination", "dst_mac", wrap(udp4(), dst=TWO.mac)),
    ("broadcast MAC around a port's address", "dst_mac", wrap(udp4(), dst=frames.BROADCAST)),
    ("multicast MAC around a port's IPv6 address", "dst_mac", wrap(udp6(), dst=b"\x33\x33\0\0\0\1")),
    ("source IPv4", "src_ip", wrap(udp4(src="10.1.0.99"))),
    ("another port's IPv4", "src_ip", wrap(udp4(src=B4, dst="192.0.2.1"))),
    ("the gateway's IPv4", "src_ip", wrap(udp4(src="169.254.1.1"))),
    ("loopback as source", "src_ip", wrap(udp4(src="127.0.0.1"))),
    ("a group as source", "src_ip", wrap(udp4(src="224.0.0.1"))),
    ("0.0.0.0 that is not DHCP", "src_ip", wrap(udp4(src="0.0.0.0", dst="255.255.255.255"))),
    ("DHCP client by unicast", "src_ip", wrap(udp4(src="0.0.0.0", sport=68, dport=67))),
    ("its sandbox's address on another network", "src_ip", wrap(udp4(src=str(FAR.addresses[0])))),
    ("source IPv6", "src_ip", wrap(udp6(src="fd00:1::99"))),
    ("another's link-local", "src_ip", wrap(udp6(src=str(TWO.link_local)))),
    (":: in UDP", "src_ip", wrap(udp6(src="::"))),
    (":: in UDP to a group", "src_ip", wrap(udp6(src="::", dst="ff02::1"))),
    ("an echo request from ::", "src_ip", wrap(icmp6(128, bytes(8), src="::"))),
    (
        "DAD to one node",
        "src_ip",
        wrap(icmp6(135, bytes(4) + ipaddress.ip_address(A6).packed, src="::", dst=B6)),
    ),
    ("IPv4 in an IPv6 source", "ip_version", wrap(udp6(src=f"::ffff:{A4}"))),
    ("IPv4 in an IPv6 destination", "ip_version", wrap(udp6(dst=f"::ffff:{B4}"))),
    ("ARP: sender's IPv4", "arp_spoof", frames.arp(ONE, B4, "169.254.1.1")),
    ("ARP: the gateway's IPv4", "arp_spoof", frames.arp(ONE, "169.254.1.1", A4, op=2)),
    ("ARP: sender's MAC", "arp_spoof", frames.arp(ONE, A4, "169.254.1.1", sha=STRANGER)),
    (
        "ARP: another hardware",
        "arp_spoof",
        frames.arp(ONE, A4, B4)[:15] + b"\6" + frames.arp(ONE, A4, B4)[16:],
    ),
    ("ARP: cut", "truncated", frames.arp(ONE, A4, B4, pad=0)[:-1]),
    ("RARP", "ethertype", frames.ethernet(ONE.mac, frames.BROADCAST, 0x8035, bytes(46))),
    ("MPLS", "ethertype", frames.ethernet(ONE.mac, ONE.gateway_mac, 0x8847, bytes(46))),
    (
        "802.3 with a length (STP)",
        "ethertype",
        frames.ethernet(ONE.mac, b"\1\x80\xc2\0\0\0", 38, b"\x42\x42\3" + bytes(43)),
    ),
    ("802.1Q", "vlan", wrap(udp4(), tags=(0x8100,))),
    ("802.1ad", "vlan", wrap(udp4(), tags=(0x88A8,))),
    ("0x9100", "vlan", wrap(udp4(), tags=(0x9100,))),
    ("802.1Q twice", "double_tag", wrap(udp4(), tags=(0x8100, 0x8100))),
    ("802.1ad and 802.1Q", "double_tag", wrap(udp4(), tags=(0x88A8, 0x8100))),
    ("0x9100 and 802.1Q", "double_tag", wrap(udp4(), tags=(0x9100, 0x8100))),
    ("three tags", "double_tag", wrap(udp4(), tags=(0x8100, 0x8100, 0x8100))),
    (
        "ND: NS with another's source option",
        "nd_spoof",
        frames.nd(ONE, A6, GROUP, 135, "fe80::1", frames.option(1, STRANGER)),
    ),
    (
        "ND: NA of the gateway",
        "nd_spoof",
        frames.nd(ONE, A6, "ff02::1", 136, "fe80::1", frames.option(2, ONE.mac)),
    ),
    ("ND: NA of a neighbour", "nd_spoof", frames.nd(ONE, A6, "ff02::1", 136, B6, frames.option(2, ONE.mac))),
    (
        "ND: NA with another's target option",
        "nd_spoof",
        frames.nd(ONE, A6, "ff02::1", 136, A6, frames.option(2, STRANGER)),
    ),
    (
        "ND: the bad option comes fourth",
        "nd_spoof",
        frames.nd(ONE, A6, "ff02::1", 136, A6, frames.option(5, ONE.mac) * 3 + frames.option(2, STRANGER)),
    ),
    (
        "ND: the bad option comes fifth",
        "nd_spoof",
        frames.nd(ONE, A6, "ff02::1", 136, A6, frames.option(5, ONE.mac) * 4 + frames.option(2, STRANGER)),
    ),
    (
        "ND: an option of length zero",
        "nd_spoof",
        frames.nd(ONE, A6, "ff02::1", 136, A6, frames.option(2, ONE.mac, 0)),
    ),
    ("ND: from a hop away", "nd_spoof", frames.nd(ONE, A6, GROUP, 135, "fe80::1", b"", ttl=254)),
    ("ND: DAD for a neighbour's address", "nd_spoof", frames.nd(ONE, "::", GROUP, 135, B6, b"")),
    ("ND: DAD for the gateway's", "nd_spoof", frames.nd(ONE, "::", GROUP, 135, "fe80::1", b"")),
    (
        "ND: RS with another's source option",
        "nd_spoof",
        frames.nd(ONE, LL, "ff02::2", 133, None, frames.option(1, STRANGER)),
    ),
    (
        "ND: in a fragment",
        "nd_spoof",
        wrap(
            frames.ipv6(
                A6,
                "ff02::1",
                *frames.chain([44], ICMP6, icmp(A6, "ff02::1", 136, bytes(20)), frag=1),
                ttl=255,
            )
        ),
    ),
    ("router advertisement", "ra", wrap(icmp6(134, bytes(12), src=LL))),
    ("redirect", "ra", wrap(icmp6(137, bytes(36), src=LL))),
    (
        "RA behind all kinds of headers",
        "ra",
        wrap(frames.ipv6(A6, "ff02::1", *frames.chain([0, 60, 43, 51, 60], ICMP6, RA), ttl=255)),
    ),
    (
        "RA in an atomic fragment",
        "ra",
        wrap(frames.ipv6(A6, "ff02::1", *frames.chain([44], ICMP6, RA), ttl=255)),
    ),
    (
        "RA in a first fragment behind options",
        "fragment",
        wrap(frames.ipv6(A6, "ff02::1", *frames.chain([60, 44, 60], ICMP6, RA, frag=1), ttl=255)),
    ),
    (
        "RA behind a fragment without it",
        "fragment",
        wrap(frames.ipv6(A6, "ff02::1", *frames.chain([44, 60], ICMP6, b"", frag=1), ttl=255)),
    ),
    ("IPv4 redirect", "ra", wrap(frames.ipv4(A4, B4, ICMP, icmp(A4, B4, 5, bytes(32))))),
    (
        "IPv4 router advertisement",
        "ra",
        wrap(frames.ipv4(A4, "224.0.0.1", ICMP, icmp(A4, "224.0.0.1", 9, bytes(12))), dst=b"\1\0\x5e\0\0\1"),
    ),
    ("DHCP server", "dhcp_server", wrap(udp4(sport=67, dport=68))),
    ("DHCP server from another port", "dhcp_server", wrap(udp4(sport=4000, dport=68))),
    ("DHCPv6 server", "dhcp_server", wrap(udp6(sport=547, dport=546))),
    ("DHCPv6 server from another port", "dhcp_server", wrap(udp6(sport=4000, dport=546))),
    (
        "DHCPv6 server behind options",
        "dhcp_server",
        wrap(chained([60], UDP, struct.pack("!HHHH", 547, 546, 8, 0))),
    ),
    ("version 5", "ip_version", wrap(udp4())[:14] + b"\x55" + wrap(udp4())[15:]),
    ("a header of 16 bytes", "ip_version", wrap(udp4(ihl=4))),
    ("a header longer than the packet", "truncated", wrap(udp4(ihl=15))),
    ("total length over the frame", "truncated", wrap(udp4(total=100))),
    ("total length under the header", "truncated", wrap(udp4(total=19))),
    ("total length before the ports", "truncated", wrap(udp4(total=22))),
    ("payload length over the frame", "truncated", wrap(udp6(length=17))),
    ("payload length before the ports", "truncated", wrap(udp6(length=2))),
    ("header checksum", "ip_checksum", wrap(udp4(bad_sum=True))),
    ("header checksum over options", "ip_checksum", wrap(udp4(bad_sum=True, options=b"\1" * 40))),
    ("tiny first fragment", "fragment", wrap(frames.ipv4(A4, B4, TCP, bytes(8), frag=0x2000))),
    ("fragment at offset one", "fragment", wrap(frames.ipv4(A4, B4, TCP, bytes(32), frag=1))),
    ("an IPv6 first fragment without ports", "fragment", wrap(chained([44], TCP, b"", frag=1))),
    ("seven extension headers", "ext_headers", wrap(chained([0, 60, 43, 60, 51, 60, 60]))),
    ("destination options without end", "ext_headers", wrap(chained([60] * 20))),
    (
        "an extension header past the end",
        "truncated",
        wrap(chained([60], UDP, bytes(8)))[:55] + b"\xff" + wrap(chained([60], UDP, bytes(8)))[56:],
    ),
    ("jumbogram", "truncated", wrap(JUMBO)),
    ("over the MTU", "mtu", wrap(frames.ipv4(A4, B4, UDP, bytes(1481)))),
    ("over the MTU by padding", "mtu", wrap(udp4()) + bytes(1500)),
    ("another network", "isolation", wrap(udp4(dst=str(THREE.addresses[0])))),
    ("another network by IPv6", "isolation", wrap(udp6(dst=str(THREE.addresses[1])))),
    ("another network with options", "isolation", wrap(udp4(dst=str(THREE.addresses[0]), options=b"\1" * 4))),
    ("another network with TTL one", "isolation", wrap(udp4(dst=str(THREE.addresses[0]), ttl=1))),
    ("another network in a later fragment", "isolation", wrap(udp4(dst=str(THREE.addresses[0]), frag=185))),
    (
        "another network by extension headers",
        "isolation",
        wrap(frames.ipv6(A6, str(THREE.addresses[1]), *frames.chain([0, 43], UDP, bytes(16)))),
    ),
    ("its own address", "loop", wrap(udp4(dst=A4))),
    ("its own IPv6 address", "loop", wrap(udp6(dst=A6))),
]

PASSED: list[tuple[str, str, bytes]] = [
    ("UDP", "fast", wrap(udp4())),
    ("UDP over IPv6", "fast", wrap(udp6())),
    ("the address of its sandbox's other port", "fast", wrap(udp4(src=str(LEG.addresses[0])))),
    ("a network that both sides named", "fast", wrap(udp4(dst=str(FOUR.addresses[0])))),
    ("TTL two", "fast", wrap(udp4(ttl=2))),
    ("don't fragment", "fast", wrap(udp4(frag=0x4000))),
    ("TTL one", "miss", wrap(udp4(ttl=1))),
    ("TTL zero", "miss", wrap(udp4(ttl=0))),
    ("hop limit one", "miss", wrap(udp6(ttl=1))),
    ("options", "miss", wrap(udp4(options=b"\x94\4\0\0"))),
    ("source route", "miss", wrap(udp4(options=b"\x83\7\4\x0a\2\0\2\0"))),
    ("a first fragment", "miss", wrap(udp4(frag=0x2000))),
    ("a later fragment", "miss", wrap(udp4(frag=185))),
    ("an atomic fragment", "miss", wrap(chained([44]))),
    ("every extension header", "miss", wrap(chained([0, 60, 43, 44, 51, 60]))),
    ("padding", "miss", wrap(udp4()) + bytes(10)),
    ("over the target's MTU", "miss", wrap(frames.ipv4(A4, B4, UDP, bytes(1381)))),
    ("the target's MTU", "fast", wrap(frames.ipv4(A4, B4, UDP, bytes(1380)))),
    ("a link-local source", "miss", wrap(udp6(src=LL))),
    ("a group", "miss", wrap(udp4(dst="224.0.0.251"), dst=b"\1\0\x5e\0\0\xfb")),
    ("the world", "miss", wrap(udp4(dst="192.0.2.1"))),
    (
        "a DHCP client",
        "miss",
        wrap(udp4(src="0.0.0.0", dst="255.255.255.255", sport=68, dport=67), dst=frames.BROADCAST),
    ),
    ("DAD", "miss", frames.nd(ONE, "::", GROUP, 135, A6, b"")),
    ("DAD for the link-local", "miss", frames.nd(ONE, "::", GROUP, 135, LL, b"")),
    (
        "MLD from ::",
        "miss",
        wrap(icmp6(143, bytes(4), src="::", dst="ff02::16", ttl=1), dst=b"\x33\x33\0\0\0\x16"),
    ),
    ("a router solicitation", "miss", frames.nd(ONE, LL, "ff02::2", 133, None, frames.option(1, ONE.mac))),
    ("NA for itself", "miss", frames.nd(ONE, A6, "ff02::1", 136, A6, frames.option(2, ONE.mac))),
    (
        "NA with four options",
        "miss",
        frames.nd(ONE, A6, "ff02::1", 136, A6, frames.option(5, ONE.mac) * 3 + frames.option(2, ONE.mac)),
    ),
    ("ARP for the gateway", "answer", frames.arp(ONE, A4, "169.254.1.1")),
    ("an ARP probe for the gateway", "answer", frames.arp(ONE, "0.0.0.0", "169.254.1.1")),
    ("NS for the gateway", "answer", frames.nd(ONE, A6, GROUP, 135, "fe80::1", frames.option(1, ONE.mac))),
    (
        "echo to the gateway",
        "answer",
        wrap(frames.ipv4(A4, "169.254.1.1", ICMP, icmp(A4, A4, 8, b"1234ping"))),
    ),
]


@pytest.mark.parametrize(("what", "reason", "frame"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused(rig: Rig, what: str, reason: str, frame: bytes) -> None:
    """The frame is dropped, and counted once as this reason, from this port, with its bytes; the model
    agrees that this is a reason."""
    outcome = rig.send(frame, rig.topology.ports[0])
    assert outcome.verdict == SHOT
    assert outcome.drops == {(ONE.port_id, "from_port", reason): (1, len(frame))}
    assert not any(any(row) for row in outcome.counted.values())
    assert reason in judge(TOPOLOGY, ONE, frame).reasons


@pytest.mark.parametrize(("what", "action", "frame"), PASSED, ids=[row[0] for row in PASSED])
def test_passed(rig: Rig, what: str, action: str, frame: bytes) -> None:
    """The frame passes: forwarded straight, answered, or left to the host's stack; and nothing is dropped."""
    outcome = rig.send(frame, rig.topology.ports[0])
    assert outcome.drops == {}
    assert outcome.verdict == (NEXT if action == "miss" else REDIRECT)
    assert judge(TOPOLOGY, ONE, frame).action == action
    sent = outcome.counted[ONE.port_id]
    assert (sent.from_total_packets, sent.from_total_octets) == (1, len(frame))
    assert sent.to_total_packets == (action == "answer")


def test_a_port_of_one_family_does_not_own_the_unspecified_address(rig: Rig) -> None:
    """A port without IPv6 has no IPv6 address: not ::, which its empty record could be read as."""
    port = rig.topology.ports[4]
    frame = wrap(udp6(src="::", dst=B6), src=port.mac)
    assert list(rig.send(frame, port).drops) == [(port.port_id, "from_port", "src_ip")]
    asks = frames.nd(port, str(port.link_local), GROUP, 135, "::", b"")
    assert rig.send(asks, port).verdict == NEXT
    source = str(port.link_local)
    echo = carrying(source, "::", icmp(source, "::", 128, b"1234"))
    assert rig.send(wrap(echo, src=port.mac), port).verdict == NEXT
    port = rig.topology.ports[5]
    frame = wrap(udp6(src="::", dst=B6), src=port.mac)
    assert list(rig.send(frame, port).drops) == [(port.port_id, "from_port", "src_ip")]


def test_a_device_without_a_port_passes_nothing(rig: Rig) -> None:
    """Both programs refuse on a device that no port is recorded for, and count it under port zero."""
    nobody = rig.topology.ports[0].__class__(
        port_id=0, ifindex=rig.spare, net=1, sandbox=1, mac=ONE.mac, addresses=()
    )
    for program, direction in (("pw_from_port", "from_port"), ("pw_to_port", "to_port")):
        outcome = rig.run(program, wrap(udp4()), nobody)
        assert outcome.verdict == SHOT
        assert list(outcome.drops) == [(0, direction, "no_port")]


def test_a_translated_flow_and_its_errors_stay_with_the_host(rig: Rig) -> None:
    """What the stack forwarded between ports after a miss may be translated: the replies, and ICMP
    errors, which quote packets, take the slow path from then on; other flows do not."""
    one, two = rig.topology.ports[:2]
    reply = wrap(udp4(src=B4, dst=A4, sport=53, dport=4000), src=two.mac)
    error = icmp(B4, A4, 3, bytes(32), 3)
    error = frames.ethernet(two.mac, two.gateway_mac, IP4, frames.ipv4(B4, A4, ICMP, error))
    assert rig.send(reply, two).verdict == REDIRECT
    assert rig.send(error, two).verdict == REDIRECT
    assert rig.run("pw_to_port", wrap(udp4()), two, ingress=one.ifindex).verdict == NEXT
    assert rig.send(reply, two).verdict == NEXT
    assert rig.send(error, two).verdict == NEXT
    assert rig.send(wrap(udp4(src=B4, dst=A4, sport=54, dport=4000), src=two.mac), two).verdict == REDIRECT
    flow = PwFlow(
        saddr=bytes(10) + b"\xff\xff" + ipaddress.ip_address(B4).packed,
        daddr=bytes(10) + b"\xff\xff" + ipaddress.ip_address(A4).packed,
        be_sport=(53).to_bytes(2, "big"),
        be_dport=(4000).to_bytes(2, "big"),
        proto=UDP,
    )
    assert rig.maps["pw_slow_flows"].delete(flow.pack())


def test_the_answer_to_arp_is_a_reply_from_the_gateway(rig: Rig) -> None:
    """RFC 826: operation 2, the addresses swapped, the gateway's MAC; odd paddings and unicast as well."""
    one = rig.topology.ports[0]
    for sender in (A4, "0.0.0.0"):
        for pad in (0, 18, 1000):
            for dst in (frames.BROADCAST, one.gateway_mac):
                frame = dst + frames.arp(ONE, sender, "169.254.1.1", pad=pad)[6:]
                outcome = rig.send(frame, one)
                assert outcome.verdict == REDIRECT
                assert outcome.frame == frames.ethernet(
                    one.gateway_mac,
                    one.mac,
                    ARP,
                    struct.pack("!HHBBH", 1, IP4, 6, 4, 2)
                    + one.gateway_mac
                    + ipaddress.ip_address("169.254.1.1").packed
                    + one.mac
                    + ipaddress.ip_address(sender).packed
                    + bytes(pad),
                )


@pytest.mark.parametrize("options", [b"", frames.option(1, ONE.mac), frames.option(5, ONE.mac) * 3])
@pytest.mark.parametrize("source", [A6, LL])
@pytest.mark.parametrize("dst", [GROUP, "fe80::1"])
@pytest.mark.parametrize("padding", [0, 40])
def test_the_answer_to_a_solicitation_is_an_advertisement(
    rig: Rig, options: bytes, source: str, dst: str, padding: int
) -> None:
    """RFC 4861, 4.4 and 7.2.4: solicited, override and router flags, the target's MAC, hop limit 255, a
    right checksum and no byte more; with or without options, to the group or to the gateway itself."""
    one = rig.topology.ports[0]
    frame = frames.nd(ONE, source, dst, 135, "fe80::1", options) + bytes(padding)
    outcome = rig.send(frame, one)
    gateway, asker = ipaddress.ip_address("fe80::1"), ipaddress.ip_address(source)
    body = b"\xe0\0\0\0" + gateway.packed + frames.option(2, one.gateway_mac)
    message = frames.icmp(gateway, asker, 136, body)
    assert outcome.verdict == REDIRECT
    counted = outcome.counted[one.port_id]
    assert counted.from_total_octets == len(frame)
    assert counted.to_total_octets == 86
    assert outcome.frame == frames.ethernet(
        one.gateway_mac, one.mac, IP6, frames.ipv6("fe80::1", source, ICMP6, message, ttl=255)
    )


def test_the_answer_to_an_echo_is_the_request_turned_round(rig: Rig) -> None:
    """RFC 792, RFC 4443: type, addresses and checksum change, nothing else; a wrong checksum stays wrong."""
    one = rig.topology.ports[0]
    for src, dst, ask, reply in (
        (A4, "169.254.1.1", 8, 0),
        (A6, "fe80::1", 128, 129),
        (LL, "fe80::1", 128, 129),
    ):
        for body in (b"\0\1\0\1", b"\0\1\0\1odd", b"\0\1\0\1" + bytes(range(200)) * 5):
            a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
            request = frames.icmp(a, b, ask, body)
            expected = frames.icmp(b, a, reply, body)
            outcome = rig.send(wrap(carrying(src, dst, request)) + bytes(3), one)
            assert outcome.verdict == REDIRECT
            kind = IP4 if a.version == 4 else IP6
            assert outcome.frame == frames.ethernet(
                one.gateway_mac, one.mac, kind, carrying(dst, src, expected)
            ) + bytes(3)
            wrong = request[:2] + bytes([request[2] ^ 0x55, request[3]]) + request[4:]
            back = rig.send(wrap(carrying(src, dst, wrong)), one).frame
            answer = back[14 + (20 if a.version == 4 else 40) :]
            assert answer != expected
            if a.version == 4:
                assert checksum(answer) != 0


def test_a_question_that_is_no_whole_one_is_a_miss(rig: Rig) -> None:
    """An echo request without its header, with options or in pieces is left to the host, unchanged."""
    one = rig.topology.ports[0]
    request = icmp(A4, A4, 8, b"1234ping")
    for packet in (
        frames.ipv4(A4, "169.254.1.1", ICMP, request[:7]),
        frames.ipv4(A4, "169.254.1.1", ICMP, request, options=b"\1" * 4),
        frames.ipv4(A4, "169.254.1.1", ICMP, request, frag=0x2000),
    ):
        outcome = rig.send(wrap(packet), one)
        assert (outcome.verdict, outcome.frame) == (NEXT, wrap(packet))
    code = bytearray(frames.nd(ONE, A6, GROUP, 135, "fe80::1", b""))
    code[55] = 1
    assert rig.send(bytes(code), one).verdict == NEXT


@pytest.mark.parametrize("slow", [False, True])
def test_super_packets_count_as_their_segments_and_obey_the_mtu(rig: Rig, slow: bool) -> None:
    """TSO and USO packets: gso_segs packets; the largest segment on the wire is what the MTU bounds."""
    one, two = rig.topology.ports[:2]
    rig.set_state(PwStateFlag.SF_SLOW_ONLY if slow else 0)
    a, b = map(ipaddress.ip_address, (A4, B4))
    big_tcp = wrap(frames.ipv4(A4, B4, TCP, frames.tcp(a, b, 1, 2, bytes(3000))))
    big_udp = wrap(frames.ipv4(A4, B4, UDP, frames.udp(a, b, 1, 2, bytes(3000))))
    # (frame, gso_size): what fits TWO's 1400; what fits only ONE's 1500; what fits neither
    for frame, size, verdict in (
        (big_tcp, 1360, NEXT if slow else REDIRECT),
        (big_tcp, 1361, NEXT),
        (big_tcp, 1461, SHOT),
        (big_udp, 1372, NEXT if slow else REDIRECT),
        (big_udp, 1373, NEXT),
        (big_udp, 1473, SHOT),
        (wrap(frames.ipv4(A4, B4, 47, bytes(3000))), 1000, NEXT),
    ):
        outcome = rig.send(frame, one, (size, 3))
        assert outcome.verdict == verdict, size
        if verdict == SHOT:
            assert outcome.drops == {(one.port_id, "from_port", "mtu"): (3, len(frame))}
        else:
            row = outcome.counted[one.port_id]
            assert (row.from_total_packets, row.from_total_octets) == (3, len(frame))
        if verdict == REDIRECT:
            assert outcome.counted[two.port_id].to_total_packets == 3


def test_a_limit_drops_what_is_over_it_for_the_port_that_has_it(rig: Rig) -> None:
    """A bucket lets a packet into debt and no more: what a port may send is refused as its own, what it
    may receive as the receiver's, after the sender has carried it; the verdict is a drop on each."""
    one, two = rig.topology.ports[:2]
    frame = wrap(udp4())
    try:
        rig.put(two, PwPortFlag.PF_LIMIT_TO)
        rig.limit(two, PwDir.TO_PORT, rate=1, burst=8)
        assert rig.send(frame, one).verdict == REDIRECT
        over = rig.send(frame, one)
        assert over.verdict == SHOT
        assert over.drops == {(two.port_id, "to_port", "limit"): (1, len(frame))}
        assert over.counted[one.port_id].from_total_packets == 1
        assert over.counted[two.port_id].to_total_packets == 0
        slow = rig.run("pw_to_port", frame, two)
        assert (slow.verdict, slow.drops) == (SHOT, over.drops)
        rig.put(one, PwPortFlag.PF_LIMIT_FROM)
        rig.limit(one, PwDir.FROM_PORT, rate=1, burst=8)
        assert rig.send(wrap(udp4(dst="192.0.2.1")), one).verdict == NEXT
        over = rig.send(frame, one)
        assert (over.verdict, list(over.drops)) == (SHOT, [(one.port_id, "from_port", "limit")])
        assert over.counted[one.port_id].from_total_packets == 0
    finally:
        rig.put(one)
        rig.put(two)


@pytest.mark.parametrize("slow", [False, True])
def test_a_disabled_port_receives_nothing_by_any_path(rig: Rig, slow: bool) -> None:
    """What is for a port whose link its owner disabled is dropped as its; the sender's part was carried."""
    one, two = rig.topology.ports[:2]
    rig.set_state(PwStateFlag.SF_SLOW_ONLY if slow else 0)
    try:
        rig.put(two, PwPortFlag.PF_DOWN)
        for frame in (wrap(udp4()), wrap(udp6()), wrap(udp4(options=b"\1" * 4)), wrap(udp4(ttl=1))):
            outcome = rig.send(frame, one)
            assert outcome.verdict == SHOT
            assert outcome.drops == {(two.port_id, "to_port", "link_down"): (1, len(frame))}
            assert outcome.counted[one.port_id].from_total_packets == 1
    finally:
        rig.put(two)


def test_every_reason_has_an_example() -> None:
    """Of what a sandbox can be refused for, nothing is left out: a row above, or a test of its own."""
    policys = {"policy", "not_ready", "flow_table", "fragment_order"}  # test_policy_*
    assert {reason for _, reason, _ in REFUSED} == reasons() - policys - {"no_port", "limit", "link_down"}
