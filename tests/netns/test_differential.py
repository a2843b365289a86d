"""R7, the golden rule: a packet's fate does not depend on the path that carries it.

The same frames are sent from inside real sandboxes twice, with the redirect path on and with all of it
through the host's stack; what arrives at every wire, byte for byte, what is dropped and why, and
the totals of every port must be the same.
"""

from __future__ import annotations

import ipaddress
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.dataplane import frames
from tests.dataplane.model import ICMP, IP4, IP6, TCP, UDP, Address
from tests.fix_daemon import Daemon, Sandbox
from tests.fix_netns import TestNetns
from tests.netns.wires import PLAIN, Arrival, Seen, Wires, vnet, wired

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("each_attach")]

BATCH = 40
GSO_TCP4, GSO_TCP6, GSO_UDP = 1, 4, 5
Item = tuple[str, bytes, bytes]


@pytest.fixture
def wires(daemon: Daemon, world: TestNetns, netns_factory: Callable[[], TestNetns]) -> Iterator[Wires]:
    """Ports a and b (MTU 1400) of one network, c of another, d of a third that reaches the first."""
    boxes = {}
    with daemon.client() as client:
        for name, number, reach in (("n1", 77, ["n3"]), ("n2", 78, ["n1"]), ("n3", 79, ["n1"])):
            subnets = [f"10.{number}.0.0/24", f"fd00:{number}::/64"]
            client.network_create(name, subnets=subnets, masquerade=True, reach=reach)
        for name, network, mtu in (
            ("a", "n1", None),
            ("b", "n1", 1400),
            ("c", "n2", None),
            ("d", "n3", None),
        ):
            ns = netns_factory()
            boxes[name] = Sandbox(ns, client.port_create(network, ns.path, name=ns.name, mtu=mtu))
    one, three = boxes["a"].port.net_id, boxes["d"].port.net_id
    with wired(daemon, world, boxes, frozenset({(one, three), (three, one)})) as made:
        yield made


def both_paths(wires: Wires, batch: list[Item]) -> tuple[Seen, Seen]:
    """Send the batch on the fast path, then on the slow one."""
    seen = []
    for slow in (False, True):
        wires.forget_connections()
        wires.set_slow_only(slow)
        seen.append(wires.run(batch))
    return seen[0], seen[1]


def compare(wires: Wires, batch: list[Item]) -> tuple[Seen, Seen]:
    """Send the batch on both paths; assert the same outcome."""
    fast, slowly = both_paths(wires, batch)
    assert fast.accepted == slowly.accepted
    assert fast.drops == slowly.drops
    for name, arrived in slowly.arrived.items():
        difference = _difference(fast.arrived[name], arrived)
        assert not difference, "\n".join([f"at {name}:", *difference])
    assert fast.totals == slowly.totals
    return fast, slowly


def _difference(one: list[Arrival], two: list[Arrival]) -> list[str]:
    """What came by one path only, readable."""
    left, right = Counter(one), Counter(two)
    lines = [f"fast only: {n} x {a[0]} {a[1].hex()}" for a, n in (left - right).items()]
    return lines + [f"slow only: {n} x {a[0]} {a[1].hex()}" for a, n in (right - left).items()]


def blame(wires: Wires, batch: list[Item]) -> None:
    """Raise for the first frame of the batch that fares differently by itself, if one does."""
    for item in batch:
        try:
            compare(wires, [item])
        except AssertionError as error:
            name, header, frame = item
            raise AssertionError(f"{name} sends {header.hex()} {frame.hex()}: {error}") from None


def between(wires: Wires, version: int, source: str = "a", target: str = "b") -> tuple[str, str]:
    """The addresses of two ports in a family."""

    def pick(name: str) -> str:
        return next(str(x) for x in wires.ports[name].addresses if x.version == version)

    return pick(source), pick(target)


def framed(wires: Wires, source: str, packet: bytes) -> bytes:
    """To the gateway."""
    port = wires.ports[source]
    return frames.ethernet(port.mac, port.gateway_mac, IP4 if packet[0] >> 4 == 4 else IP6, packet)


