"""What runs in a jail of ours: its first process, and the command up to its execution.

The first process (of a pid namespace) makes the jail around itself, starts the command, gives up its own
privileges, and waits. It ends with the command, and every other process in the jail with it, daemons too. It
is root without a capability, can't be traced, and has no descriptor but the pipe that it says the end on.

Both are forks of ours, so everything that they need is imported and read before: there is nothing to import
from in the jail.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from portwright.jail.filter import Filter
from portwright.jail.spec import RLIMITS, USUAL_RLIMITS
from portwright.jail.tree import Builder, Tree
from portwright.kernel import confine
from portwright.model.errors import InvalidInput, KernelFailed

#: What the starter and the jail say to each other.
GO: Final = b"go"
READY: Final = b"ready"  # the command, which waits
BARE: Final = b"bare"  # the first process, which has given up its privileges
STATUS: Final = struct.Struct("=i")
#: Exit status of a command that never was.
_NOT_STARTED: Final = 125
_MAX_ERROR: Final = 4096


@dataclass(frozen=True)
class Plan:
    """What the processes in the jail need. ``stdio``: three descriptors; ``fds`` keep their numbers."""

    tree: Tree
    filter: Filter | None
    netns: int
    stdio: tuple[int, int, int]
    fds: Sequence[int]
    last_capability: int


def first(plan: Plan, channel: socket.socket, end: int) -> NoReturn:
    """The first process. On ``channel`` it is told to go on, and says why it can't; ``end``: see above."""
    try:
        signal.set_wakeup_fd(-1)
        # By default the first process of a namespace ignores all but SIGKILL and SIGSTOP from outside.
        _default_signals()
        if channel.recv(len(GO)) != GO:
            os._exit(_NOT_STARTED)  # whoever started us is gone
        confine.hide()
        os.setsid()
        confine.enter_netns(plan.netns)
        namespaces = confine.CLONE_NEWIPC | confine.CLONE_NEWUTS | confine.CLONE_NEWCGROUP
        confine.unshare(namespaces | confine.CLONE_NEWNS)
        socket.sethostname(plan.tree.jail.hostname)
        Builder(plan.tree).enter()
        channel, end = _arrange(plan, channel, end)
        command = os.fork()
        if not command:
            _command(plan, channel)
        confine.close_bounds(plan.last_capability)
        confine.drop_capabilities()
        channel.send(BARE)
    except BaseException as error:  # noqa: BLE001 - it is told to the starter, who raises it
        _fail(channel, error)
    _wait(command, end)


def _arrange(plan: Plan, channel: socket.socket, end: int) -> tuple[socket.socket, int]:
    """Close all descriptors but those that are meant, and put these where they belong."""
    low = max([*plan.fds, 2]) + 1
    held = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, low) for fd in plan.stdio]
    channel_fd, end = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, low) for fd in (channel.detach(), end))
    for number, fd in enumerate(held):
        os.dup2(fd, number)
    keep = sorted({0, 1, 2, *plan.fds, channel_fd, end})
    for one, other in zip(keep, [*keep[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(one + 1, other)
    for fd in plan.fds:
        os.set_inheritable(fd, True)
    return socket.socket(fileno=channel_fd), end


def _command(plan: Plan, channel: socket.socket) -> NoReturn:
    """The command's process, up to its execution."""
    try:
        jail = plan.tree.jail
        os.setsid()
        os.umask(0o077)
        confine.new_session_keyring()
        _limit({**USUAL_RLIMITS, **jail.rlimits})
        confine.close_bounds(plan.last_capability)
        os.setgroups([])
        os.setresgid(jail.gid, jail.gid, jail.gid)
        os.setresuid(jail.uid, jail.uid, jail.uid)
        confine.drop_capabilities()
        channel.send(READY)  # with our number, which the kernel adds
        if channel.recv(len(GO)) != GO:
            os._exit(_NOT_STARTED)
        if plan.filter is not None:
            plan.filter.load()
        try:
            os.execve(jail.command[0], list(jail.command), dict(jail.environment))  # noqa: S606 - on purpose
        except OSError as error:
            raise KernelFailed(error.errno or 0, f"exec {jail.command[0]}") from error
    except BaseException as error:  # noqa: BLE001 - see first()
        _fail(channel, error)


def _default_signals() -> None:
    """All of them do what they do by default, which outlives an execution; none is blocked."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _limit(limits: dict[str, int]) -> None:
    for name, limit in limits.items():
        try:
            resource.setrlimit(RLIMITS[name], (limit, limit))
        except (OSError, ValueError) as error:
            why = f"the kernel refuses it: {error}"
            raise InvalidInput("rlimit", f"{name}={limit}", why) from error


def _fail(channel: socket.socket, error: BaseException) -> NoReturn:
    try:
        if isinstance(error, InvalidInput):
            said: dict[str, object] = {"field": error.field, "value": error.value, "why": error.why}
        elif isinstance(error, KernelFailed):
            said = {"errno": error.errno, "what": error.what, "detail": error.detail}
        elif isinstance(error, OSError):
            said = {"errno": error.errno or 0, "what": "jail", "detail": str(error)[:_MAX_ERROR]}
        else:
            said = {"errno": 0, "what": "jail", "detail": repr(error)[:_MAX_ERROR]}
        channel.send(json.dumps(said).encode())
    finally:
        os._exit(_NOT_STARTED)


def _wait(command: int, end: int) -> NoReturn:
    """Wait for the command's end and say how it was. Orphans of the jail are ours to wait for as well."""
    status = 0
    try:
        os.closerange(0, end)
        os.closerange(end + 1, os.sysconf("SC_OPEN_MAX"))
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == command:
                break
        os.write(end, STATUS.pack(status))
    finally:
        os._exit(0)
