"""The file tree of a jail: what is where, worked out beforehand, and then made."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

from portwright.jail import libraries
from portwright.jail.spec import USUAL_DEVICES, File, Jail
from portwright.kernel import mounts
from portwright.model.errors import InvalidInput, KernelFailed, NotFound

#: The root below the mount that is pivoted to. It is entered by chroot: for who isn't at its mount
#: namespace's root the kernel makes no user namespace (create_user_ns, kernel/user_namespace.c).
_ROOT: Final = "root"
_SIZE, _INODES = "1M", "16384"  # of folders and empty files: all that a jail's own tree has
_READ: Final = mounts.READ_ONLY | mounts.NO_SUID | mounts.NO_DEV
_WRITE: Final = mounts.NO_SUID | mounts.NO_DEV | mounts.NO_EXEC


@dataclass(frozen=True)
class Tree:
    """``files`` by where they are in the jail; ``devices``: path and number."""

    jail: Jail
    files: tuple[File, ...]
    devices: tuple[tuple[str, int], ...] = field(default=())


def plan(jail: Jail) -> Tree:
    """What a checked jail's tree has. Raises NotFound and InvalidInput for what can't be in it."""
    program = jail.command[0]
    if not os.path.isfile(program):  # noqa: PTH113 - a str is what all of this is about
        raise NotFound("program", program)
    if not os.access(program, os.X_OK):
        raise InvalidInput("command", program, "not executable")
    needed = dict.fromkeys(libraries.of(program))
    for file in jail.files:
        if not os.path.lexists(file.host):
            raise NotFound("file", file.host)
        if os.path.isfile(file.host) and libraries.read(file.host) is not None:  # noqa: PTH113 - as above
            needed |= dict.fromkeys(libraries.of(file.host))
    if needed and os.path.isfile(libraries.CACHE):  # noqa: PTH113 - as above
        needed[libraries.CACHE] = None
    given = {file.place: file for file in jail.files}
    if len(given) != len(jail.files):
        twice = next(file for file in jail.files if given[file.place] is not file)
        raise InvalidInput("file", twice.place, "two files can't be at one place")
    for path in (program, *needed):
        if path not in given and not _covered(path, jail.files):
            given[path] = File(path)
    files = tuple(given[place] for place in sorted(given))
    _check(files, jail)
    devices = dict.fromkeys((*USUAL_DEVICES, *jail.devices))
    # A number, so that what is made is what was looked at.
    numbers = tuple((path, os.stat(path).st_rdev) for path in devices)  # noqa: PTH116 - as above
    return Tree(jail, files, numbers)


def _covered(path: str, files: Sequence[File]) -> bool:
    """Whether a directory that is given has the file at its place anyway."""
    for file in files:
        if path.startswith(f"{file.place}/"):
            return os.path.exists(file.host + path.removeprefix(file.place))  # noqa: PTH110 - as above
    return False


def _check(files: Sequence[File], jail: Jail) -> None:
    places = [file.place for file in files]
    ours = {"/dev": True, "/proc": jail.proc, "/tmp": bool(jail.tmp)}  # noqa: S108 - that of the jail
    for place in places:
        for folder in [folder for folder in ours if ours[folder]]:
            if place == folder or place.startswith(f"{folder}/"):
                raise InvalidInput("file", place, f"{folder} is the jail's own; name another place in it")
    taken = set(places)
    for place in places:
        for above in PurePosixPath(place).parents:
            if str(above) in taken:
                raise InvalidInput("file", place, f"{above} is a file of its own; name another place")


class Builder:
    """Makes the tree: for a process that is alone in a mount namespace of its own, and root in it."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._folders: set[str] = set()

    def enter(self) -> None:
        """Make it, and be in it: the host's files are gone. Raises KernelFailed, InvalidInput."""
        jail = self._tree.jail
        mounts.make_private()
        sizes = {"size": _SIZE, "nr_inodes": _INODES, "mode": "0755"}
        top = mounts.new("tmpfs", sizes, mounts.NO_SUID | mounts.NO_DEV)
        mounts.attach_over_root(top)
        os.mkdir(_ROOT, 0o755, dir_fd=top)
        root = os.open(_ROOT, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=top)
        for file in self._tree.files:
            self._bind(root, file)
        self._devices(root)
        if jail.proc:
            self._mount(root, "proc", "proc", {"subset": "pid", "hidepid": "invisible"}, _READ | _WRITE)
        if jail.tmp:
            options = {"size": f"{jail.tmp}M", "mode": "0700", "uid": str(jail.uid), "gid": str(jail.gid)}
            self._mount(root, "tmp", "tmpfs", options, _WRITE)
        mounts.pivot(top)
        mounts.change(top, mounts.READ_ONLY)
        os.chroot(_ROOT)
        os.chdir("/")
        os.close(root)
        os.close(top)

    def _bind(self, root: int, file: File) -> None:
        try:
            host = os.open(file.host, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            raise KernelFailed(error.errno or 0, f"open {file.host}") from error
        try:
            mode = os.fstat(host).st_mode
            if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                raise InvalidInput("file", file.host, "a device: --device makes its node in the jail")
            path = file.place.lstrip("/")
            self._folder(root, os.path.dirname(path))  # noqa: PTH120 - relative to a descriptor
            if stat.S_ISDIR(mode):
                os.mkdir(path, 0o755, dir_fd=root)
            else:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444, dir_fd=root))
            tree = mounts.clone(host, _WRITE if file.writable else _READ)
            mounts.attach(tree, root, path)
            os.close(tree)
        finally:
            os.close(host)

    def _devices(self, root: int) -> None:
        jail = self._tree.jail
        self._folder(root, "dev")
        tree = mounts.new(
            "tmpfs", {"size": _SIZE, "nr_inodes": "1024", "mode": "0755"}, _WRITE & ~mounts.NO_DEV
        )
        mounts.attach(tree, root, "dev")
        for path, number in self._tree.devices:
            relative = path.lstrip("/")
            self._folder(root, os.path.dirname(relative))  # noqa: PTH120 - relative to a descriptor
            try:
                os.mknod(relative, stat.S_IFCHR | 0o600, number, dir_fd=root)
            except OSError as error:
                raise KernelFailed(error.errno or 0, f"mknod {path}") from error
            os.chown(relative, jail.uid, jail.gid, dir_fd=root)
        mounts.change(tree, mounts.READ_ONLY)  # of a device's node this is not what decides
        os.close(tree)

    def _mount(self, root: int, place: str, kind: str, options: dict[str, str], attributes: int) -> None:
        os.mkdir(place, 0o755, dir_fd=root)
        tree = mounts.new(kind, options, attributes)
        mounts.attach(tree, root, place)
        os.close(tree)

    def _folder(self, root: int, path: str) -> None:
        """Make a folder with those above it."""
        if not path or path in self._folders:
            return
        self._folder(root, os.path.dirname(path))  # noqa: PTH120 - relative to a descriptor
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o755, dir_fd=root)
        self._folders.add(path)
