"""Processes and namespaces that are nobody else's, and that end with whoever made them.

Nothing here has a name on the machine: a namespace lives as long as a process or a descriptor holds it, and a
mount as long as its mount namespace. So whatever ends the owner, SIGKILL too, leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
from pathlib import Path
from typing import Final

from portwright.kernel import netns
from portwright.model.errors import KernelFailed

CLONE_NEWNS: Final = 0x00020000
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 1 << 14, 1 << 18  # sys/mount.h
#: linux/sockios.h, linux/if.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_IFREQ = struct.Struct("=16sH22x")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p),
    *(ctypes.c_ulong, ctypes.c_char_p),
)
_libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)


def fork() -> int:
    """As os.fork(), but the child is killed when the calling thread ends, however that comes.

    Only for a process with one thread: of others the child would have the locks and not the holders.
    """
    parent = os.getpid()
    child = os.fork()
    if not child:
        end_with(parent)
    return child


def end_with(parent: int) -> None:
    """In a child just forked (subprocess's ``preexec_fn``): be killed when the thread that forked it ends.

    It stays so after an exec, but for programs with set-user-ID or capabilities of their own.
    """
    failed = _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if failed or os.getppid() != parent:  # or it ended before the kernel knew what we want
        os._exit(1)


def leave(folder: Path) -> None:
    """Move this process (of one thread) into a new network and a new mount namespace.

    ``folder`` is an empty directory of our own there, in memory; mounts that are made from now on are seen by
    nobody else. Raises KernelFailed: EPERM for whoever is not root.
    """
    _check(_libc.unshare(netns.CLONE_NEWNET | CLONE_NEWNS), "unshare", "a private host needs root")
    _check(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None), "mount --make-rprivate /")
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _check(_libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, b"mode=0700"), f"mount {folder}")
    _loopback_up()


def new_netns() -> int:
    """A descriptor, the caller's to close, of a new network namespace with ``lo`` up. It holds it alone."""
    back = netns.self_fd()
    try:
        with netns.entered(back):  # whose exit takes this thread back from the new one
            _check(_libc.unshare(netns.CLONE_NEWNET), "unshare", "a network namespace needs root")
            fd = netns.self_fd()
            try:
                _loopback_up()
            except BaseException:
                os.close(fd)
                raise
            return fd
    finally:
        os.close(back)


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            raw = fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0))
            fcntl.ioctl(sock, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", _IFREQ.unpack(raw)[1] | _IFF_UP))
        except OSError as error:
            raise KernelFailed(error.errno or errno.EIO, "ioctl", "setting lo up") from error


def _check(result: int, what: str, detail: str = "") -> None:
    if result:
        raise KernelFailed(ctypes.get_errno(), what, detail)
