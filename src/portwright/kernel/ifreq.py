"""The questions that netdevice(7) answers without RTNL: a name, an MTU.

``RTM_GETLINK`` takes the lock that every change of a link on the machine holds, and answers with all there
is, which then has to be read: some 60 µs, and more beside others' changes. These take 1 µs.
"""

from __future__ import annotations

import errno
import fcntl
import struct

from portwright.kernel.netlink import NetlinkSocket
from portwright.model.errors import KernelFailed

#: linux/sockios.h
_SIOCGIFNAME, _SIOCGIFMTU = 0x8910, 0x8921
#: struct ifreq: the name, and a union of 24 bytes on 64-bit Linux.
_NAMED, _NUMBERED = struct.Struct("=16s24x"), struct.Struct("=16xi20x")


def name(sock: NetlinkSocket, index: int) -> str | None:
    """The name of that ifindex in the socket's namespace, None if there is none."""
    raw = _ask(sock, _SIOCGIFNAME, _NUMBERED.pack(index), f"name of if{index}")
    return None if raw is None else raw[:16].rstrip(b"\0").decode()


def mtu(sock: NetlinkSocket, device: str) -> int | None:
    """The MTU of a device in bytes, None if there is none."""
    raw = _ask(sock, _SIOCGIFMTU, _NAMED.pack(device.encode()), f"mtu of {device}")
    return None if raw is None else struct.unpack_from("=i", raw, 16)[0]


def _ask(sock: NetlinkSocket, request: int, value: bytes, what: str) -> bytes | None:
    try:
        return fcntl.ioctl(sock.fileno(), request, value)
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENXIO):
            return None
        raise KernelFailed(error.errno or errno.EIO, "ioctl", what) from error
