"""Where probes try things: a network namespace that belongs to one short-lived thread.

Nothing names it, and so the kernel takes it down with whatever was made in it when the thread ends.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Final

from portwright.model.errors import KernelFailed

_CLONE_NEWNET: Final = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def apart(work: Callable[[], str], name: str) -> str:
    """What ``work`` answers from inside such a namespace; ``name`` is the thread's.

    Raises what ``work`` raises, and KernelFailed where there can be no namespace.
    """
    said: list[str | BaseException] = []

    def inside() -> None:
        try:
            if _libc.unshare(_CLONE_NEWNET) != 0:
                raise KernelFailed(ctypes.get_errno(), "make a network namespace to probe in")
            said.append(work())
        except BaseException as error:  # noqa: BLE001 -- raised again by the caller's thread
            said.append(error)

    thread = threading.Thread(target=inside, name=name)
    thread.start()
    thread.join()
    (outcome,) = said
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
