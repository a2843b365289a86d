"""The rewrite at a clone's port, by BPF_PROG_TEST_RUN: every kind of packet by example, and hostile ones."""

from __future__ import annotations

import ipaddress
import random
import socket
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from portwright.kernel import bpf
from portwright.node import clones
from portwright.plan.clone_operations import JoinClone
from tests.dataplane import frames
from tests.dataplane.model import ICMP, ICMP6, IP4, IP6, Address, checksum
from tests.dataplane.rig import REDIRECT, SHOT, topology
from tests.fix_bpf import ip, own_netns

pytestmark = pytest.mark.netns

#: Frames are made as of this port; what its addresses are plays no part.
PORT = topology(list(range(1, 9))).ports[0]
INNER = {4: "198.51.100.2", 6: "2001:db8:5::2"}
OWN = {4: "10.77.3.4", 6: "fd00:77:1:2:3:4:5:6"}
PEER = {4: "10.77.0.9", 6: "fd00:77::9"}
HOSTS = {4: "192.0.2.1", 6: "2001:db8::1"}
_IFINDEX, _SKB = 40, 192  # struct __sk_buff (linux/bpf.h)
_UDPLITE, _SCTP = 136, 132
_RANDOM, _ROUNDS = 28791, 4000


class Clone(NamedTuple):
    """The program, and what its frames come in on."""

    program: bpf.Program
    tap: int
    device: int
    other: int

    def run(self, frame: bytes, ifindex: int) -> tuple[int, bytes]:
        """The verdict, and the frame as it was left."""
        context = bytearray(_SKB)
        struct.pack_into("=I", context, _IFINDEX, ifindex)
        done = self.program.test_run(frame, ctx=bytes(context))
        return done.retval, done.data

    def out(self, frame: bytes) -> bytes:
        """What the guest sends, as it goes on."""
        verdict, left = self.run(frame, self.tap)
        assert verdict == REDIRECT
        return left

    def into(self, frame: bytes) -> bytes:
        """What is for the guest, as it arrives."""
        verdict, left = self.run(frame, self.device)
        assert verdict == REDIRECT
        return left


@pytest.fixture(scope="module")
def clone() -> Iterator[Clone]:
    """A clone of the number 0, which is what the class id of a test run is."""
    with own_netns(), bpf.Collection.load(bpf.CollectionSpec.load(clones.OBJECT)) as collection:
        ip("link", "add", "tap0", "type", "veth", "peer", "name", "eth0")
        ip("link", "add", "other0", "type", "veth", "peer", "name", "other1")
        tap, device, other = (socket.if_nametoindex(name) for name in ("tap0", "eth0", "other0"))
        operation = JoinClone(
            port_id="1".zfill(16),
            index=0,
            device="eth0",
            tap="tap0",
            inner=tuple(INNER.values()),
            addresses=tuple(OWN.values()),
        )
        collection.maps[clones.MAP].update(clones.key(0), clones.value(operation, tap=tap, device=device))
        yield Clone(collection.programs[clones.PROGRAM], tap, device, other)


Build = Callable[[str, str], bytes]
"""An IP packet from one address to another."""


def _packet(version: int, proto: int, payload: bytes, **more: int) -> Build:
    def build(src: str, dst: str) -> bytes:
        maker = frames.ipv4 if version == 4 else frames.ipv6
        return maker(src, dst, proto, payload, **more)  # type: ignore[arg-type]

    return build


def _summed(version: int, layer4: Callable[[Address, Address], bytes], proto: int) -> Build:
    def build(src: str, dst: str) -> bytes:
        payload = layer4(ipaddress.ip_address(src), ipaddress.ip_address(dst))
        return _packet(version, proto, payload)(src, dst)

    return build


