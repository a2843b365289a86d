"""Network namespaces: open, tell apart, enter for a moment, find again.

A namespace is held by a file descriptor, never by a path: a path can be unlinked or
point elsewhere a moment later. Beyond the life of a descriptor it is known by its cookie
(``SO_NETNS_COOKIE``, net/core/sock.c, since Linux 5.14), which the kernel never reuses
within one boot, together with that boot's id.

setns(2) moves the *calling thread* only. Every function here that enters a namespace
comes back before it returns, so it is safe in any thread, with other threads running.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from portwright.model.errors import InvalidInput, KernelFailed

CLONE_NEWNET = 0x40000000
_NSFS_MAGIC = 0x6E736673  # include/uapi/linux/magic.h
_NS_GET_NSTYPE = 0xB703  # _IO(NSIO, 3), include/uapi/linux/nsfs.h
_SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h
_SELF = "/proc/thread-self/ns/net"
#: How many different namespaces :func:`find_by_cookie` looks into before it gives up.
MAX_SEARCHED = 65536

_libc = ctypes.CDLL(None, use_errno=True)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)


def open_netns(path: str) -> int:
    """Open the network namespace at ``path`` and return a close-on-exec descriptor.

    Raises InvalidInput (field ``netns``) if there is nothing at the path, or something that
    is not a network namespace; in both cases nothing is left open. The path comes from the
    caller: it is opened with O_PATH first, so that a FIFO can't block us and a device can't
    react before we know that the file lies on nsfs.
    """
    try:
        probe = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise InvalidInput("netns", path, f"cannot open: {why}") from exc
    try:
        if _fs_magic(probe) != _NSFS_MAGIC:
            raise InvalidInput("netns", path, "not a namespace: the file is not on nsfs (was it unmounted?)")
        fd = os.open(f"/proc/self/fd/{probe}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise InvalidInput("netns", path, f"cannot open: {exc.strerror}") from exc
    finally:
        os.close(probe)
    if not is_netns(fd):
        os.close(fd)
        raise InvalidInput("netns", path, "a namespace, but not a network namespace")
    return fd


def is_netns(fd: int) -> bool:
    """Tell whether the open descriptor ``fd`` (not O_PATH) is a network namespace.

    For descriptors that came over a socket. Never raises for an open descriptor.
    """
    try:
        # The magic first: an ioctl number means something else to another file's driver.
        return _fs_magic(fd) == _NSFS_MAGIC and fcntl.ioctl(fd, _NS_GET_NSTYPE) == CLONE_NEWNET
    except OSError:
        return False


def self_fd() -> int:
    """Open the namespace that the calling thread is in; the caller closes it."""
    return os.open(_SELF, os.O_RDONLY | os.O_CLOEXEC)


def same(fd1: int, fd2: int) -> bool:
    """Tell whether two descriptors name one namespace (device and inode; ioctl_ns(2))."""
    one, two = os.fstat(fd1), os.fstat(fd2)
    return (one.st_dev, one.st_ino) == (two.st_dev, two.st_ino)


class entered:
    """Context manager: the calling thread is inside the namespace ``fd``, then back.

    The body must stay on this thread and must not ``await``: in asyncio another task would
    run in the wrong namespace. Nests. Raises KernelFailed if entering fails (the thread has
    then not moved). Inside, ``/proc/sys/net`` and new sockets belong to the namespace;
    ``/proc/net`` (the main thread's) and ``/sys/class/net`` (the mount's) do not.
    """

    __slots__ = ("_back", "_fd")

    def __init__(self, fd: int) -> None:
        """Remember ``fd``, which stays the caller's; entering comes later."""
        self._fd = fd
        self._back = -1

    def __enter__(self) -> None:
        """Remember the present namespace and move."""
        back = self_fd()
        if _libc.setns(self._fd, CLONE_NEWNET):
            code = ctypes.get_errno()
            os.close(back)
            raise KernelFailed(code, "setns", f"entering network namespace fd {self._fd}")
        self._back = back

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Go back, whatever happened; the process dies rather than stay."""
        # Scary spot. If the way back fails, this thread is in a sandbox's namespace and
        # nobody knows: the next "delete pw…", the next nft transaction, a listening socket
        # would silently hit a tenant's network, or the host's rules would be written there.
        # An exception could be caught by some well-meant handler further up and the thread,
        # perhaps of a pool, reused. There is no good state to continue in, and the journal
        # makes a crash safe by design, so the process ends here, loudly. It can fail only if
        # we lost CAP_SYS_ADMIN midway or someone closed our descriptor, both bugs of ours.
        back, self._back = self._back, -1
        if _libc.setns(back, CLONE_NEWNET):
            code = ctypes.get_errno()
            sys.stderr.write(
                f"portwright: fatal: cannot leave a network namespace (setns: {os.strerror(code)})\n"
            )
            sys.stderr.flush()
            os.abort()
        os.close(back)


def cookie(fd: int) -> int:
    """Return the namespace's cookie: unique and never reused within one boot."""
    with entered(fd), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        return cookie_of(probe)


