"""The file system in which BPF objects are pinned."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

from portwright.model.errors import KernelFailed

_BPF_FS_MAGIC: Final = 0xCAFE4A11  # linux/magic.h
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_PRIVATE = 2, 4, 8, 1 << 18  # sys/mount.h

_libc = ctypes.CDLL(None, use_errno=True)
_mount = _libc.mount
_mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_umount2 = _libc.umount2
_umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_statfs = _libc.statfs
_statfs.argtypes = (ctypes.c_char_p, ctypes.c_void_p)


def mount_bpffs(path: str | os.PathLike[str]) -> None:
    """Mount a new bpffs at the directory ``path``: mode 0700, nosuid, nodev, noexec, private.

    Private: neither the mount nor what happens below it shows in other mount namespaces that
    share this one's mounts. KernelFailed: ENOENT, EPERM. Mounting twice stacks; ask
    :func:`is_bpffs` first.
    """
    target = os.fsencode(path)
    _mounted(_mount(b"bpf", target, b"bpf", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, b"mode=0700"), path)
    try:
        _mounted(_mount(None, target, None, _MS_PRIVATE, None), path)
    except KernelFailed:
        _umount2(target, 0)
        raise


def _mounted(ret: int, path: str | os.PathLike[str]) -> None:
    if ret != 0:
        raise KernelFailed(ctypes.get_errno(), f"mount a bpffs at {os.fspath(path)}")


def is_bpffs(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` lies in a bpffs (its root, or a directory below). False when it's absent."""
    # struct statfs starts with f_type, a long, on x86-64 and arm64; all of it is under 256 bytes.
    buffer = (ctypes.c_long * 32)()
    if _statfs(os.fsencode(path), buffer) != 0:
        number = ctypes.get_errno()
        if number in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise KernelFailed(number, f"statfs {os.fspath(path)}")
    return buffer[0] & 0xFFFFFFFF == _BPF_FS_MAGIC


def umount_bpffs(path: str | os.PathLike[str]) -> None:
    """Unmount the bpffs at ``path``, and with it every pin. A path that is no bpffs is left alone.

    KernelFailed: EBUSY while somebody is in it, EINVAL for a directory below its root.
    """
    if not is_bpffs(path):
        return
    if _umount2(os.fsencode(path), 0) != 0:
        raise KernelFailed(ctypes.get_errno(), f"unmount the bpffs at {os.fspath(path)}")
