"""QEMU in a jail (portwright.jail): what it needs there besides what it is handed, and the start."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from portwright.jail.launch import start
from portwright.jail.process import Jailed
from portwright.jail.spec import NOBODY, File, Jail
from portwright.kernel.cgroup import Cgroup

_PROGRAM: Final = "qemu-system-x86_64"
#: Below the prefix that the program is installed with: firmware, and the accelerator where it is a module.
_FIRMWARE: Final = ("share/qemu", "share/seabios")
_MODULES: Final = ("lib/x86_64-linux-gnu/qemu", "lib64/qemu", "lib/qemu")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """How a guest's QEMU is jailed; names as :class:`portwright.jail.Jail` has them."""

    uid: int = NOBODY
    gid: int = NOBODY
    cgroup: Mapping[str, str] = field(default_factory=dict)
    cgroup_parent: str = ""
    rlimits: Mapping[str, int] = field(default_factory=dict)

    def check(self) -> None:
        """Raises InvalidInput for what no jail can have."""
        self.jail("/bin/true").check()
        Cgroup("none", self.cgroup, self.cgroup_parent)

    def jail(self, *command: str, files: Sequence[File] = (), devices: Sequence[str] = ()) -> Jail:
        """The jail of that command."""
        return Jail(
            command=command,
            uid=self.uid,
            gid=self.gid,
            files=files,
            devices=devices,
            cgroup=self.cgroup,
            cgroup_parent=self.cgroup_parent,
            rlimits=self.rlimits,
            hostname="qemu",
        )


def spawn(
    cell: Cell,
    args: Sequence[str],
    netns_fd: int,
    *,
    read: Sequence[str],
    write: Sequence[str],
    stdio: tuple[int, int, int],
    fds: Sequence[int],
) -> Jailed:
    """QEMU with ``args`` in a jail that has the files ``read`` and ``write``, and /dev/kvm if it uses that.

    Raises what :func:`portwright.jail.launch` does; then there is nothing.
    """
    program = os.path.abspath(shutil.which(_PROGRAM) or _PROGRAM)  # noqa: PTH100 - links stay
    files = {path: File(path) for path in (*_installed(program), *filter(None, read))}
    files |= {path: File(path, writable=True) for path in filter(None, write)}
    devices = ("/dev/kvm",) if "kvm" in args else ()
    jail = cell.jail(program, *args, files=tuple(files.values()), devices=devices)
    stdin, stdout, stderr = stdio
    return start(jail, netns_fd, fds=fds, stdin=stdin, stdout=stdout, stderr=stderr)


def _installed(program: str) -> list[str]:
    prefix = Path(program).parent.parent
    folders = [str(prefix / name) for name in _FIRMWARE if (prefix / name).is_dir()]
    modules = [str(path) for name in _MODULES for path in sorted((prefix / name).glob("accel-*-x86_64.so"))]
    return [*folders, *modules]
