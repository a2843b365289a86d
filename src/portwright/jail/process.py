"""A command that runs in its jail, as the process that started it sees it."""

from __future__ import annotations

import contextlib
import os
import signal
from types import TracebackType
from typing import Self

from portwright.jail.inside import STATUS


class Jailed:
    """A running command. ``pid`` is the jail's first process, our child; ``command_pid`` the command's own.

    Both as we number them. As subprocess.Popen has it: wait() gives the command's status, minus a signal's
    number if one ended it. As a context manager it ends the jail.
    """

    def __init__(self, pid: int, end: int, held: contextlib.ExitStack) -> None:
        """Takes over ``end``, the pipe that the status comes by, and ``held``, which is closed at the end."""
        self.pid = pid
        self.command_pid = 0
        self.returncode: int | None = None
        self._end = end
        self._held = held
        self._first = os.pidfd_open(pid)
        self._command = -1

    def met(self, command_pid: int) -> None:
        """Learn which process the command is: for :func:`start`, before it may end."""
        self.command_pid = command_pid
        self._command = os.pidfd_open(command_pid)

    def send_signal(self, number: int) -> None:
        """Send the command a signal; nothing if it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._command, number)

    def kill(self) -> None:
        """End every process in the jail at once."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._first, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for the end; all that the jail had is gone then. May be called again."""
        if self.returncode is None:
            os.waitid(os.P_PIDFD, self._first, os.WEXITED)
            said = os.read(self._end, STATUS.size)
            # Silence: the first process was killed, by us or with the cgroup, and the command with it.
            status = STATUS.unpack(said)[0] if len(said) == STATUS.size else signal.SIGKILL
            self.returncode = os.waitstatus_to_exitcode(status)
            for fd in (self._first, self._command, self._end):
                if fd >= 0:
                    os.close(fd)
            self._held.close()
        return self.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.wait()
