"""File systems mounted nowhere: one that only its descriptor leads to, and that ends with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Final

from portwright.model.errors import KernelFailed

# The same numbers on x86-64 and arm64 (include/uapi/asm-generic/unistd.h), since Linux 5.2.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
# include/uapi/linux/mount.h
_CLOEXEC, _SET_STRING, _CREATE = 1, 1, 6
RDONLY: Final = 0x1
_NOSUID, _NOEXEC = 0x2, 0x8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@contextlib.contextmanager
def mounted(kind: str, *, attributes: int = 0, **options: str) -> Iterator[int]:
    """A directory descriptor of a new file system of that kind, for ``dir_fd``; it ends with the block.

    Nobody else sees it, it has no path, and nothing of it outlives us. A sysfs shows the network namespace of
    the calling thread. Raises KernelFailed.
    """
    context = _call(_FSOPEN, f"fsopen {kind}", kind.encode(), _CLOEXEC)
    try:
        for key, value in options.items():
            _call(_FSCONFIG, f"fsconfig {key}", context, _SET_STRING, key.encode(), value.encode(), 0)
        _call(_FSCONFIG, f"fsconfig {kind}", context, _CREATE, None, None, 0)
        root = _call(_FSMOUNT, f"fsmount {kind}", context, _CLOEXEC, attributes | _NOSUID | _NOEXEC)
    finally:
        os.close(context)
    try:
        yield root
    finally:
        os.close(root)


def _call(number: int, what: str, *arguments: int | bytes | None) -> int:
    # Whole registers: libc's syscall() is variadic, and a C int would leave the upper half undefined.
    plain = (ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)
    result: int = _libc.syscall(ctypes.c_long(number), *plain)
    if result < 0:
        raise KernelFailed(ctypes.get_errno(), what)
    return result
