"""Other processes, by a handle that is nobody else's later (pidfd_open(2))."""

from __future__ import annotations

import select


def ended(handle: int, within: float) -> bool:
    """Wait ``within`` seconds at most for the end of the process behind the pidfd; whether it came."""
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    return bool(poller.poll(within * 1000))