def _first_fragment(version: int) -> Build:
    """Of a datagram of 2,000 bytes: its checksum covers what is in the other one."""

    def build(src: str, dst: str) -> bytes:
        a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
        head = frames.udp(a, b, 4000, 53, bytes(2000))[:1000]
        if version == 4:
            return frames.ipv4(src, dst, 17, head, frag=0x2000)
        first, rest = frames.chain([44], 17, head, frag=1)
        return frames.ipv6(src, dst, first, rest)

    return build


def _later_fragment(version: int) -> Build:
    data = bytes(range(200))
    if version == 4:
        return _packet(4, 17, data, frag=125)
    first, rest = frames.chain([44], 17, data, frag=125 << 3)
    return _packet(6, first, rest)


def _behind_headers(src: str, dst: str) -> bytes:
    payload = frames.tcp(ipaddress.ip_address(src), ipaddress.ip_address(dst), 4000, 80, b"x" * 31)
    first, rest = frames.chain([0, 60], 6, payload, length=1)
    return frames.ipv6(src, dst, first, rest)


def _plain() -> Iterator[tuple[str, int, Build]]:
    for v in (4, 6):
        yield "tcp", v, _summed(v, lambda a, b: frames.tcp(a, b, 4000, 80, b"x" * 33), 6)
        yield "udp", v, _summed(v, lambda a, b: frames.udp(a, b, 4000, 53, b"y" * 32), 17)
        yield "udp without a checksum", v, _packet(v, 17, struct.pack("!HHHH", 4000, 53, 12, 0) + b"data")
        yield "echo", v, _summed(v, _echo(v), ICMP if v == 4 else ICMP6)
        yield "sctp", v, _packet(v, _SCTP, struct.pack("!HHII", 4000, 80, 0, 0xCAFE) + bytes(16))
        yield "a protocol that we don't know", v, _packet(v, 253, b"z" * 40)
        yield "nothing", v, _packet(v, 59, b"")
        yield "first fragment", v, _first_fragment(v)
        yield "later fragment", v, _later_fragment(v)
    yield "options", 4, _packet(4, 253, b"z" * 40, options=b"\x94\x04\0\0")  # type: ignore[arg-type]
    yield "extension headers", 6, _behind_headers


def _echo(version: int) -> Callable[[Address, Address], bytes]:
    return lambda a, b: frames.icmp(a, b, 8 if version == 4 else 128, struct.pack("!HH", 7, 1) + b"ping")


PLAIN = list(_plain())


def ether(packet: bytes, pad: int = 0) -> bytes:
    """In Ethernet, of the family that the packet says."""
    kind = IP4 if packet[0] >> 4 == 4 else IP6
    return frames.ethernet(PORT.mac, PORT.gateway_mac, kind, packet) + bytes(pad)


@pytest.mark.parametrize(("what", "v", "build"), PLAIN, ids=[f"{w}-{v}" for w, v, _ in PLAIN])
@pytest.mark.parametrize("pad", [0, 7])
def test_a_packet_is_as_if_the_other_address_had_sent_it(
    clone: Clone, what: str, v: int, build: Build, pad: int
) -> None:
    """Both ways, to the byte, checksums too; what is from and for others, or against the way, stays."""
    del what
    assert clone.out(ether(build(INNER[v], PEER[v]), pad)) == ether(build(OWN[v], PEER[v]), pad)
    assert clone.into(ether(build(PEER[v], OWN[v]), pad)) == ether(build(PEER[v], INNER[v]), pad)
    for src, dst in ((PEER[v], HOSTS[v]), (OWN[v], PEER[v]), (PEER[v], INNER[v])):
        assert clone.out(ether(build(src, dst), pad)) == ether(build(src, dst), pad)
    for src, dst in ((PEER[v], HOSTS[v]), (INNER[v], PEER[v]), (OWN[v], PEER[v]), (PEER[v], INNER[v])):
        assert clone.into(ether(build(src, dst), pad)) == ether(build(src, dst), pad)


def _quoting(v: int, src: str, dst: str, quoted: bytes) -> bytes:
    a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
    kind, code = (3, 3) if v == 4 else (1, 4)
    return _packet(v, ICMP if v == 4 else ICMP6, frames.icmp(a, b, kind, bytes(4) + quoted, code))(src, dst)


