"""What is told of host endpoints' drops, by value: the packet's line, and how many were not shown."""

from __future__ import annotations

import pytest

from portwright.node.host_drops import Unseen
from portwright.observe.events import ip_summary
from tests.dataplane import frames

IP4, IP6 = 0x0800, 0x86DD
PORTS = bytes.fromhex("9c400050") + bytes(4)  # 40000 to 80


@pytest.mark.parametrize(
    ("ethertype", "packet", "expected"),
    [
        (
            IP4,
            frames.ipv4("192.0.2.1", "192.0.2.2", 6, PORTS),
            "ipv4 192.0.2.1.40000 > 192.0.2.2.80 tcp length 28",
        ),
        (
            IP6,
            frames.ipv6("2001:db8::1", "2001:db8::2", 17, PORTS),
            "ipv6 2001:db8::1.40000 > 2001:db8::2.80 udp length 48",
        ),
        (
            IP4,
            frames.ipv4("192.0.2.1", "192.0.2.2", 132, PORTS, options=bytes(4)),
            "ipv4 192.0.2.1.40000 > 192.0.2.2.80 sctp length 32",
        ),
        (
            IP4,
            frames.ipv4("192.0.2.1", "192.0.2.2", 17, PORTS, frag=3),
            "ipv4 192.0.2.1 > 192.0.2.2 udp length 28",
        ),
        (
            IP4,
            frames.ipv4("192.0.2.1", "192.0.2.2", 1, PORTS),
            "ipv4 192.0.2.1 > 192.0.2.2 icmp length 28",
        ),
        (
            IP6,
            frames.ipv6("2001:db8::1", "2001:db8::2", 47, PORTS),
            "ipv6 2001:db8::1 > 2001:db8::2 proto 47 length 48",
        ),
        (
            IP4,
            frames.ipv4("192.0.2.1", "192.0.2.2", 6, PORTS)[:22],
            "ipv4 192.0.2.1 > 192.0.2.2 tcp length 28",
        ),
        (IP4, b"\x45", "ipv4 length 1"),
        (IP6, bytes(39), "ipv6 length 39"),
        (0x88CC, bytes(5), "ethertype 0x88cc length 5"),
    ],
)
def test_a_packet_in_a_line(ethertype: int, packet: bytes, expected: str) -> None:
    """Addresses, and ports where the packet has them; as much as its bytes tell, and never an error."""
    assert ip_summary(ethertype, packet) == expected


def test_what_was_not_shown_is_what_was_counted_and_not_told() -> None:
    """Each packet once, from when somebody listens; what comes late is not counted a second time."""
    unseen = Unseen()
    unseen.begin({"a": 100})
    for _ in range(3):
        unseen.tell("a")
    assert unseen.lost({"a": 110}) == 7
    assert unseen.lost({"a": 110}) == 0
    unseen.tell("a")  # it was on its way
    assert unseen.lost({"a": 111}) == 0
    assert unseen.lost({"a": 113, "b": 2}) == 4


def test_counters_that_begin_anew_are_followed() -> None:
    """A table that somebody removed, and that is back."""
    unseen = Unseen()
    unseen.begin({"a": 100})
    assert unseen.lost({"a": 104}) == 4
    assert unseen.lost({"a": 2}) == 2


def test_the_counters_are_asked_once_a_second() -> None:
    """However many packets come."""
    unseen = Unseen()
    assert [unseen.is_due(now) for now in (10.0, 10.5, 10.9, 11.0, 11.1)] == [True, False, False, True, False]
