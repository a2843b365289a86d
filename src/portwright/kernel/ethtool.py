"""What a device takes off its sender's hands, and its queues: what `ethtool -k` and `ip -d link` show of it.

The features by ethtool's old questions, a word each: they are answered from the same bits as the new ones.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import struct
from typing import Final, NamedTuple

from portwright.kernel.netlink import NetlinkSocket, RequestFailed
from portwright.kernel.nlattr import get_str, get_u8, get_u32, parse_attrs
from portwright.kernel.rtnl_parse import (
    IFINFOMSG,
    IFLA_CARRIER,
    IFLA_INFO_DATA,
    IFLA_INFO_KIND,
    IFLA_LINKINFO,
    RTM_NEWLINK,
    link_get,
)
from portwright.model.errors import KernelFailed

_SIOCETHTOOL: Final = 0x8946  # linux/sockios.h
#: linux/ethtool.h: ETHTOOL_GTXCSUM, ETHTOOL_GTSO (of any protocol), by the words that we have for them.
_QUESTIONS: Final = {"checksum": 0x16, "tso": 0x1E}
#: struct ifreq with a pointer in its union, on 64-bit Linux.
_IFREQ: Final = struct.Struct("=16sQ16x")
_NUM_TX_QUEUES = 31  # linux/if_link.h, IFLA_NUM_TX_QUEUES
_TUN_VNET_HDR, _TUN_NUM_QUEUES = 5, 8  # linux/if_link.h, IFLA_TUN_*


class Queues(NamedTuple):
    """Those of a tap that are open now, those that another device has. ``vnet_hdr`` is a tap's alone."""

    number: int
    vnet_hdr: bool | None


def offloads(sock: NetlinkSocket, name: str) -> tuple[str, ...]:
    """Which of ``checksum`` and ``tso`` the device in the socket's namespace offers; () if it is gone."""
    found = []
    for word, question in _QUESTIONS.items():
        value = (ctypes.c_uint32 * 2)(question, 0)  # struct ethtool_value
        try:
            fcntl.ioctl(sock.fileno(), _SIOCETHTOOL, _IFREQ.pack(name.encode(), ctypes.addressof(value)))
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.EOPNOTSUPP):
                continue
            raise KernelFailed(error.errno or errno.EIO, f"ethtool -k {name}") from error
        if value[1]:
            found.append(word)
    return tuple(found)


def queues(sock: NetlinkSocket, name: str) -> Queues | None:
    """The queues of the device in the socket's namespace, None if it is gone."""
    try:
        (replies,) = sock.execute([link_get(name)])
    except RequestFailed as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    for message in replies:
        if message.type == RTM_NEWLINK:
            attrs = parse_attrs(message.body, IFINFOMSG.size)
            info = parse_attrs(attrs.get(IFLA_LINKINFO, b""))
            if get_str(info, IFLA_INFO_KIND) != "tun":
                return Queues(get_u32(attrs, _NUM_TX_QUEUES), None)
            data = parse_attrs(info.get(IFLA_INFO_DATA, b""))
            # One of a single queue does not count it, but has a carrier while somebody has it open.
            number = get_u32(data, _TUN_NUM_QUEUES, get_u8(attrs, IFLA_CARRIER))
            return Queues(number, bool(get_u8(data, _TUN_VNET_HDR)))
    return None
