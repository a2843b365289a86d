"""Cgroups for one process and its children: version 1, version 2, and both on one host.

A controller is bound to one of them, so a limit's file says where it goes: ``memory.max`` needs ``memory`` in
version 2, ``memory.limit_in_bytes`` in version 1. The two that everybody sets, ``memory.max``
and ``cpu.max``, are taken for version 1 too.

A group of ours has a lock on its folder as long as its owner lives. One without is left from an owner that
was killed together with its guard, and is removed by whoever makes the next one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from portwright.model.errors import InvalidInput, KernelFailed

PREFIX: Final = "portwright-jail-"
_FILE: Final = re.compile(r"([a-z0-9_]+)(\.[A-Za-z0-9_-]+)+")
_FOREVER: Final = -1  # version 1's "no limit"
#: Seconds until the processes of a group that is removed have gone.
_GONE_WITHIN, _PAUSE = 10.0, 0.005
_CPUSET: Final = ("cpuset.cpus", "cpuset.mems")


@dataclass(frozen=True)
class Hierarchy:
    """A mounted one. ``controllers``: of version 2 those that its root may hand down."""

    path: Path
    version: int
    controllers: frozenset[str]


def hierarchies() -> tuple[Hierarchy, ...]:
    """Those that are mounted where this process sees them."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # "36 32 0:33 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory" (proc(5))
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        path = Path(before.split(" ")[4])
        if kind == "cgroup":
            found.append(Hierarchy(path, 1, frozenset(options.split(","))))
        elif kind == "cgroup2":
            with contextlib.suppress(OSError):
                names = (path / "cgroup.controllers").read_text().split()
                found.append(Hierarchy(path, 2, frozenset(names)))
    return tuple(found)


class Cgroup:
    """The groups of one jail: a folder in each hierarchy that its limits need, ``name`` in all of them.

    ``parent``: below which group, from each hierarchy's root. Raises InvalidInput (field ``cgroup``) for a
    limit that this host doesn't have or take; then there is no group.
    """

    def __init__(self, name: str, limits: Mapping[str, str], parent: str = "") -> None:
        self.name = PREFIX + name
        self._locks: list[int] = []
        self.folders: list[Path] = []
        all_of_them = hierarchies()
        self._plan: dict[Path, list[tuple[str, str]]] = {}
        for file, value in limits.items():
            folder, writes = _place(all_of_them, file, value, parent)
            self._plan.setdefault(folder / self.name, []).extend(writes)
        self.folders = list(self._plan)

    def make(self) -> None:
        """Make the folders and write the limits. Undone by :meth:`remove`, in every state."""
        for folder, writes in self._plan.items():
            sweep(folder.parent)
            self._locks.append(_made(folder))
            for file in _CPUSET:
                # Version 1 takes no process into a group whose CPUs and memory nobody has named.
                if (folder / file).exists() and not (folder / file).read_text().strip():
                    _write(folder, file, (folder.parent / file).read_text().strip())
            for file, value in writes:
                _write(folder, file, value)

    def add(self, pid: int) -> None:
        """Take a process in; its children to come are in, too."""
        for folder in self.folders:
            try:
                (folder / "cgroup.procs").write_text(str(pid))
            except OSError as error:
                raise KernelFailed(
                    error.errno or 0, f"{folder}/cgroup.procs", "taking the jail in"
                ) from error

    def remove(self) -> None:
        """End what is left in the groups, and remove them. Raises KernelFailed EBUSY if it does not go."""
        for folder in self.folders:
            remove(folder)
        self.let_go()

    def let_go(self) -> None:
        """Close the locks: of a process that owns the groups no more."""
        for lock in self._locks:
            os.close(lock)
        self._locks.clear()


def remove(folder: Path) -> None:
    """Remove a group with all that is in it; one that is gone is no error."""
    deadline = time.monotonic() + _GONE_WITHIN
    while True:
        with contextlib.suppress(OSError):
            (folder / "cgroup.kill").write_text("1")  # version 2, since Linux 5.14
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise KernelFailed(error.errno or 0, f"rmdir {folder}") from error
        time.sleep(_PAUSE)


def sweep(parent: Path) -> None:
    """Remove the groups of jails below ``parent`` that nobody owns any more."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                folder.rmdir()
            finally:
                os.close(lock)


def _made(folder: Path) -> int:
    """Make the folder; the lock on it, which says that it is owned."""
    while True:
        try:
            folder.mkdir(mode=0o755)
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            if not folder.parent.is_dir():
                raise InvalidInput("cgroup-parent", str(folder.parent), "there is no such cgroup") from None
            continue  # swept between the two calls
        except OSError as error:
            raise KernelFailed(error.errno or 0, f"mkdir {folder}") from error
        fcntl.flock(lock, fcntl.LOCK_SH)
        if folder.exists():
            return lock
        os.close(lock)  # swept just before the lock


def _place(
    there: tuple[Hierarchy, ...], file: str, value: str, parent: str
) -> tuple[Path, list[tuple[str, str]]]:
    """The folder below which a limit's group has to be, and what is written there."""
    whole = f"{file}={value}"
    matched = _FILE.fullmatch(file)
    if matched is None or matched[1] == "cgroup" or not value.strip() or "\n" in value:
        raise InvalidInput("cgroup", whole, "write it as FILE=VALUE, such as memory.max=256M or pids.max=64")
    controller = matched[1]
    for found in there:
        if controller in found.controllers:
            break
    else:
        names = sorted(set().union(*(found.controllers for found in there)) - {"rw"})
        raise InvalidInput("cgroup", whole, f"no controller {controller} here; there are {', '.join(names)}")
    folder = found.path / parent.strip("/")
    if found.version == 1:
        return folder, _first_version(file, value)
    try:
        enabled = (folder / "cgroup.subtree_control").read_text().split()
    except OSError:
        raise InvalidInput("cgroup-parent", parent, f"there is no such cgroup in {found.path}") from None
    if controller not in enabled:
        way = f"echo +{controller} >{folder}/cgroup.subtree_control, or name another --cgroup-parent"
        raise InvalidInput("cgroup", whole, f"{controller} is not enabled below {folder}: {way}")
    return folder, [(file, value)]


def _first_version(file: str, value: str) -> list[tuple[str, str]]:
    """What a limit in version 2's words is in version 1's; others are as they are."""
    if file == "memory.max":
        return [("memory.limit_in_bytes", str(_FOREVER) if value == "max" else value)]
    if file == "cpu.max":
        quota, _, period = value.partition(" ")
        quota = str(_FOREVER) if quota == "max" else quota
        return [("cpu.cfs_period_us", period or "100000"), ("cpu.cfs_quota_us", quota)]
    return [(file, value)]


def _write(folder: Path, file: str, value: str) -> None:
    try:
        # Not created where there is none: the file system would answer that with EPERM.
        fd = os.open(folder / file, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        kind = file.partition(".")[0]
        names = ", ".join(sorted(path.name for path in folder.glob(f"{kind}.*")))
        raise InvalidInput("cgroup", f"{file}={value}", f"no such file; there are {names}") from None
    except OSError as error:
        raise InvalidInput("cgroup", f"{file}={value}", f"can't be set: {error.strerror}") from error
    try:
        os.write(fd, value.encode())
    except OSError as error:
        raise InvalidInput("cgroup", f"{file}={value}", f"the kernel refuses it: {error.strerror}") from error
    finally:
        os.close(fd)
