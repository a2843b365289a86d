"""A host of our own for a moment: namespaces, a daemon in them, and a process that asks it.

Three processes. The caller waits and reads what the second one says. The second one has new network and mount
namespaces, with a tmpfs over /run, and works there. The third is the daemon, which takes these namespaces for
the host. Nothing has a name outside: no link, mount, socket or file of the machine is touched, and each
process is killed with the one before it (``PR_SET_PDEATHSIG``), so that SIGKILL of the caller ends all of it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

from portwright.api.client import Client
from portwright.api.errors import WireError, error_from_wire, error_to_wire
from portwright.kernel import private
from portwright.kernel.signals import terminable
from portwright.live.ears import ProbeFailed

#: Hidden by a tmpfs of ours: of what is there on the machine, nothing is for us.
_HIDDEN = Path("/run")
RUN_DIR, STATE_DIR = _HIDDEN / "portwright-live", _HIDDEN / "portwright-live-state"
NOTIFY, _LOG = _HIDDEN / "portwright-live-notify", _HIDDEN / "portwright-live-log"
#: Seconds.
_START_WITHIN, _END_WITHIN, _CALL_WITHIN = 60.0, 10.0, 120.0

#: Told in words how far the work is.
Progress = Callable[[str], None]


class _Said(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line from inside: one of the three."""

    progress: str | None = None
    result: list[bool] | None = None
    error: WireError | None = None


def run(
    work: Callable[[Client, Progress], list[bool]], progress: Progress, node_name: str = ""
) -> list[bool]:
    """Call ``work`` inside a private host, with a client of its daemon; what it returns.

    ``node_name``: what HostEndpoints call that host.

    For a process with one thread. Raises what ``work`` raises, KernelFailed where the kernel refuses the
    namespaces (they need root), and ProbeFailed where a process inside ended by itself. Nothing is left then
    either, nor after SIGINT and SIGTERM.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    near, far = os.pipe()
    try:
        child = private.fork()
        if not child:
            os.close(near)
            _inside(work, far, node_name)
    except BaseException:
        os.close(near)
        raise
    finally:
        os.close(far)
    try:
        with terminable(signal.SIGTERM):
            return _follow(near, child, progress)
    finally:
        _end(child, near)


def _follow(near: int, child: int, progress: Progress) -> list[bool]:
    with os.fdopen(os.dup(near), "rb") as lines:
        for line in lines:
            said = msgspec.json.decode(line, type=_Said)
            if said.error is not None:
                raise error_from_wire(said.error)
            if said.result is not None:
                return said.result
            progress(said.progress or "")
    raise ProbeFailed("the private host", f"its process {child} ended before it was done")


def _end(child: int, near: int) -> None:
    """Kill it, and wait for the end of all that had the pipe: the daemon too."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + _END_WITHIN
    poller = select.poll()
    poller.register(near, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        if poller.poll(left * 1000) and not os.read(near, 65_536):
            break
    os.close(near)


# --- inside -------------------------------------------------------------------------------------


def _inside(work: Callable[[Client, Progress], list[bool]], far: int, node_name: str) -> NoReturn:
    """The second process, from its first line to its last."""
    status = 1
    try:
        os.setsid()  # ^C is for the caller, who ends us
        _say(far, _work(work, far, node_name))
        status = 0
    finally:
        os._exit(status)


def _work(work: Callable[[Client, Progress], list[bool]], far: int, node_name: str) -> _Said:
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
        private.leave(_HIDDEN)
        with _daemon(node_name), Client(RUN_DIR / "portwright.sock", timeout=_CALL_WITHIN) as client:
            return _Said(result=work(client, lambda text: _say(far, _Said(progress=text))))
    except Exception as error:  # noqa: BLE001 - the caller raises it again
        return _Said(error=msgspec.convert(error_to_wire(error), WireError))


def _say(far: int, said: _Said) -> None:
    line = msgspec.json.encode(said) + b"\n"
    while line:
        line = line[os.write(far, line) :]


@contextlib.contextmanager
def _daemon(node_name: str) -> Iterator[None]:
    """A started daemon, and at the end none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
        notify.bind(str(NOTIFY))
        child = private.fork()
        if not child:
            _serve(node_name)
        handle = os.pidfd_open(child)
        try:
            _await_ready(notify, handle)
            yield
        finally:
            os.close(handle)
            os.kill(child, signal.SIGKILL)  # all that it would clean up goes with its namespaces
            os.waitpid(child, 0)


def _await_ready(notify: socket.socket, handle: int) -> None:
    poller = select.poll()
    poller.register(notify, select.POLLIN)
    poller.register(handle, select.POLLIN)
    deadline = time.monotonic() + _START_WITHIN
    while (left := deadline - time.monotonic()) > 0:
        ready = {fd for fd, _ in poller.poll(left * 1000)}
        if notify.fileno() in ready and b"READY=1" in notify.recv(4096):
            return
        if handle in ready:
            break
    told = _LOG.read_text(errors="replace").strip().splitlines()[-1:]
    raise ProbeFailed("the private host", f"its daemon did not start: {''.join(told) or 'it said nothing'}")


def _serve(node_name: str) -> NoReturn:
    """The third process: `portwright node run`, of which nobody outside can tell."""
    status = 1
    try:
        out = os.open(_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        for name in list(os.environ):
            if name.startswith(("PORTWRIGHT_", "LISTEN_")):
                del os.environ[name]
        os.environ["NOTIFY_SOCKET"] = str(NOTIFY)
        from portwright.daemon.main import main  # noqa: PLC0415 - of no use to the other two processes

        status = main(state_dir=STATE_DIR, run_dir=RUN_DIR, node_name=node_name)
    finally:
        os._exit(status)
