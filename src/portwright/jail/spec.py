"""What a jail is, as a value. Nothing is opened but what its files are."""

from __future__ import annotations

import os
import posixpath
import re
import resource
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from portwright.model.errors import InvalidInput

#: Nobody's, by convention. A user of its own for each jail is better: see docs/jail.md.
NOBODY: Final = 65534
#: The largest user id: the one above means "leave it as it is" to the kernel.
MAX_ID: Final = 2**32 - 2
MAX_TMP: Final = 1 << 20  # MiB
MAX_FILES: Final = 1000
#: In every jail: they lead nowhere.
USUAL_DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/urandom")
#: As Firecracker's jailer has it for descriptors; a core dump would be the guest's memory. Of 1 byte, since 0
#: doesn't hold back one that goes to a program (fs/coredump.c).
USUAL_RLIMITS: Final = {"core": 1, "nofile": 2048}
RLIMITS: Final = {
    name.removeprefix("RLIMIT_").lower(): getattr(resource, name)
    for name in dir(resource)
    if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"
}
_HOSTNAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class File:
    """A file, directory, socket or FIFO of the host at ``inside`` in the jail; to be read, unless it is said.

    What executes there is the same file, not a copy. Of a directory, what is mounted below it is left out.
    """

    host: str
    inside: str = ""
    writable: bool = False

    @property
    def place(self) -> str:
        """Where it is in the jail."""
        return self.inside or self.host


@dataclass(frozen=True, kw_only=True)
class Jail:
    """A command, and what it has in its jail: nothing else of the host.

    ``command``: its program, an absolute path on the host and inside, and the arguments. ``uid``, ``gid``:
    whose it is; no other group. ``files``: besides the program and its libraries (and those of each
    executable or library in ``files``). ``devices``: nodes of the host, the command's own. ``environment``:
    all of it. ``cgroup``: files and values, below ``cgroup_parent``. ``rlimits``: names as ``nofile``, soft
    and hard. ``tmp``: MiB of memory that /tmp may take; there is none with 0. ``proc``: a /proc with the
    jail's processes and nothing else. ``allow``: system calls that the filter is to let pass.
    """

    command: Sequence[str]
    uid: int = NOBODY
    gid: int = NOBODY
    files: Sequence[File] = ()
    devices: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    cgroup: Mapping[str, str] = field(default_factory=dict)
    cgroup_parent: str = ""
    rlimits: Mapping[str, int] = field(default_factory=dict)
    hostname: str = "jail"
    tmp: int = 0
    proc: bool = False
    seccomp: bool = True
    allow: Sequence[str] = ()

    def check(self) -> None:
        """Raises InvalidInput for what can't be a jail, naming the field, the value and the way out."""
        if not self.command:
            raise InvalidInput("command", "", "name a program")
        if any("\0" in word for word in self.command):
            raise InvalidInput("command", self.command[0], "a word with a zero byte can't be passed on")
        _absolute("command", self.command[0])
        for name, number in (("uid", self.uid), ("gid", self.gid)):
            if not 0 <= number <= MAX_ID:
                raise InvalidInput(name, number, f"a number from 0 to {MAX_ID}")
        if len(self.files) > MAX_FILES:
            raise InvalidInput("files", len(self.files), f"at most {MAX_FILES}; name a directory for several")
        for file in self.files:
            _absolute("file", file.place)
        for device in self.devices:
            _check_device(device)
        for name in self.environment:
            if not _VARIABLE.fullmatch(name) or "\0" in self.environment[name]:
                raise InvalidInput("env", name, "letters, digits and _, no digit first")
        for name, limit in self.rlimits.items():
            if name not in RLIMITS:
                raise InvalidInput("rlimit", name, f"there are {', '.join(sorted(RLIMITS))}")
            if not -1 <= limit < 2**63:
                raise InvalidInput("rlimit", f"{name}={limit}", "a number, or -1 for none")
        if not _HOSTNAME.fullmatch(self.hostname):
            raise InvalidInput("hostname", self.hostname, "1 to 63 letters, digits and -, no sign first")
        if not 0 <= self.tmp <= MAX_TMP:
            raise InvalidInput("tmp", self.tmp, f"0 to {MAX_TMP} MiB")
        if self.allow and not self.seccomp:
            raise InvalidInput("allow", self.allow[0], "there is no filter to let it pass")


def _absolute(field: str, path: str) -> None:
    if not path.startswith("/") or posixpath.normpath(path) != path or path in {"/", "//"} or "\0" in path:
        raise InvalidInput(field, path, "an absolute path, without . or .., other than /")


def _check_device(path: str) -> None:
    _absolute("device", path)
    if not path.startswith("/dev/"):
        raise InvalidInput("device", path, "a device below /dev, such as /dev/kvm")
    try:
        status = os.stat(path)  # noqa: PTH116 - a str is what all of this is about
    except OSError as error:
        raise InvalidInput("device", path, f"can't be had: {error.strerror}") from error
    if not stat.S_ISCHR(status.st_mode):
        raise InvalidInput("device", path, "not a character device; a disk goes in by --file or a descriptor")
