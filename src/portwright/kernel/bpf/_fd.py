"""A kernel object that we hold by a descriptor of our own.

Contract shared by maps, programs and links: the object owns its descriptor;
``close()`` gives it up and may be called twice; any use after that raises
:class:`ValueError`; an object that is collected without having been closed warns
(:class:`ResourceWarning`) and closes it. Closing a descriptor never removes what is
pinned or attached under another name.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from pathlib import Path
from typing import ClassVar, NoReturn, Self

from portwright.kernel.bpf import _libbpf
from portwright.model.errors import KernelFailed


def failed(ret: int, what: str, detail: str = "") -> NoReturn:
    """Raise the error for a libbpf result: ``ret`` is ``-errno``."""
    raise KernelFailed(-ret, what, detail)


class OwnedFd:
    """Base of everything here that owns one descriptor. The kernel makes them close-on-exec.

    A class of objects names itself by ``_KIND``, as the kernel does (``map``, ``prog``, ``link``), and
    ``_NOUN``, as its users do.
    """

    __slots__ = ("__weakref__", "_fd")
    _KIND: ClassVar[str]
    _NOUN: ClassVar[str]

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def from_pin(cls, path: str | os.PathLike[str]) -> Self:
        """What is pinned at ``path``. KernelFailed: ENOENT, or EINVAL when it is of another kind."""
        fd = open_pin(path)
        check_kind(fd, f"bpf-{cls._KIND}", path)
        return cls(fd)

    @classmethod
    def from_id(cls, number: int) -> Self:
        """The object with the kernel's id, such as an info or a map of maps gives.

        KernelFailed(ENOENT) when it's gone.
        """
        fd: int = getattr(_libbpf, f"bpf_{cls._KIND}_get_fd_by_id")(number)
        if fd < 0:
            failed(fd, f"open the {cls._NOUN} with id {number}")
        return cls(fd)

    @property
    def fd(self) -> int:
        """The descriptor; ValueError once closed."""
        if self._fd < 0:
            self._closed()
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._fd < 0

    def fileno(self) -> int:
        """The descriptor, for select and for SCM_RIGHTS."""
        return self.fd

    def close(self) -> None:
        """Give the descriptor up. Closing twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        # __init__ may have failed before it set the descriptor.
        if getattr(self, "_fd", -1) >= 0:
            shown = repr(self)
            self.close()
            warnings.warn(f"unclosed {shown}", ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        name = getattr(self, "name", None)  # not yet there when __init__ failed
        shown = "" if name is None else f" {name!r}"
        return f"<{type(self).__name__}{shown} {'closed' if self._fd < 0 else f'fd={self._fd}'}>"

    def _closed(self) -> NoReturn:
        raise ValueError(f"{self!r} is closed")

    def _failed(self, ret: int, what: str, detail: str = "") -> NoReturn:
        """Raise for ``ret``; use of a closed object (which gave the kernel fd -1) is a ValueError."""
        if self._fd < 0:
            self._closed()
        failed(ret, what, detail)

    def pin(self, path: str | os.PathLike[str]) -> None:
        """Give the kernel object a name in a bpffs, which keeps it alive without us.

        KernelFailed: EEXIST when the name is taken, EPERM when ``path`` is not in a bpffs.
        To unpin, unlink the path. The kernel then drops the pin's reference from a work queue:
        when it was the last, the object is gone soon, but not when unlink(2) returns. Where that
        matters (the next attachment of the same program), detach a link first.
        """
        ret = _libbpf.bpf_obj_pin(self.fd, os.fsencode(path))
        if ret < 0:
            self._failed(ret, f"pin {self!r} at {os.fspath(path)}")


def open_pin(path: str | os.PathLike[str]) -> int:
    """A descriptor for what is pinned at ``path``; KernelFailed(ENOENT) when nothing is.

    The caller must check what it got: the kernel opens whatever is there.
    """
    ret: int = _libbpf.bpf_obj_get(os.fsencode(path))
    if ret < 0:
        failed(ret, f"open the pin {Path(path)}")
    return ret


def object_info(fd: int, info: ctypes.Structure, what: str) -> None:
    """Fill ``info`` by BPF_OBJ_GET_INFO_BY_FD. An older kernel fills less; the rest stays zero."""
    size = ctypes.c_uint32(ctypes.sizeof(info))
    ret = _libbpf.bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size))
    if ret < 0:
        failed(ret, f"read the info of {what}")


def fd_kind(fd: int) -> str:
    """``bpf-map``, ``bpf-prog``, ``bpf-link`` or whatever else ``fd`` refers to."""
    target = str(Path(f"/proc/self/fd/{fd}").readlink())
    return target.removeprefix("anon_inode:").strip("[]").replace("_", "-")


def check_kind(fd: int, kind: str, path: str | os.PathLike[str]) -> None:
    """Close ``fd`` and raise KernelFailed(EINVAL) unless it is a ``kind``.

    Asking a program for a map's info would otherwise read one structure as the other.
    """
    found = fd_kind(fd)
    if found != kind:
        os.close(fd)
        failed(-22, f"open the pin {os.fspath(path)}", f"it is a {found}, not a {kind}")