def cookie_of(sock: socket.socket) -> int:
    """Return the cookie of the namespace that a socket belongs to."""
    raw = sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    return int.from_bytes(raw, sys.byteorder)


def boot_id() -> str:
    """Return this boot's random id; cookies, ifindexes and pins mean nothing beyond it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def find_by_cookie(wanted: int) -> int | None:
    """Find a living namespace by its cookie; return a descriptor (the caller closes it) or None.

    Looks at our own namespace, at every nsfs mount that we can see (``/run/netns``, and
    wherever a runtime keeps its own) and at the main thread of every process. A namespace
    held only by a descriptor, by a non-main thread or by a mount in another mount namespace
    is not found. Costs about 30 µs for each namespace; looks at MAX_SEARCHED at most.
    """
    for fd in living():
        try:
            if cookie(fd) == wanted:
                return os.dup(fd)
        except (OSError, KernelFailed):
            continue  # one that we may not enter is not ours
    return None


def living() -> Iterator[int]:
    """Give a descriptor of each living namespace that can be found, once each, ours first.

    What :func:`find_by_cookie` says of finding holds here. A descriptor is closed when the next
    one is asked for, or the iterator is: ``os.dup`` it to keep it.
    """
    for _, fd in named():
        yield fd


def named() -> Iterator[tuple[str, int]]:
    """As :func:`living`, each with a path that leads to it now."""
    seen: set[tuple[int, int]] = set()
    for path in _candidates():
        try:
            status = Path(path).stat()
            key = (status.st_dev, status.st_ino)
            if key in seen:
                continue
            if len(seen) >= MAX_SEARCHED:
                return
            seen.add(key)
            fd = open_netns(path)
        except (OSError, InvalidInput):
            continue  # ended, unmounted or hidden meanwhile
        try:
            yield path, fd
        finally:
            os.close(fd)


def _candidates() -> Iterator[str]:
    """Paths that may lead to network namespaces, likeliest first."""
    yield _SELF
    with Path("/proc/self/mountinfo").open("rb") as mounts:
        for line in mounts:
            # "36 35 0:4 net:[4026532008] /run/netns/x rw shared:1 - nsfs nsfs rw" (proc(5))
            fields = line.split(b" ", 5)
            if fields[3].startswith(b"net:["):
                yield os.fsdecode(_unescape(fields[4]))
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            yield f"{entry}/ns/net"


def _unescape(field: bytes) -> bytes:
    r"""Undo mountinfo's octal escapes (``\040`` and friends)."""
    if b"\\" not in field:
        return field
    for octal in (b"040", b"011", b"012", b"134"):  # the backslash itself last
        field = field.replace(b"\\" + octal, bytes([int(octal, 8)]))
    return field


def _fs_magic(fd: int) -> int:
    """f_type of fstatfs(2): the first machine word of struct statfs on 64-bit Linux."""
    # 120 bytes on x86-64 and arm64 (asm-generic/statfs.h); 256 leaves room.
    buffer = (ctypes.c_long * 32)()
    if _libc.fstatfs(fd, buffer):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno() or errno.EIO))
    return int(buffer[0])
