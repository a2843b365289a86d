"""Starting a jail: everything that can be refused is looked at first, and then it is made in one go."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import struct
from collections.abc import Sequence
from typing import Final

from portwright.jail import inside, tree
from portwright.jail.filter import build
from portwright.jail.guard import Guard
from portwright.jail.process import Jailed
from portwright.jail.spec import Jail
from portwright.kernel import confine
from portwright.kernel.cgroup import Cgroup
from portwright.model.errors import InvalidInput, KernelFailed, NotSupported

#: Seconds that a jail has to be made in: a disk may be slow, or a file system away.
_MADE_WITHIN: Final = 60.0
_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid (unix(7))
_MESSAGE: Final = 8192


def start(
    jail: Jail, netns_fd: int, *, fds: Sequence[int] = (), stdin: int = 0, stdout: int = 1, stderr: int = 2
) -> Jailed:
    """Start the jail's command in the network namespace behind ``netns_fd``; it has been executed on return.

    ``fds`` are handed over, and keep their numbers; all others are closed. Everything stays the caller's.
    When the calling thread ends, by SIGKILL too, every process in the jail ends, and nothing is left. For
    root, in a process with one thread. Raises InvalidInput, NotFound, NotSupported and KernelFailed; then
    there is nothing.
    """
    jail.check()
    check_descriptors(fds, (stdin, stdout, stderr))
    if os.geteuid() != 0:
        raise KernelFailed(errno.EPERM, "jail", "it needs root, and gives it up inside")
    try:
        made = tree.plan(jail)
    except ImportError:
        raise NotSupported(
            "jail", "finding libraries", "pip install 'portwright[jail]' (pyelftools)"
        ) from None
    plan = inside.Plan(
        tree=made,
        filter=build(jail.allow) if jail.seccomp else None,
        netns=netns_fd,
        stdio=(stdin, stdout, stderr),
        fds=tuple(dict.fromkeys(fds)),
        last_capability=confine.last_capability(),
    )
    group = Cgroup(f"{os.getpid()}-{os.urandom(4).hex()}", jail.cgroup, jail.cgroup_parent)
    with contextlib.ExitStack() as held:
        if group.folders:
            held.enter_context(Guard(group.remove, f"the cgroup {group.name} is left"))
            held.callback(group.let_go)
            group.make()
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with near, far:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            near.settimeout(_MADE_WITHIN)
            end, theirs = os.pipe()
            try:
                pid = confine.fork_first()
            except BaseException:
                os.close(end)
                os.close(theirs)
                raise
            if not pid:
                near.close()
                inside.first(plan, far, theirs)
            os.close(theirs)
            far.close()
            # Whatever happens from here on, the first process is ended and waited for before the cgroups go.
            jailed = Jailed(pid, end, held.pop_all())
            try:
                group.add(pid)
                _execute(near, jailed)
            except BaseException:
                jailed.kill()
                jailed.wait()
                raise
    return jailed


def check_descriptors(fds: Sequence[int], stdio: Sequence[int]) -> None:
    """Raises InvalidInput (field ``fd``) for one that isn't open, or would be a way out of the jail."""
    for fd in (*stdio, *fds):
        try:
            status = os.fstat(fd)
        except OSError:
            raise InvalidInput("fd", fd, "is not open") from None
        if stat.S_ISDIR(status.st_mode):
            raise InvalidInput("fd", fd, "a directory would be a way out of the jail; use --file")
    for fd in fds:
        if fd < 3:
            raise InvalidInput("fd", fd, "stdin, stdout and stderr are there anyway")


def _execute(near: socket.socket, jailed: Jailed) -> None:
    """Let the jail be made and the command be executed, and wait until it is. Raises what went wrong."""
    try:
        _talk(near, jailed)
    except TimeoutError:
        raise KernelFailed(errno.ETIMEDOUT, "jail", f"not made in {_MADE_WITHIN:g} s") from None
    except (BrokenPipeError, ConnectionResetError):
        raise KernelFailed(errno.ESRCH, "jail", "it was killed while it was made") from None


def _talk(near: socket.socket, jailed: Jailed) -> None:
    near.send(inside.GO)
    awaited = {inside.READY, inside.BARE}
    while True:
        data, ancillary, _, _ = near.recvmsg(_MESSAGE, socket.CMSG_SPACE(_CREDENTIALS.size))
        if data in awaited:
            for level, kind, sent in ancillary:
                if data == inside.READY and (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    jailed.met(_CREDENTIALS.unpack(sent[: _CREDENTIALS.size])[0])
            awaited.remove(data)
            if not awaited:
                near.send(inside.GO)
        elif data:
            _raise(json.loads(data))
        elif not awaited:
            return
        else:
            raise ConnectionResetError


def _raise(said: dict[str, object]) -> None:
    if "field" in said:
        raise InvalidInput(str(said["field"]), said["value"], str(said["why"]))
    number = said["errno"]
    assert isinstance(number, int)  # noqa: S101 - our own process wrote it, before it gave anything up
    raise KernelFailed(number, str(said["what"]), str(said["detail"]))