@pytest.mark.parametrize("v", [4, 6])
def test_an_error_quotes_what_its_receiver_sent(clone: Clone, v: int) -> None:
    """Whole or cut: the address in the quoted header, its checksum and the error's own; of a router's error
    as much as of the other end's; and nothing where the quote is cut before the address, or is none."""

    def quoted(src: str, dst: str, mine: str) -> bytes:
        """What ``mine`` sent or got; layer 4 stays as it was in the packet that the guest saw."""
        a, b = (ipaddress.ip_address(INNER[v] if one == mine else one) for one in (src, dst))
        body = frames.tcp(a, b, 4000, 80, b"quoted")
        return _packet(v, 6, body)(src, dst)

    head = 20 if v == 4 else 40
    for cut in (None, head + 8, head):
        for sender in (PEER[v], HOSTS[v]):
            before = quoted(OWN[v], PEER[v], OWN[v])[:cut]
            after = quoted(INNER[v], PEER[v], INNER[v])[:cut]
            assert clone.into(ether(_quoting(v, sender, OWN[v], before))) == ether(
                _quoting(v, sender, INNER[v], after)
            )
        before = quoted(PEER[v], INNER[v], INNER[v])[:cut]
        after = quoted(PEER[v], OWN[v], OWN[v])[:cut]
        assert clone.out(ether(_quoting(v, INNER[v], PEER[v], before))) == ether(
            _quoting(v, OWN[v], PEER[v], after)
        )
    whole = quoted(OWN[v], PEER[v], OWN[v])
    for odd in (whole[: 12 if v == 4 else 20], bytes([whole[0] ^ 0xF0]) + whole[1:], b""):
        assert clone.into(ether(_quoting(v, PEER[v], OWN[v], odd))) == ether(
            _quoting(v, PEER[v], INNER[v], odd)
        )


@pytest.mark.parametrize("v", [4, 6])
def test_only_errors_quote(clone: Clone, v: int) -> None:
    """What looks like a quote in an echo, or in an ICMP of the other family, is data."""
    quoted = PLAIN[0 if v == 4 else 9][2](OWN[v], PEER[v])
    a, b, mine = (ipaddress.ip_address(x) for x in (PEER[v], OWN[v], INNER[v]))
    kind = 8 if v == 4 else 128
    for dst, seen in ((b, mine), (a, a)):
        packet = _packet(v, ICMP if v == 4 else ICMP6, frames.icmp(a, dst, kind, bytes(4) + quoted))
        assert clone.into(ether(packet(PEER[v], str(dst)))) == ether(
            _packet(v, ICMP if v == 4 else ICMP6, frames.icmp(a, seen, kind, bytes(4) + quoted))(
                PEER[v], str(seen)
            )
        )
    for kind in (1, 3):
        odd = _packet(v, ICMP6 if v == 4 else ICMP, bytes([kind, 0, 1, 2, 0, 0, 0, 0]) + quoted)
        assert clone.into(ether(odd(PEER[v], OWN[v]))) == ether(odd(PEER[v], INNER[v]))


@pytest.mark.parametrize("v", [4, 6])
def test_padding_is_no_packet(clone: Clone, v: int) -> None:
    """What stands behind a packet's end is left, though a checksum or an address would be there."""
    cut = _packet(v, 6, struct.pack("!HHI", 4000, 80, 1))
    assert clone.out(ether(cut(INNER[v], PEER[v]), 40)) == ether(cut(OWN[v], PEER[v]), 40)
    mine = ipaddress.ip_address(INNER[v]).packed
    quoted = PLAIN[0 if v == 4 else 9][2](PEER[v], INNER[v])
    size = 16 if v == 4 else 24
    for behind in (quoted[size:], mine * 4):
        short = ether(_quoting(v, INNER[v], PEER[v], quoted[:size])) + behind
        assert clone.out(short) == ether(_quoting(v, OWN[v], PEER[v], quoted[:size])) + behind


