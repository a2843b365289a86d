"""What a guest is told while it runs: lines, on a virtio-serial port of its own, which it may read or not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Final

#: Bytes that wait for a guest that doesn't read, besides what its socket holds.
_MOST: Final = 64 * 1024


class Agent:
    """The host's end of the port, with one event loop. What a guest writes there is never read."""

    def __init__(self) -> None:
        """Makes both ends; ``far`` is for the hypervisor, to be closed here when it has its copy."""
        self._near, self.far = socket.socketpair()
        self._near.setblocking(False)
        self._waiting = bytearray()
        self._loop: asyncio.AbstractEventLoop | None = None

    def tell(self, line: str) -> bool:
        """Send the line, now or when the guest reads. False: it doesn't, and the line is lost."""
        data = line.encode() + b"\n"
        if self._near.fileno() < 0 or len(self._waiting) + len(data) > _MOST:
            return False
        self._waiting += data
        self._flush()
        return True

    def close(self) -> None:
        """Let go of our end. May be called again."""
        self._pause()
        self._near.close()

    def _flush(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self._near.send(self._waiting)]
        except BlockingIOError:
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
                self._loop.add_writer(self._near, self._flush)
            return
        except OSError:  # the hypervisor is gone
            self._waiting.clear()
        self._pause()

    def _pause(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(ValueError):  # closed already
                self._loop.remove_writer(self._near)
            self._loop = None
