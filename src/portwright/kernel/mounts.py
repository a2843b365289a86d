"""Mounts held by descriptors: made apart, given their attributes, and only then put into the tree.

The calls are those of Linux 5.2 (fsopen, fsmount, open_tree, move_mount) and 5.12 (mount_setattr). What they
make has no name until it is attached, and goes with its descriptor: there is no moment at which a file is
seen writable that is meant to be read. All of it needs CAP_SYS_ADMIN, and raises KernelFailed.
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Final

from portwright.model.errors import KernelFailed, NotSupported

# linux/mount.h
READ_ONLY: Final = 0x1
NO_SUID: Final = 0x2
NO_DEV: Final = 0x4
NO_EXEC: Final = 0x8
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC, _OPEN_TREE_CLONE = 1, 1, 1
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
_AT_EMPTY_PATH: Final = 0x1000  # linux/fcntl.h
_AT_FDCWD: Final = -100
_MS_REC, _MS_PRIVATE, _MNT_DETACH = 1 << 14, 1 << 18, 2  # sys/mount.h
#: asm/unistd.h; the C library has no function for it.
_PIVOT_ROOT: Final = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)


class _Attr(ctypes.Structure):
    """struct mount_attr (linux/mount.h)."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def make_private() -> None:
    """Of this mount namespace's mounts none is shared any more: what is done here stays here."""
    _check(
        _libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "mount --make-rprivate"
    )


def new(kind: str, options: dict[str, str], attributes: int) -> int:
    """A descriptor (O_PATH) of a new file system, attached nowhere; the caller closes it."""
    context = _check(_libc.fsopen(kind.encode(), _FSOPEN_CLOEXEC), f"fsopen {kind}")
    try:
        for key, value in options.items():
            done = _libc.fsconfig(context, _FSCONFIG_SET_STRING, key.encode(), value.encode(), 0)
            _check(done, f"fsconfig {kind} {key}={value}")
        _check(_libc.fsconfig(context, _FSCONFIG_CMD_CREATE, None, None, 0), f"fsconfig {kind}")
        return _check(_libc.fsmount(context, _FSMOUNT_CLOEXEC, attributes), f"fsmount {kind}")
    finally:
        os.close(context)


def clone(fd: int, attributes: int) -> int:
    """A descriptor of a mount of what ``fd`` (O_PATH, of this mount namespace) names, attached nowhere.

    With ``attributes``, whatever it had. Mounts below it aren't in it.
    """
    flags = ctypes.c_uint(_AT_EMPTY_PATH | _OPEN_TREE_CLONE | os.O_CLOEXEC)
    tree = _check(_libc.open_tree(fd, b"", flags), "open_tree")
    try:
        change(tree, attributes)
    except BaseException:
        os.close(tree)
        raise
    return tree


def change(tree: int, attributes: int) -> None:
    """Add ``attributes`` to those of the mount that ``tree`` is the root of."""
    attr = _Attr(attributes, 0, 0, 0)
    done = _libc.mount_setattr(tree, b"", _AT_EMPTY_PATH, ctypes.byref(attr), ctypes.sizeof(attr))
    _check(done, "mount_setattr")


def attach(tree: int, folder: int, path: str) -> None:
    """Put the mount onto ``path``, which is there, below the directory ``folder``."""
    done = _libc.move_mount(tree, b"", folder, os.fsencode(path), _MOVE_MOUNT_F_EMPTY_PATH)
    _check(done, f"mount {path}")


def attach_over_root(tree: int) -> None:
    """Put the mount onto ``/``: hidden from this process, which is below it, but part of the tree.

    So it needs no folder on the host to be put onto.
    """
    attach(tree, _AT_FDCWD, "/")


def pivot(tree: int) -> None:
    """Make the mount this mount namespace's root, and let go of all others.

    The working directory is its root then. Nothing of the host is reachable any more but by descriptors
    that are open. Raises KernelFailed EINVAL where the host's own root is the kernel's first (an initramfs).
    """
    os.fchdir(tree)
    _check(_libc.syscall(_number(), b".", b"."), "pivot_root")
    # The former root now lies over the new one (pivot_root(2), its second example).
    _check(_libc.umount2(b".", _MNT_DETACH), "umount of the former root")


def _number() -> int:
    machine = platform.machine()
    if machine not in _PIVOT_ROOT:
        raise NotSupported("jail", machine, "it runs on x86-64 and arm64")
    return _PIVOT_ROOT[machine]


def _check(result: int, what: str) -> int:
    if result < 0:
        raise KernelFailed(ctypes.get_errno(), what)
    return result
