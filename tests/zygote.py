"""Starts of ``portwright`` without its exec and imports: for the lab, where these two take most of a start.

Under emulation a start takes two to four seconds, of which the daemon's own work is a tenth. So one
process (:func:`serve`, ``python -m tests.zygote``) imports what every start imports, and forks for each:
the child gets its own environment, arguments, standard streams and network namespace, and calls the same
``main()``. What a test sees of it differs in three ways only: its command line is the zygote's, its
parent is the zygote, and modules that Portwright imports late are there already.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

_CLONE_NEWNET = 0x40000000
_LARGEST = 1 << 20  # bytes of a request: arguments and environment


class Process(Protocol):
    """What tests need of a process that they started; subprocess.Popen has it too."""

    @property
    def pid(self) -> int:
        """Its number, not given to another before its end has been asked for."""

    @property
    def returncode(self) -> int | None:
        """As of the last look: its exit status, -N if signal N ended it, None while it runs."""

    def poll(self) -> int | None:
        """Look whether it has ended; ``returncode``."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired after ``timeout`` seconds."""

    def send_signal(self, sig: int) -> None:
        """Send a signal, unless its end is known."""

    def kill(self) -> None:
        """SIGKILL."""


class _Forked:
    """A process that the zygote forked."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self._zygote = zygote
        self._handle = os.pidfd_open(pid)  # the zygote reaps it only when we say so
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            poller = select.poll()
            poller.register(self._handle, select.POLLIN)
            if not poller.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired(["portwright"], timeout or 0)
            self.returncode = self._zygote.ask({"reap": self.pid})
            os.close(self._handle)
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Zygote:
    """The zygote's process, started at the first use. Threads may share it."""

    def __init__(self) -> None:
        """Nothing is started yet."""
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self, netns: str, arguments: Sequence[str], env: Mapping[str, str], stdout: int, stderr: int
    ) -> Process:
        """``portwright ARGUMENTS`` in the network namespace at the path; descriptors stay the caller's."""
        inside = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            request = {"arguments": list(arguments), "env": dict(env)}
            return _Forked(self, self.ask(request, (inside, stdout, stderr)))
        finally:
            os.close(inside)

    def ask(self, request: Mapping[str, object], fds: Sequence[int] = ()) -> int:
        """Send one request; its answer. Raises EOFError if the zygote has died."""
        with self._lock:
            link = self._socket or self._begin()
            socket.send_fds(link, [json.dumps(request).encode()], fds)
            answer = link.recv(64)
        if not answer:
            raise EOFError("the zygote has died")
        return int(answer)

    def _begin(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LARGEST)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.zygote", str(theirs.fileno())],
                cwd=Path(__file__).parents[1],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._socket = ours
        return ours

    def close(self) -> None:
        """End it. Those that it forked go on."""
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.wait(60)
            self._socket = None


def serve(link: socket.socket) -> None:
    """Import, then fork for each request, until the other side closes. Returns in no child."""
    for package in ("portwright.cli", "portwright.daemon"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")
    gc.freeze()  # a child's collections must not touch, and so copy, what all share
    while True:
        data, fds, _, _ = socket.recv_fds(link, _LARGEST, 3)
        if not data:
            return
        request = json.loads(data)
        if "reap" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                link.close()
                _become(request["arguments"], request["env"], *fds)
        for fd in fds:
            os.close(fd)
        link.send(str(answer).encode())


def _become(arguments: Sequence[str], env: Mapping[str, str], inside: int, stdout: int, stderr: int) -> None:
    """Be ``portwright``. Ends in SystemExit, which ends the interpreter as it does after an exec."""
    if ctypes.CDLL(None, use_errno=True).setns(inside, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for fd in {inside, stdout, stderr}:
        os.close(fd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["portwright", *arguments]
    main = importlib.import_module("portwright.cli.main").main
    sys.exit(main())


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
