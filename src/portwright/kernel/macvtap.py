"""Macvtaps: made by rtnetlink, and opened by a character device that need not have a name anywhere.

The device's number is the kernel's choice and stands in the sysfs of the macvtap's namespace alone. The node
that devtmpfs makes for it, /dev/tapN, is called by the ifindex, and two namespaces have devices of one
number: which of them it is nobody can tell. So the number is read from a sysfs of that namespace and the
device opened by a node in a tmpfs of our own, neither of which is mounted anywhere (kernel/detached.py).
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from typing import Final

from portwright.kernel import detached, netns
from portwright.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL, Request
from portwright.kernel.nlattr import attr_nested, attr_str, attr_u32
from portwright.kernel.rtnl_parse import (
    IFINFOMSG,
    IFLA_IFNAME,
    IFLA_INFO_DATA,
    IFLA_INFO_KIND,
    IFLA_LINK,
    IFLA_LINKINFO,
    IFLA_MTU,
    RTM_NEWLINK,
)
from portwright.model.errors import KernelFailed, NotFound

KIND: Final = "macvtap"
_IFLA_NUM_TX_QUEUES, _IFLA_NUM_RX_QUEUES = 31, 32  # linux/if_link.h
_IFLA_MACVLAN_MODE, _MODE_PASSTHRU = 1, 8
_IFF_ALLMULTI = 0x200  # linux/if.h
# linux/if_tun.h; drivers/net/tap.c takes these flags and no others
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI, _IFF_MULTI_QUEUE, _IFF_VNET_HDR = 0x400454CA, 0x2, 0x1000, 0x0100, 0x4000
_IFREQ: Final = struct.Struct("16sH22x")


def create(name: str, *, lower: int, mtu: int, queues: int = 1) -> Request:
    """A macvtap, down, on the device of that ifindex, alone there (``passthru``), with its MAC.

    What comes in for that MAC goes to whoever has the macvtap open, and no more to the device's own stack; of
    broadcasts and multicasts both get one. EINVAL where another macvlan is on the device.
    """
    mode = attr_nested(IFLA_INFO_DATA, attr_u32(_IFLA_MACVLAN_MODE, _MODE_PASSTHRU))
    body = (
        # Which groups the guest is in the kernel can't know: without this it gets multicasts of none.
        IFINFOMSG.pack(0, 0, 0, _IFF_ALLMULTI, _IFF_ALLMULTI)
        + attr_str(IFLA_IFNAME, name)
        + attr_u32(IFLA_LINK, lower)
        + attr_u32(IFLA_MTU, mtu)
        + attr_u32(_IFLA_NUM_TX_QUEUES, queues)
        + attr_u32(_IFLA_NUM_RX_QUEUES, queues)
        + attr_nested(IFLA_LINKINFO, attr_str(IFLA_INFO_KIND, KIND), mode)
    )
    words = f"ip link add link if{lower} name {name} mtu {mtu} numtxqueues {queues} numrxqueues {queues}"
    words += f" allmulticast on type {KIND} mode passthru"
    return Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, words)


def open_queues(netns_fd: int, name: str, count: int) -> list[int]:
    """A descriptor for each of ``count`` queues, for frames with a virtio-net header; the caller closes them.

    The kernel hands frames to all who have the macvtap open, so it is for one hypervisor. Raises NotFound
    where the namespace has no macvtap of that name, KernelFailed where the device can't be opened (EBUSY: it
    has as many queues as there can be).
    """
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if count > 1 else 0)
    opened: list[int] = []
    with netns.entered(netns_fd), detached.mounted("tmpfs", size="4096", nr_inodes="2") as folder:
        try:
            os.mknod("tap", stat.S_IFCHR | 0o600, _number(name), dir_fd=folder)
            for _ in range(count):
                opened.append(os.open("tap", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder))
                fcntl.ioctl(opened[-1], _TUNSETIFF, _IFREQ.pack(b"", flags))
        except OSError as error:
            for fd in opened:
                os.close(fd)
            raise KernelFailed(error.errno or 0, f"open macvtap {name}", "is it allowed to us?") from error
    return opened


def _number(name: str) -> int:
    """The device's number, in the calling thread's namespace."""
    with detached.mounted("sysfs", attributes=detached.RDONLY) as sysfs:
        try:
            if "/" in name:
                raise FileNotFoundError
            index = _read(sysfs, f"class/net/{name}/ifindex")
            major, _, minor = _read(sysfs, f"class/net/{name}/tap{index}/dev").partition(":")
        except FileNotFoundError:
            raise NotFound(KIND, name) from None
    return os.makedev(int(major), int(minor))


def _read(folder: int, path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(fd, 64).decode().strip()
    finally:
        os.close(fd)
