"""Nets as a search tree: whoever walks it as the data path does finds the longest net around an address."""

from __future__ import annotations

import ipaddress
import struct

from hypothesis import example, given
from hypothesis import strategies as st

from portwright.dataplane import bounds
from portwright.dataplane.abi import SIZES, PwBounds, PwPolicyConst

TOP = 1 << 128


def look_up(nodes: list[bytes], place: int) -> tuple[int, int]:
    """The class of an address, and how many nodes were read: dataplane/policy.h, in Python."""
    number = class_id = depth = 0
    while number < len(nodes):
        node = PwBounds.unpack(nodes[number])
        halves = zip(struct.unpack("=8Q", node.high), struct.unpack("=8Q", node.low), strict=True)
        past = sum(high << 64 | low <= place for high, low in halves)
        class_id = struct.unpack("=16I", node.classes)[past]
        number = number * 9 + 1 + past
        depth += 1
    return class_id, depth


def longest(nets: dict[tuple[int, int], int], place: int) -> int:
    """The class of the longest net around an address, one by one."""
    around = [(length, c) for (first, length), c in nets.items() if first <= place < first + (TOP >> length)]
    return max(around, default=(0, 0))[1]


@st.composite
def some_nets(draw: st.DrawFn) -> dict[tuple[int, int], int]:
    """Nets that lie in each other and side by side, few bits apart."""
    found = {}
    for _ in range(draw(st.integers(0, 60))):
        length = draw(st.integers(0, 127))
        kind = st.integers(0, 255) if draw(st.booleans()) else st.integers(0, TOP - 1)
        number = draw(kind) << (120 if draw(st.booleans()) else 0)
        found[number % TOP >> (128 - length) << (128 - length), length] = draw(st.integers(0, 5))
    return found


@example({(0, 0): 1, (TOP - 2, 127): 2})
@example({(0, 1): 1, (TOP >> 1, 1): 1})
@given(some_nets())
def test_a_walk_finds_the_longest_net(nets: dict[tuple[int, int], int]) -> None:
    """At every edge of every net, inside and out."""
    nodes = bounds.tree(bounds.bounds((first, length, c) for (first, length), c in nets.items()))
    edges = {0, TOP - 1}
    for first, length in nets:
        end = first + (TOP >> length)
        edges |= {first, end - 1, (first - 1) % TOP, end % TOP}
    for place in edges:
        assert look_up(nodes, place)[0] == longest(nets, place), hex(place)


def test_bounds_change_the_class() -> None:
    """No bound says what holds already; nets of one class that touch are one."""
    nets = {"10.0.0.0/9": 1, "10.128.0.0/9": 1, "10.1.0.0/16": 1, "10.2.0.0/16": 2, "::/0": 0}
    v4 = 0xFFFF << 32
    found = bounds.bounds(bounds.net(cidr, class_id) for cidr, class_id in nets.items())
    assert found == [(v4 | 10 << 24, 1), (v4 | 0x0A020000, 2), (v4 | 0x0A030000, 1), (v4 | 11 << 24, 0)]


def test_ipv4_is_found_under_its_place_in_ipv6() -> None:
    """An IPv4 net says nothing of IPv6, and ::/0 nothing of IPv4 that has a root of its own."""
    nodes = bounds.nodes({"::/0": 7, "0.0.0.0/0": 3, "192.0.2.0/24": 4, "2001:db8::/32": 5})
    for text, class_id in {"192.0.2.9": 4, "192.0.3.0": 3, "2001:db8::1": 5, "2001:db9::": 7}.items():
        address = ipaddress.ip_address(text)
        place = int(address) + (0xFFFF << 32 if address.version == 4 else 0)
        assert look_up(nodes, place)[0] == class_id


def test_the_largest_table_keeps_to_the_depth() -> None:
    """As many nets as there may be, none touching: the data path goes down far enough."""
    count = int(PwPolicyConst.MAX_PEERS)
    nets = [((n << 96) | 1 << 64, 64, 1 + n % 3) for n in range(count)]
    nodes = bounds.tree(bounds.bounds(nets))
    assert all(len(node) == SIZES["PwBounds"] for node in nodes)
    walks = [look_up(nodes, first) for first, _, _ in nets[:: count // 99]]
    assert {depth for _, depth in walks} <= {PwPolicyConst.BOUNDS_DEPTH, PwPolicyConst.BOUNDS_DEPTH - 1}
    assert [c for c, _ in walks] == [1 + n % 3 for n in range(0, count, count // 99)]


def test_no_nets_are_one_node() -> None:
    """An array has one entry at least, by which everything is of no class."""
    (node,) = bounds.nodes({})
    assert look_up([node], 0)[0] == look_up([node], TOP - 1)[0] == 0
