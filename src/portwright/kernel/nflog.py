"""Packets that nftables' ``log group`` hands out, with the rule's prefix (NFLOG).

Of a group there is one listener in a namespace; while there is none the kernel throws its packets away. The
listener's place is its socket's: it ends with the process, however that ends.

Messages: include/uapi/linux/netfilter/nfnetlink_log.h.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Final, NamedTuple

from portwright.kernel.monitor import _Subscription
from portwright.kernel.netlink import NETLINK_NETFILTER, Message, NetlinkSocket, Request
from portwright.kernel.nlattr import attr, attr_be32, attr_u8, get_str, parse_attrs

_SUBSYS: Final = 4 << 8  # NFNL_SUBSYS_ULOG
_PACKET, _CONFIG = _SUBSYS | 0, _SUBSYS | 1
_NFGENMSG = struct.Struct(">BBH")  # family, version, the group
_CFG_CMD, _CFG_MODE, _CFG_QTHRESH = 1, 2, 5
_CMD_BIND, _COPY_PACKET = 1, 2
_MODE = struct.Struct(">IBx")  # bytes of each packet, what to copy
_HDR, _INDEV, _OUTDEV, _PAYLOAD, _PREFIX = 1, 4, 5, 9, 10
_U32 = struct.Struct(">I")


class Logged(NamedTuple):
    """A packet: from its IP header on, as much of it as the rule says.

    ``indev`` and ``outdev`` are interfaces' numbers, 0 for none.
    """

    prefix: str
    protocol: int
    indev: int
    outdev: int
    payload: bytes


class PacketLog(_Subscription):
    """The listener of a group, from the moment it is made.

    For an event loop: wait until fileno() is readable, then read().
    """

    _words = "nflog"

    def __init__(self, group: int, netns_fd: int | None = None) -> None:
        """Listen in the namespace of ``netns_fd`` (not taken over), or the thread's own.

        Raises RequestFailed where somebody else does: EPERM (nfulnl_recv_config, nfnetlink_log.c).
        """
        head = _NFGENMSG.pack(0, 0, group)
        words = f"nflog group {group}"
        with NetlinkSocket(NETLINK_NETFILTER, netns_fd) as sock:
            sock.execute([Request(_CONFIG, 0, head + attr_u8(_CFG_CMD, _CMD_BIND), words)])
            settings = (
                attr(_CFG_MODE, _MODE.pack(0xFFFF, _COPY_PACKET)),
                attr_be32(_CFG_QTHRESH, 1),  # each at once: the rules see to it that they are few
            )
            sock.execute([Request(_CONFIG, 0, head + b"".join(settings), words)])
            # The same open file, and so the same listener.
            self._sock = socket.socket(fileno=os.dup(sock.fileno()))
        self._sock.setblocking(False)
        self._buffer = bytearray(64 * 1024)

    def read(self) -> list[Logged]:
        """What has come since, in order, without waiting; may be empty.

        After READ_MAX datagrams the rest stays for the next call (the descriptor stays readable). What the
        socket had no room for is lost.
        """
        return [
            _parsed(message)
            for messages in self._datagrams()
            for message in messages or ()
            if message.type == _PACKET
        ]


def _parsed(message: Message) -> Logged:
    attrs = parse_attrs(message.body, _NFGENMSG.size)
    return Logged(
        prefix=get_str(attrs, _PREFIX),
        protocol=int.from_bytes(attrs.get(_HDR, b"")[:2], "big"),
        indev=_be32(attrs, _INDEV),
        outdev=_be32(attrs, _OUTDEV),
        payload=attrs.get(_PAYLOAD, b""),
    )


def _be32(attrs: dict[int, bytes], kind: int) -> int:
    raw = attrs.get(kind, b"")
    return int(_U32.unpack(raw)[0]) if len(raw) == _U32.size else 0
