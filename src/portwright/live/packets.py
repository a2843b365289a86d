"""The packets that have no socket of their own: SCTP's first chunk, ICMP, and what is neither. Pure.

Each carries a ``mark``, by which whoever hears it knows which one it was.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from portwright.policy.rules import ICMP, ICMP6, SCTP

#: Bytes of a mark.
MARK = 8
#: RFC 9260, 3.3.2: INIT, whose initiate tag is not zero; RFC 3309: the checksum is CRC32c.
_INIT = struct.Struct("!BBHIIHHI")
_ECHO = {ICMP: 8, ICMP6: 128}


def payload(protocol: int, source_port: int, port: int, kind: tuple[int, int] | None, mark: bytes) -> bytes:
    """What follows the IP header. ``kind``: ICMP's type and code, None for an echo request.

    ICMPv6's checksum is left to the kernel, which computes it for raw sockets (RFC 3542, 3.1).
    """
    if protocol == SCTP:
        return _sctp(source_port, port, mark)
    if protocol in _ECHO:
        icmp_type, code = kind or (_ECHO[protocol], 0)
        body = struct.pack("!BBHI", icmp_type, code, 0, 0) + mark
        return body if protocol == ICMP6 else body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    return bytes(4) + mark  # GRE without options (RFC 2784), and as good as any to others


def _sctp(source_port: int, port: int, mark: bytes) -> bytes:
    parameter = struct.pack("!HH", 0x8000 | 0x0F00, 4 + MARK) + mark  # unknown, to be skipped (3.2.1)
    chunk = _INIT.pack(1, 0, _INIT.size + len(parameter), 0x70770001, 65_536, 1, 1, 1) + parameter
    head = struct.pack("!HHI", source_port, port, 0)
    return head + struct.pack("<I", crc32c(head + bytes(4) + chunk)) + chunk


def checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _table() -> Sequence[int]:
    found = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        found.append(value)
    return found


_CRC = _table()


def crc32c(data: bytes) -> int:
    """RFC 9260, appendix A."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _CRC[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF
