"""Taps: made by ioctl, as rtnetlink makes none (drivers/net/tun.c, tun_validate)."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from typing import Final

from portwright.kernel import netns
from portwright.model.errors import Conflict, InvalidInput, KernelFailed, NotFound

_DEVICE: Final = "/dev/net/tun"
# linux/if_tun.h
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER, _TUNSETGROUP = 0x400454CA, 0x400454CB, 0x400454CC, 0x400454CE
_IFF_TAP, _IFF_NO_PI, _IFF_MULTI_QUEUE, _IFF_VNET_HDR, _IFF_TUN_EXCL = 0x2, 0x1000, 0x0100, 0x4000, 0x8000
_IFREQ: Final = struct.Struct("16sH22x")
_SIOCSIFHWADDR, _ARPHRD_ETHER, _HWADDR = 0x8924, 1, struct.Struct("=16sH6s16x")  # linux/sockios.h, if_arp.h


def create(
    netns_fd: int,
    name: str,
    *,
    multi_queue: bool = False,
    uid: int | None = None,
    gid: int | None = None,
    mac: str = "",
) -> None:
    """A persistent tap, down, in the namespace behind ``netns_fd``, for frames with a virtio-net header.

    ``mac``: the tap's own, which it has before it stays; '' for one of the kernel's. ``uid``, ``gid``: who
    may open it without CAP_NET_ADMIN. Firecracker takes no ``multi_queue`` one. Raises Conflict where the
    name is taken, KernelFailed where the kernel has no tun; then there is no tap.
    """
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL | (_IFF_MULTI_QUEUE if multi_queue else 0)
    fd = _attached(netns_fd, name, flags)
    try:
        if mac:
            raw = bytes.fromhex(mac.replace(":", ""))
            fcntl.ioctl(fd, _SIOCSIFHWADDR, _HWADDR.pack(b"", _ARPHRD_ETHER, raw))
        for request, number in ((_TUNSETOWNER, uid), (_TUNSETGROUP, gid), (_TUNSETPERSIST, 1)):
            if number is not None:
                fcntl.ioctl(fd, request, number)
    except OSError as error:
        raise KernelFailed(error.errno or 0, f"ip tuntap add {name} mode tap") from error
    finally:
        os.close(fd)


def open_queue(netns_fd: int, name: str, *, multi_queue: bool = False) -> int:
    """A descriptor of a queue of a tap that is there, for a hypervisor; the caller closes it.

    Raises NotFound where there is none, Conflict where somebody has it open already, or it is of the other
    kind.
    """
    return _attached(
        netns_fd, name, _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if multi_queue else 0)
    )


def give(netns_fd: int, name: str, uid: int, gid: int) -> None:
    """Let a user (with that group) open a tap that is there, single-queued, without CAP_NET_ADMIN.

    Raises as :func:`open_queue` does.
    """
    fd = open_queue(netns_fd, name)
    try:
        for request, number in ((_TUNSETOWNER, uid), (_TUNSETGROUP, gid)):
            fcntl.ioctl(fd, request, number)
    except OSError as error:
        raise KernelFailed(error.errno or 0, f"giving {name} to user {uid}") from error
    finally:
        os.close(fd)


def _attached(netns_fd: int, name: str, flags: int) -> int:
    raw = name.encode()
    if not 0 < len(raw) < 16:
        raise InvalidInput("tap", name, "a device's name has 1 to 15 bytes")
    with netns.entered(netns_fd):  # the descriptor is of the namespace that it is opened in
        # Without IFF_TUN_EXCL TUNSETIFF makes one that is not there, joined with nothing.
        if not flags & _IFF_TUN_EXCL and not _is_there(name):
            raise NotFound("tap", name)
        try:
            fd = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise KernelFailed(error.errno or 0, f"open {_DEVICE}", "is the module tun there?") from error
        try:
            fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(raw, flags))
        except OSError as error:
            os.close(fd)
            if error.errno in {errno.EBUSY, errno.EEXIST, errno.EINVAL}:
                why = "is open already, or a device of another kind; close or delete it"
                raise Conflict("tap", name, why) from error
            raise KernelFailed(error.errno or 0, f"ip tuntap add {name} mode tap") from error
    return fd


def _is_there(name: str) -> bool:
    """Whether the calling thread's namespace has a device of that name."""
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True
