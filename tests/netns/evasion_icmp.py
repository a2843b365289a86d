"""More of the list of evasion_rows.py: ICMP, addresses, layer 2, and what comes from outside."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator

from tests.dataplane import frames
from tests.dataplane.model import (
    DSTOPTS,
    FRAGMENT,
    HOP,
    ICMP,
    ICMP6,
    IP4,
    IP6,
    TCP,
    UDP,
)
from tests.netns.evasion import ACK, ECHO, PUBLISHED, SYN, SYN_ACK, Cast, Sent, quoted4
from tests.netns.evasion_rows import row

# -- ICMP --------------------------------------------------------------------------------------------------


@row("an echo reply unasked")
def _unasked(c: Cast) -> Iterator[Sent]:
    for to in ("vault", "web", "pinged"):
        yield c.send(to, c.icmp_proto, c.icmp(to, ECHO[c.version][1], b"\0\7\0\1"), "policy")


@row("what may answer an echo may send nothing else")
def _echoed(c: Cast) -> Iterator[Sent]:
    ask, answer = ECHO[c.version]
    asked = c.icmp("evil", ask, b"\0\7\0\1data", who="vault")
    yield c.send("evil", c.icmp_proto, asked, "arrives", who="vault")
    yield c.send("vault", c.icmp_proto, c.icmp("vault", answer, b"\0\7\0\1data"), "arrives")
    yield c.send("vault", c.icmp_proto, c.icmp("vault", ask, b"\0\7\0\2"), "policy")


@row("an echo reply of another identifier")
def _other_echo(c: Cast) -> Iterator[Sent]:
    ask, answer = ECHO[c.version]
    asked = c.icmp("evil", ask, b"\0\7\0\1data", who="vault")
    yield c.send("evil", c.icmp_proto, asked, "arrives", who="vault")
    yield c.send("vault", c.icmp_proto, c.icmp("vault", answer, b"\0\x08\0\1"), "policy")


@row("an error about nothing, while an echo is under way")
def _error_beside(c: Cast) -> Iterator[Sent]:
    asked = c.icmp("evil", ECHO[c.version][0], b"\0\7\0\1data", who="vault")
    yield c.send("evil", c.icmp_proto, asked, "arrives", who="vault")
    quote = c.packet("client", TCP, c.tcp("client", 5000, ACK, who="vault", sport=80), who="vault")
    yield c.quoting("vault", quote, "policy")


@row("another ICMP type after an allowed one")
def _other_type(c: Cast) -> Iterator[Sent]:
    # Timestamp and node information requests (RFC 792, RFC 4620).
    other = c.icmp("pinged", 13 if c.version == 4 else 139, bytes(16))
    yield c.send("pinged", c.icmp_proto, other, "policy")
    yield c.send("pinged", c.icmp_proto, c.icmp("pinged", ECHO[c.version][0], b"\0\7\0\1data"), "arrives")
    yield c.send("pinged", c.icmp_proto, other, "policy")


@row("an error about nothing")
def _error(c: Cast) -> Iterator[Sent]:
    quote = c.packet("evil", TCP, c.tcp("evil", 7000, ACK, who="vault"), who="vault")
    yield c.quoting("vault", quote, "policy")
    yield c.quoting("vault", b"", "policy")


@row("an error about somebody else's flow")
def _others_error(c: Cast) -> Iterator[Sent]:
    yield c.opens("vault", 80, "arrives", who="client", sport=5000)
    quote = c.packet("client", TCP, c.tcp("client", 5000, ACK, who="vault", sport=80), who="vault")
    yield c.quoting("vault", quote, "policy")


@row("an error about a denied flow")
def _denied_error(c: Cast) -> Iterator[Sent]:
    yield c.opens("vault", 80, "policy")
    quote = c.packet("evil", TCP, c.tcp("evil", 6000, SYN_ACK, who="vault", sport=80), who="vault")
    yield c.quoting("vault", quote, "policy")


def reply(c: Cast, sport: int = 80, dport: int = 6000) -> bytes:
    """A segment of web to evil, as it is on the wire."""
    return c.packet("evil", TCP, c.tcp("evil", dport, SYN_ACK, who="web", sport=sport), who="web")


@row("an error about a flow of its own, and about what is nearly one")
def _own_error(c: Cast) -> Iterator[Sent]:
    yield c.opens("web", 80, "arrives")
    yield c.quoting("web", reply(c), "arrives")
    yield c.quoting("web", reply(c, sport=81), "policy")
    yield c.quoting("web", reply(c, dport=6001), "policy")
    yield c.quoting("web", c.packet("web", TCP, c.tcp("web", 80, SYN)), "policy")
    yield c.quoting("web", reply(c)[:-18], "policy")


@row("an error that quotes options", 4)
def _quoted_options(c: Cast) -> Iterator[Sent]:
    yield c.opens("web", 80, "arrives")
    right, wrong = struct.pack("!HH", 80, 6000), struct.pack("!HH", 81, 6000)
    ends = c.at("web"), c.at("evil")
    yield c.quoting("web", quoted4(*ends, b"\1" * 4 + right + bytes(8), words=6), "arrives")
    yield c.quoting("web", quoted4(*ends, right + wrong + bytes(8), words=6), "policy")


@row("an error that quotes a header too short to be one", 4)
def _quoted_short(c: Cast) -> Iterator[Sent]:
    yield c.opens("web", 80, "arrives")
    ends = c.at("web"), c.at("evil")
    # Four bytes on, the identification and the fragment's place stand for ports.
    yield c.quoting("web", quoted4(*ends, bytes(16), words=1, ident=80, frag=6000), "policy")


@row("an error that quotes extension headers", 6)
def _quoted_headers(c: Cast) -> Iterator[Sent]:
    yield c.opens("web", 80, "arrives")
    for kinds in ([FRAGMENT], [DSTOPTS], [HOP, DSTOPTS]):
        for sport, fate in ((80, "arrives"), (81, "policy")):
            segment = c.tcp("evil", 6000, SYN_ACK, who="web", sport=sport)
            following, payload = frames.chain(kinds, TCP, segment)
            yield c.quoting("web", c.packet("evil", following, payload, who="web"), fate)


@row("a request dressed as an error", 4)
def _dressed(c: Cast) -> Iterator[Sent]:
    yield c.opens("web", 80, "arrives")
    # Timestamp, information and mask requests (RFC 792, RFC 950): the quote stands where errors have it.
    for kind in (13, 15, 17):
        yield c.quoting("web", reply(c), "policy", kind=kind)


@row("redirects")
def _redirect(c: Cast) -> Iterator[Sent]:
    yield c.opens("web", 80, "arrives")
    yield c.quoting("web", reply(c), "ra", kind=5 if c.version == 4 else 137)
    yield c.quoting("vault", reply(c), "ra", kind=5 if c.version == 4 else 137)


@row("ICMP of the other family")
def _other_family(c: Cast) -> Iterator[Sent]:
    proto = ICMP6 if c.version == 4 else ICMP
    for kind in (1, 3, 8, 128):
        yield c.send("vault", proto, bytes([kind, 0]) + bytes(6) + reply(c), "policy")


@row("neighbour discovery to a global address", 6)
def _discovery(c: Cast) -> Iterator[Sent]:
    target = ipaddress.ip_address(c.at("vault")).packed
    yield c.send("vault", ICMP6, c.icmp("vault", 135, bytes(4) + target), "policy", ttl=255)


# -- addresses and layer 2 -----------------------------------------------------------------------------------


@row("an IPv4-mapped address", 6)
def _mapped(c: Cast) -> Iterator[Sent]:
    vault, client = (f"::ffff:{c.at(name, 4)}" for name in ("vault", "client"))
    yield c.opens(vault, 80, "ip_version")
    packet = c.packet("vault", TCP, c.tcp("vault", 80, SYN, who=client), who=client)
    yield Sent("evil", "vault", c.framed("evil", packet), "ip_version")


@row("an IPv4 address in NAT64's, 6to4's and the compatible form", 6)
def _other_forms(c: Cast) -> Iterator[Sent]:
    vault = ipaddress.IPv4Address(c.at("vault", 4))
    six = ipaddress.IPv6Address(0x2002 << 112 | int(vault) << 80 | 1)
    for address in (f"64:ff9b::{vault}", str(six), f"::{vault}"):
        # No translator is here: the uplink is where they go, and the denied peer never has them.
        packet = c.packet(address, TCP, c.tcp(address, 80, SYN))
        yield Sent("evil", "", c.framed("evil", packet), "world")


@row("unspecified, loopback and group addresses")
def _nobodys(c: Cast) -> Iterator[Sent]:
    addresses = (
        ["0.0.0.0", "127.0.0.1", "127.255.0.1", "224.0.0.1", "239.255.255.250", "255.255.255.255"]
        if c.version == 4
        else ["::", "::1", "ff02::1", "ff02::2", "ff05::1:3", "ff0e::1"]
    )
    for address in addresses:
        packet = c.packet(address, UDP, c.udp(address, 80))
        # Linux knows no reason not to forward to :: (RFC 4291, 2.5.2, speaks of senders).
        yield Sent("evil", "", c.framed("evil", packet), "world" if address == "::" else "host")


@row("the subnet's broadcast and network addresses", 4)
def _broadcast(c: Cast) -> Iterator[Sent]:
    for address in ("10.77.0.255", "10.77.0.0"):
        packet = c.packet(address, UDP, c.udp(address, 80))
        # An address of nobody to the host, whose default route leads outside; no broadcast is forwarded.
        yield Sent("evil", "", c.framed("evil", packet), "world")
        yield Sent("evil", "", c.framed("evil", packet, to_mac=frames.BROADCAST), "host")


@row("the denied peer's link-local address", 6)
def _link_local(c: Cast) -> Iterator[Sent]:
    address = c.link_local("vault")
    packet = c.packet(address, TCP, c.tcp(address, 80, SYN))
    yield Sent("evil", "", c.framed("evil", packet), "host")


@row("a link-local source", 6)
def _from_link_local(c: Cast) -> Iterator[Sent]:
    address = c.link_local("evil")
    packet = c.packet("vault", TCP, c.tcp("vault", 80, SYN, who=address), who=address)
    yield Sent("evil", "vault", c.framed("evil", packet), "policy")


@row("around the gateway at layer 2")
def _layer2(c: Cast) -> Iterator[Sent]:
    packet = c.packet("vault", TCP, c.tcp("vault", 80, SYN))
    group = b"\1\0\x5e\0\0\1" if c.version == 4 else b"\x33\x33\0\0\0\1"
    for mac in (c.mac("vault"), frames.BROADCAST, group):
        yield Sent("evil", "vault", c.framed("evil", packet, to_mac=mac), "dst_mac")


@row("tags")
def _tags(c: Cast) -> Iterator[Sent]:
    packet = c.packet("vault", TCP, c.tcp("vault", 80, SYN))
    plain = c.framed("evil", packet)
    kind = IP4 if c.version == 4 else IP6
    for tags in ((0x8100,), (0x88A8,), (0x9100,), (0x88A8, 0x8100), (0x8100, 0x8100)):
        frame = frames.ethernet(plain[6:12], plain[:6], kind, packet, tags)
        yield Sent("evil", "vault", frame, "vlan" if len(tags) == 1 else "double_tag")


@row("time to live")
def _ttl(c: Cast) -> Iterator[Sent]:
    for ttl in (0, 1, 2, 255):
        yield c.send("vault", TCP, c.tcp("vault", 80, SYN), "policy", ttl=ttl)
    for ttl in (0, 1):
        yield c.send("web", TCP, c.tcp("web", 80, SYN), "host", ttl=ttl)
    yield c.send("web", TCP, c.tcp("web", 80, SYN), "arrives", ttl=2)


@row("somebody else's addresses")
def _spoofed(c: Cast) -> Iterator[Sent]:
    loopback = "127.0.0.1" if c.version == 4 else "::1"
    for source in ("client", "web", "world", loopback, "0.0.0.0" if c.version == 4 else "::"):
        packet = c.packet("vault", TCP, c.tcp("vault", 80, SYN, who=source), who=source)
        yield Sent("evil", "vault", c.framed("evil", packet), "src_ip")
    packet = c.packet("vault", TCP, c.tcp("vault", 80, SYN, who="client"), who="client")
    yield Sent("evil", "vault", c.framed("client", packet), "src_mac")


@row("a published port of the host's")
def _published(c: Cast) -> Iterator[Sent]:
    packet = c.packet("host", TCP, c.tcp("host", PUBLISHED, SYN))
    yield Sent("evil", "vault", c.framed("evil", packet), "policy")
    packet = c.packet("host", TCP, c.tcp("host", PUBLISHED + 1, SYN))
    yield Sent("evil", "", c.framed("evil", packet), "host")


# -- from outside --------------------------------------------------------------------------------------------


@row("a sandbox's address from outside")
def _from_outside(c: Cast) -> Iterator[Sent]:
    lie = c.packet("vault", TCP, c.tcp("vault", 80, SYN, who="client"), who="client")
    yield Sent("world", "vault", c.framed("world", lie), "src_ip", drop=("vault", "to_port"))


@row("a sandbox's address from outside, on an open flow")
def _injected(c: Cast) -> Iterator[Sent]:
    yield c.says("vault", 80, "arrives", who="client")
    yield c.says("client", 7000, "arrives", who="vault", sport=81)
    for sport, dport in ((6000, 80), (7000, 81)):
        lie = c.packet("vault", UDP, c.udp("vault", dport, who="client", sport=sport), who="client")
        yield Sent("world", "vault", c.framed("world", lie), "src_ip", drop=("vault", "to_port"))


@row("an error from outside about a flow that never was there")
def _inside(c: Cast) -> Iterator[Sent]:
    yield c.opens("vault", 80, "arrives", who="client", sport=5000)
    quote = c.packet("client", TCP, c.tcp("client", 5000, ACK, who="vault", sport=80), who="vault")
    yield c.quoting("vault", quote, "policy", who="world")


@row("an error from a router outside that quotes a piece of a datagram")
def _router(c: Cast) -> Iterator[Sent]:
    whole = c.udp("world", 7000, who="vault", data=bytes(1200))
    first = c.piece("world", UDP, whole[:800], 0, "held", who="vault")
    yield first
    yield c.piece("world", UDP, whole[800:], 800, "world", who="vault", more=False)
    kind = 3 if c.version == 4 else 2
    yield c.quoting("vault", first.frame[14:200], "arrives", who="world", kind=kind)
