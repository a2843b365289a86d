"""Whether the kernel's vhost-net carries a guest's packets, or the hypervisor itself."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Final, Literal, TypeAlias

from portwright.model.errors import KernelFailed, NotSupported

Vhost: TypeAlias = Literal["auto", "on", "off"]

_DEVICE: Final = "/dev/vhost-net"
_VHOST_GET_FEATURES: Final = 0x8008AF00  # linux/vhost.h


def choose(asked: Vhost) -> bool:
    """Whether it is used: as asked, or with ``auto`` where /dev/vhost-net makes one.

    Raises NotSupported where it was asked for and isn't there.
    """
    if asked == "off":
        return False
    lack = lacking()
    if lack and asked == "on":
        raise NotSupported("vhost", f"on ({lack})", "modprobe vhost_net, or use --vhost off")
    return not lack


def lacking() -> str:
    """Why there is no vhost-net here, or ''."""
    try:
        fd = open_device()
    except KernelFailed as error:
        return f"{_DEVICE}: {os.strerror(error.errno)}"
    try:
        fcntl.ioctl(fd, _VHOST_GET_FEATURES, bytes(8))
    except OSError as error:
        return f"{_DEVICE} is no vhost-net: {error.strerror}"
    finally:
        os.close(fd)
    return ""


def open_device() -> int:
    """A descriptor of a vhost-net that is nobody's yet, for one queue; the caller closes it."""
    try:
        return os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise KernelFailed(error.errno or errno.EIO, f"open {_DEVICE}") from error
