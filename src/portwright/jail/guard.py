"""A process that outlives us by a moment, and removes what does not end with us by itself.

Processes, namespaces and mounts end with whoever holds them, whatever ends that. Cgroups and ports have
names: somebody has to remove them, after SIGKILL too. The guard waits for a byte from us, or for our end of
the pipe to be closed by the kernel, and does it in both cases. The kernel closes that end while it closes the
others, one after the other, on another CPU: in that case the guard waits until we are a process no more, for
what it looks at (does somebody listen there?) is still ours before that.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Final, NoReturn, Self

from portwright.model.errors import PortwrightError

#: Seconds that a process may take to end once it ends.
_END_WITHIN: Final = 10.0


class Guard:
    """Context manager: when it is left, or this process ends before that, ``clean`` is called, elsewhere.

    It may be called a second time, here, if it failed there. For a process with one thread (it forks). A
    PortwrightError is said on stderr behind ``left``, which says what stays, and is no exception, which would
    hide the first one.
    """

    def __init__(self, clean: Callable[[], None], left: str) -> None:
        self._clean = clean
        self._left = left
        self._pid = 0
        self._far = -1

    def __enter__(self) -> Self:
        sys.stdout.flush()
        sys.stderr.flush()
        us = os.pidfd_open(os.getpid())
        near, self._far = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            self._serve(near, us)
        os.close(near)
        os.close(us)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is gone, and its status tells
            os.write(self._far, b".")
        os.close(self._far)
        _, status = os.waitpid(self._pid, 0)
        if status:
            try:
                self._clean()
            except PortwrightError as error:
                sys.stderr.write(f"portwright: {self._left}: {error}\n")

    def _serve(self, near: int, us: int) -> NoReturn:
        """The guard, from its first line to its last."""
        status = 1
        try:
            os.setsid()  # a signal for our group is not for the guard
            signal.set_wakeup_fd(-1)  # that of an event loop which is not ours
            for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(ignored, signal.SIG_IGN)
            # All but these two: what would keep a namespace, and what somebody reads to its end.
            nothing = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(nothing, number)
            first, second = sorted((near, us))
            os.closerange(3, first)
            os.closerange(first + 1, second)
            os.closerange(second + 1, os.sysconf("SC_OPEN_MAX"))
            if not os.read(near, 1):
                select.select([us], [], [], _END_WITHIN)
            self._clean()
            status = 0
        finally:
            os._exit(status)
