"""Sysctls by file: ``net/ipv4/conf/eth0.100/forwarding``, in any network namespace.

Parts are separated by slashes and never by dots, so a device's name may hold dots. The
``net`` tree shows the namespace of the thread that opens the file (fs/proc/proc_sysctl.c),
which is why ``netns_fd`` works without a mount of its own.
"""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext

from portwright.kernel.netns import entered
from portwright.model.errors import InvalidInput, KernelFailed

_ROOT = "/proc/sys/"
_MAX = 4096  # proc_sysctl.c gives at most a page for the values that we touch


def read(path: str, netns_fd: int | None = None) -> str:
    """Return a value without its final newline.

    Raises KernelFailed: ENOENT if there is no such sysctl (or device, in that namespace).
    """
    raw = _access(path, netns_fd, None)
    return raw.decode("ascii", "replace").strip()


def write(path: str, value: str | int, netns_fd: int | None = None) -> None:
    """Set a value. Raises KernelFailed: ENOENT, EINVAL for a value it won't take, EROFS in a container."""
    _access(path, netns_fd, f"{value}\n".encode())


def _access(path: str, netns_fd: int | None, value: bytes | None) -> bytes:
    name = _checked(path)
    what = f"sysctl {path}" if value is None else f"sysctl -w {path}={value.decode().strip()}"
    try:
        # The open decides which namespace it is; the rest could as well happen outside.
        with nullcontext() if netns_fd is None else entered(netns_fd):
            fd = os.open(name, (os.O_RDONLY if value is None else os.O_WRONLY) | os.O_CLOEXEC)
        try:
            if value is None:
                return os.read(fd, _MAX)
            os.write(fd, value)  # one write: each starts a new value
            return b""
        finally:
            os.close(fd)
    except OSError as exc:
        raise KernelFailed(exc.errno or errno.EIO, what) from exc


def _checked(path: str) -> str:
    """Return the file's name; InvalidInput for a path that could lead out of the tree."""
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise InvalidInput("sysctl", path, "must be parts separated by single slashes, without . and ..")
    return _ROOT + path