@pytest.mark.slow
def test_generated_packets_fare_the_same_on_both_paths(wires: Wires) -> None:
    """Frames of every kind, honest and hostile, from four ports of three networks: the same drops, the same
    bytes at every wire and the same totals, whichever path is in force; and both paths are really taken."""
    by_id = {port.port_id: name for name, port in wires.ports.items()}
    tally = {"packets": 0, "dropped": 0, "fast": 0, "slow": 0, "delivered": 0}

    @settings(
        max_examples=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.generate],  # shrinking is our own: see blame()
    )
    @given(data=st.data())
    def generated(data: st.DataObject) -> None:
        many = st.lists(frames.sent(wires.topology), min_size=BATCH // 2, max_size=BATCH)
        items: list[frames.Sent] = data.draw(many)
        batch = [(by_id[s.port.port_id], PLAIN, s.frame) for s in items]
        try:
            fast, slow = compare(wires, batch)
        except AssertionError:
            blame(wires, batch)
            raise
        tally["packets"] += len(batch)
        tally["dropped"] += sum(packets for packets, _ in fast.drops.values())
        tally["slow"] += slow.slow
        tally["fast"] += slow.slow - fast.slow
        tally["delivered"] += sum(len(a) for a in fast.arrived.values())

    generated()
    print(tally)
    assert tally["packets"] >= 400
    assert tally["fast"] >= 25
    assert tally["dropped"] >= 50


@pytest.mark.parametrize("version", [4, 6])
def test_ordinary_traffic_fares_the_same(wires: Wires, version: int) -> None:
    """UDP and TCP of every size up to the MTU, in both directions, between two networks too, to the
    world and to the gateway: the fast path carries what is between ports, and nothing differs."""
    batch: list[Item] = []
    for source, target in (("a", "b"), ("b", "a"), ("a", "d"), ("d", "b"), ("a", "c"), ("c", "a")):
        src, dst = between(wires, version, source, target)
        a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
        for size in (0, 1, 100, 1300):
            for proto, payload in (
                (UDP, frames.udp(a, b, 1000, 2000, b"u" * size)),
                (TCP, frames.tcp(a, b, 1000, 2000, b"t" * size, flags=2)),
            ):
                packet = (
                    frames.ipv4(src, dst, proto, payload)
                    if version == 4
                    else frames.ipv6(src, dst, proto, payload)
                )
                batch.append((source, PLAIN, framed(wires, source, packet)))
    fast, slow = compare(wires, batch)
    assert (fast.slow, slow.slow) == (0, 32)
    assert {key[0:3]: n for key, (n, _) in fast.drops.items()} == {
        ("a", "from_port", "isolation"): 8,
        ("c", "from_port", "isolation"): 8,
    }
    assert [len(fast.arrived[name]) for name in "abcd"] == [8, 16, 0, 8]


@pytest.mark.parametrize("version", [4, 6])
def test_the_end_of_a_packets_life_is_the_same(wires: Wires, version: int) -> None:
    """TTL 1 and 0, and packets over the target's MTU with and without DF: the host answers with the same
    errors, or makes the same fragments."""
    src, dst = between(wires, version)
    a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
    batch: list[Item] = []
    for ttl, size, flags in (
        (1, 10, 0),
        (0, 10, 0),
        (2, 10, 0),
        (64, 1420, 0),
        (64, 1420, 0x4000),
        (64, 1372 if version == 4 else 1352, 0x4000),
    ):
        payload = frames.udp(a, b, 1000, 2000, bytes(size))
        packet = (
            frames.ipv4(src, dst, UDP, payload, ttl=ttl, frag=flags)
            if version == 4
            else frames.ipv6(src, dst, UDP, payload, ttl=ttl)
        )
        batch.append(("a", PLAIN, framed(wires, "a", packet)))
    fast, slow = compare(wires, batch)
    assert slow.slow > fast.slow
    errors = {(f[34], f[35]) if version == 4 else (f[54], f[55]) for _, f in fast.arrived["a"]}
    assert errors == ({(11, 0), (3, 4)} if version == 4 else {(3, 0), (2, 0)})


@pytest.mark.parametrize("version", [4, 6])
def test_fragments_fare_the_same(wires: Wires, version: int) -> None:
    """Datagrams in two to five pieces, in and out of order, twice, overlapping, or with one missing: what
    arrives is the same, and only what is whole."""
    generator = random.Random(4)
    src, dst = between(wires, version)
    a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)

    batch: list[Item] = []
    for number in range(30):
        whole = frames.udp(a, b, 1000, 2000 + number, generator.randbytes(400))
        cuts = [0, *sorted(generator.sample(range(16, 400, 8), generator.randint(1, 4))), len(whole)]
        pieces = list(itertools.pairwise(cuts))
        fate = number % 5
        if fate == 1:
            generator.shuffle(pieces)
        elif fate == 2:
            pieces.append(pieces[0])
        elif fate == 3:
            pieces[-1:] = [(pieces[-1][0] - 8, pieces[-1][1])]
        elif fate == 4:
            del pieces[generator.randrange(len(pieces))]
        for start, end in pieces:
            more = end < len(whole)
            if version == 4:
                frag = start // 8 | (0x2000 if more else 0)
                packet = frames.ipv4(src, dst, UDP, whole[start:end], frag=frag, ident=number)
            else:
                first, rest = frames.chain([44], UDP, whole[start:end], frag=start | more)
                rest = rest[:7] + bytes([number]) + rest[8:]
                packet = frames.ipv6(src, dst, first, rest)
            batch.append(("a", PLAIN, framed(wires, "a", packet)))
    fast, _ = compare(wires, batch) if version == 4 else compare6(wires, batch)
    assert len(fast.arrived["b"]) >= 12