def test_a_guest_of_one_family() -> None:
    """Of the other one nothing is rewritten, what has no address least of all."""
    with own_netns(), bpf.Collection.load(bpf.CollectionSpec.load(clones.OBJECT)) as collection:
        ip("link", "add", "tap0", "type", "veth", "peer", "name", "eth0")
        tap, device = (socket.if_nametoindex(name) for name in ("tap0", "eth0"))
        for v in (4, 6):
            operation = JoinClone(
                port_id="1".zfill(16),
                index=0,
                device="eth0",
                tap="tap0",
                inner=(INNER[v],),
                addresses=(OWN[v],),
            )
            value = clones.value(operation, tap=tap, device=device)
            collection.maps[clones.MAP].update(clones.key(0), value)
            one = Clone(collection.programs[clones.PROGRAM], tap, device, 0)
            other = 10 - v
            none = "0.0.0.0" if other == 4 else "::"
            for _, family, build in PLAIN:
                for src, dst in ((none, PEER), (INNER, none), (PEER, none), (none, OWN)):
                    a, b = (x if isinstance(x, str) else x[other] for x in (src, dst))
                    if family == other:
                        frame = ether(build(a, b))
                        assert (one.out(frame), one.into(frame)) == (frame, frame)
            sent = PLAIN[0 if v == 4 else 9][2]
            assert one.out(ether(sent(INNER[v], PEER[v]))) == ether(sent(OWN[v], PEER[v]))


def test_neighbour_discovery_speaks_of_the_other_address(clone: Clone) -> None:
    """Solicitations and advertisements, duplicate address detection, and the group in which the guest is
    asked for: that of the inner address, by its MAC too. What is about others stays."""
    inner, own, peer = INNER[6], OWN[6], "fe80::1"
    groups = {a: f"ff02::1:ff{ipaddress.ip_address(a).exploded[-7:]}" for a in (inner, own)}
    mac = frames.option(1, PORT.mac)
    asks = frames.nd(PORT, inner, peer, 135, peer, mac)
    assert clone.out(asks) == frames.nd(PORT, own, peer, 135, peer, mac)
    tells = frames.nd(PORT, inner, peer, 136, inner, b"")
    assert clone.out(tells) == frames.nd(PORT, own, peer, 136, own, b"")
    probes = frames.nd(PORT, "::", groups[inner], 135, inner, b"")
    assert clone.out(probes) == frames.nd(PORT, "::", groups[inner], 135, own, b"")
    asked = frames.nd(PORT, peer, own, 135, own, mac)
    assert clone.into(asked) == frames.nd(PORT, peer, inner, 135, inner, mac)
    asked = frames.nd(PORT, peer, groups[own], 135, own, mac)
    assert clone.into(asked) == frames.nd(PORT, peer, groups[inner], 135, inner, mac)
    told = frames.nd(PORT, peer, own, 136, peer, mac)
    assert clone.into(told) == frames.nd(PORT, peer, inner, 136, peer, mac)
    for other in (
        frames.nd(PORT, peer, "ff02::1", 134, None, mac),
        frames.nd(PORT, peer, peer, 136, peer, b""),
    ):
        assert clone.into(other) == other


def test_arp_speaks_of_the_other_address(clone: Clone) -> None:
    """Requests, replies, probes and announcements; not what only looks like ARP of IPv4 over Ethernet."""
    inner, own, peer = INNER[4], OWN[4], "169.254.1.1"
    for sender, target in ((inner, peer), (inner, inner), ("0.0.0.0", inner)):
        as_seen = [own if a == inner else a for a in (sender, target)]
        for op in (1, 2):
            assert clone.out(frames.arp(PORT, sender, target, op=op)) == frames.arp(PORT, *as_seen, op=op)
    assert clone.into(frames.arp(PORT, peer, own)) == frames.arp(PORT, peer, inner)
    stays = frames.arp(PORT, own, peer)
    assert clone.into(stays) == stays
    for at in range(14, 20):  # what the addresses are of
        odd = bytearray(frames.arp(PORT, inner, peer))
        odd[at] ^= 0x10
        assert clone.out(bytes(odd)) == bytes(odd)


