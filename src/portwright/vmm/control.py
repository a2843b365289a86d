"""The control sockets of running guests: their folder below the run directory, and who asks there.

``<run dir>/vm/<name>.sock`` is there while the guest's ``vm run`` is. What was killed leaves a path that
nobody listens on: the guard removes it, or else whoever looks into the folder next. Everything that makes or
removes a path holds the folder's lock, so nobody takes for stale what is just being made.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeVar

from portwright.api.aio import AsyncClient
from portwright.api.calls import Call
from portwright.api.client import unavailable
from portwright.api.errors import ConnectionLost, RequestTimeout
from portwright.model.errors import Conflict, DaemonUnavailable, InvalidInput, NotFound, PortwrightError
from portwright.vmm.contract import GuestLost, ShowParams, Started

R = TypeVar("R")
#: Bytes of a Unix socket's path (unix(7)), and guests that wait in a socket's backlog.
_LONGEST, _BACKLOG = 107, 16
_SUFFIX: Final = ".sock"
#: Seconds that a guest has to say what it is.
_SHOW_WITHIN: Final = 5.0


def folder(run_dir: Path) -> Path:
    """Where the sockets are."""
    return run_dir / "vm"


def path(run_dir: Path, name: str) -> Path:
    """The socket of the guest of that name."""
    return folder(run_dir) / f"{name}{_SUFFIX}"


@contextlib.contextmanager
def claimed(run_dir: Path, name: str) -> Iterator[socket.socket]:
    """Listen at the guest's path; at the end the path is gone, and the socket closed.

    Raises Conflict where a guest of that name runs, InvalidInput where the path is too long for a socket.
    """
    where = path(run_dir, name)
    if len(os.fsencode(where)) > _LONGEST:
        why = f"with it {where} is longer than a Unix socket's {_LONGEST} bytes; use a shorter one"
        raise InvalidInput("name", name, why)
    try:
        where.parent.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError as error:
        raise unavailable(run_dir / "portwright.sock", error) from None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        with _locked(where.parent):
            if not _swept(where):
                raise Conflict("guest", name, "is running; choose another --name")
            # bind() gives the file the mode of the socket's inode, less the umask: never wider.
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(str(where))
            listener.listen(_BACKLOG)
        try:
            yield listener
        finally:
            with _locked(where.parent):
                listener.close()
                _swept(where)


def sweep(run_dir: Path, name: str) -> None:
    """Remove the guest's path if nobody listens on it."""
    where = path(run_dir, name)
    if where.parent.is_dir():
        with _locked(where.parent):
            _swept(where)


def names(run_dir: Path) -> list[str]:
    """The guests that run, sorted; the paths of others are removed."""
    where = folder(run_dir)
    try:
        with _locked(where):
            found = [one for one in where.iterdir() if one.name.endswith(_SUFFIX) and not _swept(one)]
    except FileNotFoundError:
        return []
    except PermissionError as error:
        raise unavailable(where, error) from None
    return sorted(one.name.removesuffix(_SUFFIX) for one in found)


async def ask(run_dir: Path, name: str, call: Call[R], *, within: float) -> R:
    """Ask the guest of that name, ``within`` so many seconds. Raises NotFound, and what it answers."""
    if path(run_dir, name).parent != folder(run_dir):  # a name is no path
        raise NotFound("guest", name)
    return await _asked(run_dir, name, call, within)


async def _asked(run_dir: Path, name: str, call: Call[R], within: float) -> R:
    where = path(run_dir, name)
    try:
        async with AsyncClient(where, timeout=within) as client:
            return await client.call(call)
    # The guest may say the same of the daemon, and then it stands.
    except DaemonUnavailable as error:
        if error.socket != str(where):
            raise
        raise NotFound("guest", name) from None
    except ConnectionLost as error:
        if error.method != call.method:
            raise
        raise GuestLost(name, call.method, error.why) from None
    except RequestTimeout as error:
        if error.method != call.method:
            raise
        why = f"within {within:g} s; is its vm run stopped?"
        raise GuestLost(name, call.method, why) from None


async def show_all(run_dir: Path) -> tuple[list[Started], list[str]]:
    """What every guest says of itself, and a sentence for each that does not answer."""
    call = Call("vm.show", ShowParams(), Started)
    running = names(run_dir)
    asked = [_asked(run_dir, name, call, _SHOW_WITHIN) for name in running]
    said = await asyncio.gather(*asked, return_exceptions=True)
    guests, problems = [], []
    for answer in said:
        if isinstance(answer, Started):
            guests.append(answer)
        elif isinstance(answer, PortwrightError):
            if not isinstance(answer, NotFound):  # it ended meanwhile
                problems.append(str(answer))
        else:
            raise answer
    return guests, problems


@contextlib.contextmanager
def _locked(where: Path) -> Iterator[None]:
    fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _swept(where: Path) -> bool:
    """Whether there is nothing at the path now. What is no socket, or is listened on, stays."""
    try:
        if not stat.S_ISSOCK(where.lstat().st_mode):
            return False
    except FileNotFoundError:
        return True
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(where))
        except ConnectionRefusedError:
            where.unlink()
            return True
        except BlockingIOError:
            pass  # listened on, with a full backlog
    return False