@pytest.mark.parametrize("version", [4, 6])
def test_a_piece_left_over_does_not_touch_the_same_datagram_sent_again(wires: Wires, version: int) -> None:
    """The host keeps a piece that nothing completes, and drops what contradicts it. Sent again, a datagram
    arrives all the same: each attempt has identifications of its own."""
    src, dst = between(wires, version)
    a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
    whole = frames.udp(a, b, 1000, 2000, bytes(24))
    batch: list[Item] = []
    # Sent after the datagram, the last piece stays: it says that the datagram ends later.
    for start, data, more in ((0, whole[:16], 1), (16, whole[16:], 0), (32, whole[16:], 0)):
        if version == 4:
            packet = frames.ipv4(src, dst, UDP, data, frag=start // 8 | more << 13)
        else:
            packet = frames.ipv6(src, dst, *frames.chain([44], UDP, data, frag=start | more))
        batch.append(("a", PLAIN, framed(wires, "a", packet)))
    assert [len(wires.run(batch).arrived["b"]) for _ in range(3)] == [2, 2, 2]


def compare6(wires: Wires, batch: list[Item]) -> tuple[Seen, Seen]:
    """As compare. The host puts IPv6 datagrams together for conntrack and takes them apart again, under
    an identification of its own choice: that alone may differ."""
    fast, slow = seen = both_paths(wires, batch)
    plain = [
        sorted(f[:58] + bytes(4) + f[62:] if f[20] == 44 else f for _, f in s.arrived["b"]) for s in seen
    ]
    assert plain[0] == plain[1]
    assert (fast.drops, fast.totals) == (slow.drops, slow.totals)
    return fast, slow


@pytest.mark.parametrize(
    ("version", "proto", "gso_type", "target", "size"),
    [
        (4, TCP, GSO_TCP4, "d", 1448),
        (4, TCP, GSO_TCP4, "b", 1360),
        (4, TCP, GSO_TCP4, "b", 1448),
        (6, TCP, GSO_TCP6, "d", 1428),
        (6, TCP, GSO_TCP6, "b", 1428),
        (4, UDP, GSO_UDP, "d", 1400),
        (4, UDP, GSO_UDP, "b", 1400),
        (6, UDP, GSO_UDP, "d", 1400),
        (4, TCP, GSO_TCP4, "d", 1480),
    ],
)
def test_super_packets_fare_the_same(
    wires: Wires, version: int, proto: int, gso_type: int, target: str, size: int
) -> None:
    """TSO and USO packets with unfinished checksums: delivered as they are where their segments fit the
    target, answered with an error where not, refused where they do not fit the sender's own MTU;
    counted as segments."""
    src, dst = between(wires, version, "a", target)
    a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
    data = bytes(range(256)) * 40
    payload = (
        frames.tcp(a, b, 1000, 2000, data, flags=0x10) if proto == TCP else frames.udp(a, b, 1000, 2000, data)
    )
    # The checksum so far is of the pseudo-header alone (linux/skbuff.h, CHECKSUM_PARTIAL).
    at = 16 if proto == TCP else 6
    payload = payload[:at] + frames.pseudo(a, b, proto, len(payload)) + payload[at + 2 :]
    packet = (
        frames.ipv4(src, dst, proto, payload, frag=0x4000)
        if version == 4
        else frames.ipv6(src, dst, proto, payload)
    )
    start = 34 if version == 4 else 54
    head = start + (20 if proto == TCP else 8)
    frame = framed(wires, "a", packet)
    plain = vnet(0, 0, 0, start, at), framed(wires, "a", _small(packet, version, proto, a, b, at))
    fast, _ = compare(wires, [("a", vnet(gso_type, head, size, start, at), frame), ("a", *plain)])
    if not all(fast.accepted):
        pytest.skip("this kernel takes no such super-packet from AF_PACKET")
    limit = wires.ports[target].mtu
    segment = head - 14 + size
    if segment > wires.ports["a"].mtu:
        assert fast.drops == {("a", "from_port", "mtu"): (-(-len(data) // size), len(frame))}
    elif segment > limit:
        assert len(fast.arrived["a"]) == 1
    else:
        assert fast.totals[target][2] == -(-len(data) // size) + 1
        assert fast.slow == 0
        assert [kept[1] for kept, _ in fast.arrived[target]] == [0, gso_type]
    assert any(kept[0] for kept, _ in fast.arrived[target])


def _small(packet: bytes, version: int, proto: int, a: Address, b: Address, at: int) -> bytes:
    """The same with 100 bytes of data: no super-packet, but its checksum is unfinished as well."""
    head = 20 if version == 4 else 40
    payload = packet[head : head + (120 if proto == TCP else 108)]
    if proto == UDP:
        payload = payload[:4] + len(payload).to_bytes(2, "big") + payload[6:]
    payload = payload[:at] + frames.pseudo(a, b, proto, len(payload)) + payload[at + 2 :]
    return (
        frames.ipv4(str(a), str(b), proto, payload)
        if version == 4
        else frames.ipv6(str(a), str(b), proto, payload)
    )


def test_frames_too_short_for_a_header_are_counted_drops(wires: Wires) -> None:
    """Every length from 14 bytes to a whole packet, of both families and ARP: each is dropped and counted,
    or delivered, and the sum of both is what was sent."""
    batch: list[Item] = []
    for version in (4, 6):
        src, dst = between(wires, version)
        a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
        payload = frames.udp(a, b, 1000, 2000, b"")
        packet = frames.ipv4(src, dst, UDP, payload) if version == 4 else frames.ipv6(src, dst, UDP, payload)
        frame = framed(wires, "a", packet)
        batch += [("a", PLAIN, frame[:length]) for length in range(14, len(frame))]
    arp = frames.arp(wires.ports["a"], between(wires, 4)[0], "169.254.1.1", pad=0)
    batch += [("a", PLAIN, arp[:length]) for length in range(14, len(arp))]
    fast, _ = compare(wires, batch)
    sent = sum(fast.accepted)
    assert fast.drops[("a", "from_port", "truncated")][0] == sent
    assert fast.arrived["b"] == []


def test_tagged_frames_are_refused_as_a_real_device_sees_them(wires: Wires) -> None:
    """One tag is vlan and two are double_tag, whether the kernel has taken the outer one off already
    (802.1Q, 802.1ad) or not (0x9100)."""
    src, dst = between(wires, 4)
    a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
    packet = frames.ipv4(src, dst, UDP, frames.udp(a, b, 1, 2, bytes(30)))
    port = wires.ports["a"]
    one, two = [(t,) for t in (0x8100, 0x88A8, 0x9100)], [(t, 0x8100) for t in (0x8100, 0x88A8, 0x9100)]
    batch = [
        ("a", PLAIN, frames.ethernet(port.mac, port.gateway_mac, IP4, packet, tags)) for tags in (*one, *two)
    ]
    fast, _ = compare(wires, batch)
    assert {key[2]: n for key, (n, _) in fast.drops.items()} == {"vlan": 3, "double_tag": 3}


def test_isolation_can_not_be_walked_round(wires: Wires) -> None:
    """From a to c, whose network named a's but was not named by it: by options, fragments, TTL, link-local
    source, tunnel, routing header, broadcast MAC or its neighbour d: nothing ever arrives."""
    batch: list[Item] = []
    for version in (4, 6):
        for source in ("a", "d"):
            src, dst = between(wires, version, source, "c")
            a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
            payload = frames.udp(a, b, 1000, 2000, b"secret")
            if version == 4:
                _, via = between(wires, 4, "a", "b")
                route = bytes([0x83, 7, 4]) + b.packed + b"\0"
                packets = [
                    frames.ipv4(src, dst, UDP, payload, ttl=1),
                    frames.ipv4(src, dst, UDP, payload, options=b"\x94\4\0\0"),
                    frames.ipv4(src, dst, UDP, payload + bytes(2), frag=0x2000),
                    frames.ipv4(src, dst, UDP, payload, frag=2),
                    frames.ipv4(src, "192.0.2.2", UDP, payload, options=route),
                    frames.ipv4(src, via, UDP, payload, options=route),
                    frames.ipv4(src, "192.0.2.2", 4, frames.ipv4(src, dst, UDP, payload)),
                    frames.ipv4(
                        src,
                        dst,
                        ICMP,
                        frames.icmp(a, b, 3, bytes(4) + frames.ipv4(dst, src, UDP, payload), 3),
                    ),
                ]
            else:
                routing = bytes([UDP, 2, 0, 1, 0, 0, 0, 0]) + b.packed
                segment = bytes([UDP, 2, 4, 0, 0, 0, 0, 0]) + b.packed
                packets = [
                    frames.ipv6(src, dst, UDP, payload, ttl=1),
                    frames.ipv6(src, dst, *frames.chain([0, 60], UDP, payload)),
                    frames.ipv6(src, dst, *frames.chain([44], UDP, payload)),
                    frames.ipv6(src, dst, *frames.chain([44], UDP, payload + bytes(2), frag=1)),
                    frames.ipv6(src, dst, *frames.chain([44], UDP, payload, frag=16)),
                    frames.ipv6(src, "2001:db8::2", 43, routing + payload),
                    frames.ipv6(src, "2001:db8::2", 43, segment + payload),
                    frames.ipv6(str(wires.ports[source].link_local), dst, UDP, payload),
                    frames.ipv6(src, "2001:db8::2", 41, frames.ipv6(src, dst, UDP, payload)),
                ]
            batch += [(source, PLAIN, framed(wires, source, p)) for p in packets]
            port = wires.ports[source]
            broadcast = frames.ethernet(port.mac, frames.BROADCAST, IP4 if version == 4 else IP6, packets[0])
            batch.append((source, PLAIN, broadcast))
    fast, slow = compare(wires, batch)
    assert fast.arrived["c"] == slow.arrived["c"] == []
    assert fast.totals["c"] == (0, 0, 0, 0)


@pytest.mark.parametrize("version", [4, 6])
def test_what_a_router_would_not_forward_is_not_forwarded(wires: Wires, version: int) -> None:
    """A wrong header checksum, padding, a broadcast or multicast MAC, a link-local source, the sender's own
    address, an IPv4-mapped one: by redirect as by the stack, to the byte."""
    src, dst = between(wires, version)
    a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
    port = wires.ports["a"]
    payload = frames.udp(a, b, 1000, 2000, b"12345678")
    own = frames.udp(a, a, 1000, 2000, b"12345678")
    if version == 4:
        plain = frames.ipv4(src, dst, UDP, payload)
        packets = [
            frames.ipv4(src, dst, UDP, payload, bad_sum=True),
            frames.ipv4(src, dst, UDP, payload, bad_sum=True, options=b"\1" * 4),
            frames.ipv4(src, src, UDP, own),
        ]
    else:
        plain = frames.ipv6(src, dst, UDP, payload)
        four, other = between(wires, 4)
        packets = [
            frames.ipv6(str(port.link_local), dst, UDP, payload),
            frames.ipv6(src, src, UDP, own),
            frames.ipv6(f"::ffff:{four}", f"::ffff:{other}", UDP, payload),
            frames.ipv6(src, f"::ffff:{other}", UDP, payload),
        ]
    kind = IP4 if version == 4 else IP6
    batch = [("a", PLAIN, framed(wires, "a", p)) for p in packets]
    batch += [("a", PLAIN, framed(wires, "a", plain) + bytes(n)) for n in (1, 18, 200)]
    batch += [
        ("a", PLAIN, frames.ethernet(port.mac, group, kind, plain))
        for group in (frames.BROADCAST, b"\1\0\x5e\1\2\3", b"\x33\x33\0\0\0\1")
    ]
    fast, _ = compare(wires, batch)
    # The padded ones, without their padding.
    assert [len(frame) for _, frame in fast.arrived["b"]] == [14 + len(plain)] * 3


@pytest.mark.parametrize("version", [4, 6])
def test_only_what_the_host_may_translate_stays_slow(wires: Wires, version: int) -> None:
    """One packet with options goes through the stack, and the flow's other packets and its answers
    are redirected as before: nobody can make his flows, or fill the table, by odd packets."""
    src, dst = between(wires, version)
    a, b = ipaddress.ip_address(src), ipaddress.ip_address(dst)
    ask, answer = frames.udp(a, b, 1000, 2000, b"ask"), frames.udp(b, a, 2000, 1000, b"answer")
    if version == 4:
        odd = frames.ipv4(src, dst, UDP, ask, options=b"\1" * 4)
        back = frames.ipv4(dst, src, UDP, answer)
    else:
        odd = frames.ipv6(src, dst, *frames.chain([60], UDP, ask))
        back = frames.ipv6(dst, src, UDP, answer)
    wires.set_slow_only(False)
    seen = wires.run([("a", PLAIN, framed(wires, "a", odd)), ("b", PLAIN, framed(wires, "b", back))])
    assert [len(seen.arrived[name]) for name in "ab"] == [1, 1]
    assert seen.slow == 1
    assert list(wires.maps["pw_slow_flows"].keys()) == []
