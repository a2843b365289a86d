"""A process that outlives us by a moment, and deletes the ports of a namespace.

A namespace and a hypervisor end with whoever holds them, whatever ends that. A port is durable: somebody has
to delete it, after SIGKILL too. The guard waits for our end of a pipe to be closed, by us or by the kernel.
It knows our ports by their namespace's cookie, which nobody else's have: there is no moment at which one of
them is not known yet, and nobody else's port is touched whatever its name.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from portwright.api.client import Client
from portwright.kernel import netns
from portwright.model.errors import NotFound, PortwrightError


def delete_ports(socket: Path, cookie: int) -> None:
    """Delete every port whose sandbox is the namespace with that cookie. Raises as the client does."""
    boot = netns.boot_id()
    with Client(socket) as client:
        for port in client.port_list():
            if port.sandbox.cookie == cookie and port.sandbox.boot_id == boot:
                with contextlib.suppress(NotFound):
                    client.port_delete(port.port_id)


class Guard:
    """Context manager: when it is left, or this process ends before that, the namespace's ports are deleted.

    ``socket`` is the daemon's. For a process with one thread (it forks). What can't be deleted is said on
    stderr and is no exception, which would hide the first one.
    """

    def __init__(self, socket: Path, cookie: int) -> None:
        self._socket = socket
        self._cookie = cookie
        self._pid = 0
        self._far = -1

    def __enter__(self) -> Self:
        sys.stdout.flush()
        sys.stderr.flush()
        near, self._far = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            self._serve(near)
        os.close(near)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._far)
        _, status = os.waitpid(self._pid, 0)
        if status:
            try:
                delete_ports(self._socket, self._cookie)
            except PortwrightError as error:
                sys.stderr.write(f"portwright: the guest's ports are left (portwright port list): {error}\n")

    def _serve(self, near: int) -> NoReturn:
        """The guard, from its first line to its last."""
        status = 1
        try:
            os.setsid()  # a signal for our group is not for the guard
            for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(ignored, signal.SIG_IGN)
            # All but the pipe: the namespace's, which would keep it, and what somebody reads to its end.
            nothing = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(nothing, number)
            os.closerange(3, near)
            os.closerange(near + 1, os.sysconf("SC_OPEN_MAX"))
            os.read(near, 1)
            delete_ports(self._socket, self._cookie)
            status = 0
        finally:
            os._exit(status)
