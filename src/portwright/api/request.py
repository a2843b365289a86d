"""A request as the server hands it to the daemon."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from portwright.api.frames import close_all


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end (SO_PEERCRED: as it was at connect time). ``pid`` 0: not visible from here."""

    pid: int
    uid: int
    gid: int


@dataclass(slots=True)
class Request:
    """One request. Descriptors that nobody took are closed when its dispatch has ended.

    ``kind`` ``J``: ``method``, ``params`` and ``id`` are set. ``kind`` ``C``: ``raw`` is the payload.
    """

    kind: Literal["J", "C"]
    peer: Peer
    id: int = 0
    method: str = ""
    params: dict[str, object] = field(default_factory=dict)
    raw: bytes = b""
    fds: list[int] = field(default_factory=list)

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
        """Close the descriptors that nobody took. May be called again."""
        fds, self.fds = self.fds, []
        close_all(fd for fd in fds if fd >= 0)