def test_without_an_entry_nothing_passes(clone: Clone) -> None:
    """What comes in on neither of the two devices is dropped, though its filter says so."""
    frame = ether(PLAIN[0][2](INNER[4], PEER[4]))
    assert clone.run(frame, clone.other)[0] == SHOT


def test_hostile_packets_are_rewritten_right_or_not_at_all(clone: Clone) -> None:
    """Cut at each byte, and with any bytes wrong: what changes is an address that was the guest's, where one
    belongs, and at most three checksums, which follow, as the sum over the packet says too."""
    changed = 0
    dice = random.Random(_RANDOM)  # the same rounds in each run
    for frame in _honest():
        for cut in range(max(15, 14 + 20), len(frame)):
            changed += _judge(clone, frame[:cut])
        for _ in range(_ROUNDS // 40):
            wrong = bytearray(frame)
            for _ in range(dice.choice((1, 1, 2, 4))):
                wrong[dice.randrange(14, len(wrong))] = dice.randrange(256)
            changed += _judge(clone, bytes(wrong))
    assert changed > _ROUNDS // 4  # not only untouched ones were seen


def _honest() -> Iterator[bytes]:
    for _, v, build in PLAIN:
        yield ether(build(INNER[v], PEER[v]), 5)
        yield ether(build(PEER[v], OWN[v]), 5)
    for v in (4, 6):
        sent = PLAIN[0 if v == 4 else 9][2](OWN[v], PEER[v])
        yield ether(_quoting(v, HOSTS[v], OWN[v], sent))
        got = PLAIN[0 if v == 4 else 9][2](PEER[v], INNER[v])
        yield ether(_quoting(v, INNER[v], PEER[v], got))
    yield frames.nd(PORT, INNER[6], "fe80::1", 136, INNER[6], frames.option(2, PORT.mac))
    yield frames.arp(PORT, INNER[4], "169.254.1.1")


def _judge(clone: Clone, frame: bytes) -> bool:
    """Both ways; whether anything changed."""
    if not frames.runnable(frame):
        return False
    hits = 0
    for way, swap in ((clone.out, (INNER, OWN)), (clone.into, (OWN, INNER))):
        left = way(frame)
        assert len(left) == len(frame)
        if left != frame:
            _explained(frame, left, *swap)
            hits += 1
    return hits > 0


def _explained(frame: bytes, left: bytes, before: dict[int, str], after: dict[int, str]) -> None:
    v = 6 if frame[12:14] == b"\x86\xdd" else 4
    old, new = (ipaddress.ip_address(a[v]).packed for a in (before, after))
    places = [i for i in range(14, len(frame)) if frame[i:].startswith(old) and left[i:].startswith(new)]
    assert 1 <= len(places) <= 2
    differ = {i for i in range(len(frame)) if frame[i] != left[i]}
    for place in places:
        differ -= set(range(place, place + len(old)))
    assert len({i // 2 for i in differ}) <= 3, (frame.hex(), left.hex())
    if frame[12:14] == b"\x08\x06":
        assert not differ
        return
    head = {4: (26, 30), 6: (22, 38)}[v]
    assert min(places) in head or frame[{4: 23, 6: 20}[v]] in (ICMP, ICMP6, 0, 43, 44, 51, 60)
    # One's complement: an address that changes changes the sum, unless a checksum follows it.
    one, two = (checksum(d[14:]) for d in (frame, left))
    moved = (checksum(old) - checksum(new)) % 0xFFFF
    assert (one - two) % 0xFFFF in {0, moved, -moved % 0xFFFF, -moved * 2 % 0xFFFF, moved * 2 % 0xFFFF}
