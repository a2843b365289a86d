"""The sandbox's end while a plan is made and applied: one descriptor, one socket, opened once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import TracebackType

from portwright.kernel import netns, rtnl
from portwright.kernel.netlink import NetlinkSocket
from portwright.model.errors import InvalidInput
from portwright.model.port import NetnsRef

_MAIN_TABLE = 254


def find(ref: NetnsRef, boot_id: str) -> int | None:
    """A descriptor (the caller closes it) of the namespace if it still lives; ``boot_id`` is the present."""
    if ref.boot_id != boot_id:
        return None
    try:
        fd = netns.open_netns(ref.path)
    except InvalidInput:
        return netns.find_by_cookie(ref.cookie)
    if netns.cookie(fd) == ref.cookie:
        return fd
    os.close(fd)
    return netns.find_by_cookie(ref.cookie)


class Sandbox:
    """A network namespace that a caller named. A context manager; its descriptor stays the caller's."""

    def __init__(self, fd: int, path: str) -> None:
        """Opens a socket in it; InvalidInput if ``fd`` is no network namespace."""
        if not netns.is_netns(fd):
            raise InvalidInput("netns", path, "is not a network namespace")
        self.fd = fd
        self.path = path
        self.rtnl = NetlinkSocket(netns_fd=fd)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rtnl.close()

    def ref(self, boot_id: str) -> NetnsRef:
        """Identifies it beyond its path."""
        return NetnsRef(path=self.path, cookie=self.rtnl.netns_cookie(), boot_id=boot_id)

    def destinations(self) -> set[str]:
        """Where its main table has routes to, both families; defaults as /0."""
        return {route.dst for route in rtnl.routes(self.rtnl, table=_MAIN_TABLE)}


@contextlib.contextmanager
def inside(ref: NetnsRef) -> Iterator[Sandbox | None]:
    """The namespace of a record while it lives; None once it is gone."""
    fd = find(ref, netns.boot_id())
    if fd is None:
        yield None
        return
    try:
        with Sandbox(fd, ref.path) as sandbox:
            yield sandbox
    finally:
        os.close(fd)
