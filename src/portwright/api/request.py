"""A request as the server hands it to the daemon."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from portwright.api.errors import Busy
from portwright.api.frames import close_all


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end (SO_PEERCRED: as it was at connect time). ``pid`` 0: not visible from here."""

    pid: int
    uid: int
    gid: int


class Slots:
    """How many of a kind there may be at once, over all connections: ``limit`` of ``what``."""

    def __init__(self, what: str, limit: int) -> None:
        self.what = what
        self.limit = limit
        self.used = 0

    def take(self) -> None:
        """Take one. Raises Busy if none is left."""
        if self.used >= self.limit:
            raise Busy(self.what, self.limit)
        self.used += 1

    def give_back(self) -> None:
        """It is free again."""
        self.used -= 1


@dataclass(slots=True)
class Request:
    """One request. Descriptors that nobody took are closed when its dispatch has ended.

    ``kind`` ``J``: ``method``, ``params`` and ``id`` are set. ``kind`` ``C``: ``raw`` is the payload.
    ``slots``: of a large request, the slots of which it has one until it is closed.
    """

    kind: Literal["J", "C"]
    peer: Peer
    id: int = 0
    method: str = ""
    params: dict[str, object] = field(default_factory=dict)
    raw: bytes = b""
    fds: list[int] = field(default_factory=list)
    slots: Slots | None = None

    @property
    def large(self) -> bool:
        """Whether it came in a frame that only some methods take."""
        return self.slots is not None

    def take(self, index: int) -> int:
        """Return descriptor ``index`` and make it the caller's, to close. Raises IndexError."""
        fd = self.fds[index]
        if fd < 0:
            raise IndexError(f"descriptor {index} was taken already")
        self.fds[index] = -1
        return fd

    def dup(self, index: int) -> int:
        """Return a close-on-exec copy of descriptor ``index``, the caller's. Raises IndexError."""
        fd = self.fds[index]
        if fd < 0:
            raise IndexError(f"descriptor {index} was taken already")
        return os.dup(fd)

    def close(self) -> None:
        """Close the descriptors that nobody took, and give its slot back. May be called again."""
        if self.slots is not None:
            self.slots.give_back()
            self.slots = None
        fds, self.fds = self.fds, []
        close_all(fd for fd in fds if fd >= 0)
