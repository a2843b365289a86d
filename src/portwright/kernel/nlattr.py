"""Netlink attributes to bytes and back: plain functions, no class for each attribute.

Wire format: struct nlattr in include/uapi/linux/netlink.h; host-endian, 4-byte aligned.
Parsing never raises and never reads past the end, whatever the bytes are.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator

from portwright.model.errors import InvalidInput

_ATTR_LEN, _U32_LEN = 4, 4
_NLA_F_NESTED = 0x8000
_NLA_TYPE_MASK = 0x3FFF
_NLA_MAX_LEN = 0xFFFF

_ATTR = struct.Struct("=HH")  # struct nlattr: len, type
_ATTR_U8 = struct.Struct("=HHB3x")
_ATTR_U16 = struct.Struct("=HHH2x")
_ATTR_U32 = struct.Struct("=HHI")
_BE16 = struct.Struct(">H2x")
_BE32 = struct.Struct(">I")
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


def attr(kind: int, payload: bytes) -> bytes:
    """Pack one attribute with its padding; InvalidInput if it is longer than the format allows."""
    length = 4 + len(payload)
    if length > _NLA_MAX_LEN:
        raise InvalidInput(f"netlink attribute {kind}", length, "too long for a netlink attribute")
    return _ATTR.pack(length, kind) + payload + _PADDING[length & 3]


def attr_u8(kind: int, value: int) -> bytes:
    """Pack a u8 attribute."""
    return _ATTR_U8.pack(5, kind, value)


def attr_u16(kind: int, value: int) -> bytes:
    """Pack a host-endian u16 attribute."""
    return _ATTR_U16.pack(6, kind, value)


def attr_u32(kind: int, value: int) -> bytes:
    """Pack a host-endian u32 attribute."""
    return _ATTR_U32.pack(8, kind, value)


def attr_be16(kind: int, value: int) -> bytes:
    """Pack a big-endian u16 attribute (netfilter ports)."""
    return _ATTR.pack(6, kind) + _BE16.pack(value)


def attr_be32(kind: int, value: int) -> bytes:
    """Pack a big-endian u32 attribute."""
    return _ATTR.pack(8, kind) + _BE32.pack(value)


def attr_str(kind: int, value: str) -> bytes:
    """Pack a NUL-terminated string attribute; InvalidInput if it holds a NUL itself."""
    raw = value.encode("utf-8", "surrogateescape")
    if b"\0" in raw:
        raise InvalidInput(f"netlink attribute {kind}", value, "must not contain a NUL")
    return attr(kind, raw + b"\0")


def attr_nested(kind: int, *parts: bytes) -> bytes:
    """Pack attributes inside another, with the NESTED flag that strict parsers ask for."""
    return attr(kind | _NLA_F_NESTED, b"".join(parts))


# --- parsing ---------------------------------------------------------------------------------


def iter_attrs(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield (type without flag bits, payload) in order, duplicates included.

    Stops silently at the first attribute whose length does not fit.
    """
    end = len(data)
    while offset + 4 <= end:
        length, kind = _ATTR.unpack_from(data, offset)
        if length < _ATTR_LEN or offset + length > end:
            return
        yield kind & _NLA_TYPE_MASK, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def parse_attrs(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """Return the attributes by type; of duplicates the last, as the kernel's nla_parse does."""
    attrs: dict[int, bytes] = {}
    end = len(data)
    unpack = _ATTR.unpack_from
    while offset + 4 <= end:
        length, kind = unpack(data, offset)
        stop = offset + length
        if length < _ATTR_LEN or stop > end:
            break
        attrs[kind & _NLA_TYPE_MASK] = data[offset + 4 : stop]
        offset += (length + 3) & ~3
    return attrs


def get_u8(attrs: dict[int, bytes], kind: int, default: int = 0) -> int:
    """Return a u8 attribute, or the default if it is absent or empty."""
    raw = attrs.get(kind)
    return raw[0] if raw else default


def get_u32(attrs: dict[int, bytes], kind: int, default: int = 0) -> int:
    """Return a host-endian u32 attribute, or the default if it is absent or too short."""
    raw = attrs.get(kind)
    return int.from_bytes(raw[:4], sys.byteorder) if raw is not None and len(raw) >= _U32_LEN else default


def get_str(attrs: dict[int, bytes], kind: int, default: str = "") -> str:
    """Return a string attribute up to its NUL; bytes that are not UTF-8 survive as surrogates."""
    raw = attrs.get(kind)
    return default if raw is None else raw.partition(b"\0")[0].decode("utf-8", "surrogateescape")
