"""Crafted packets and the rounds they are sent in: by value, nothing is sent."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portwright.live.packets import MARK, checksum, crc32c, payload
from portwright.live.probe import rounds
from portwright.policy.rules import ICMP, ICMP6, SCTP

MARKED = b"PW\0\0\0\0\0\7"


@pytest.mark.parametrize(
    ("data", "value"),
    [(bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E), (b"", 0)],
)
def test_crc32c_is_the_published_one(data: bytes, value: int) -> None:
    """The examples of RFC 3720, B.4."""
    assert crc32c(data) == value


def test_sctp_is_an_init_with_its_checksum() -> None:
    """A whole INIT chunk between the two ports, with the checksum of the packet."""
    packet = payload(SCTP, 40_000, 80, None, MARKED)
    source, target, tag, value = struct.unpack_from("!HHI", packet) + struct.unpack_from("<I", packet, 8)
    kind, _, length = struct.unpack_from("!BBH", packet, 12)

    assert (source, target, tag, kind) == (40_000, 80, 0, 1)
    assert length == len(packet) - 12
    assert value == crc32c(packet[:8] + bytes(4) + packet[12:])
    assert packet.endswith(MARKED)


def test_icmp_has_type_code_and_checksum() -> None:
    """ICMP's checksum is right, ICMPv6's is left to the kernel, and without a type it is an echo request."""
    packet = payload(ICMP, 0, 0, (3, 4), MARKED)

    assert packet[:2] == b"\x03\x04"
    assert checksum(packet) == 0
    assert payload(ICMP, 0, 0, None, MARKED)[:2] == b"\x08\0"
    assert payload(ICMP6, 0, 0, None, MARKED)[:4] == b"\x80\0\0\0"


@given(st.sampled_from((SCTP, ICMP, ICMP6, 47, 255)), st.binary(min_size=MARK, max_size=MARK))
def test_every_packet_ends_with_its_mark(protocol: int, mark: bytes) -> None:
    """Whoever hears it finds the mark in the last bytes."""
    assert payload(protocol, 1, 2, None, mark)[-MARK:] == mark


PORTS = st.sampled_from(("", "a", "b", "c", "d"))


@given(st.lists(st.tuples(PORTS, PORTS), max_size=60))
def test_a_round_has_each_port_once_as_sender_and_once_as_receiver(ends: list[tuple[str, str]]) -> None:
    """Every flow is in one round; no round has two flows of one sender or two for one receiver; and there are
    fewer rounds than twice the flows of the busiest port."""
    found = list(rounds(ends))

    assert sorted(index for members in found for index in members) == list(range(len(ends)))
    for members in found:
        for role in (0, 1):
            ports = [ends[index][role] for index in members if ends[index][role]]
            assert len(ports) == len(set(ports))
    busiest = max((sum(end[role] == port for end in ends) for role in (0, 1) for port in "abcd"), default=0)
    assert len(found) <= max(2 * busiest - 1, bool(ends))
