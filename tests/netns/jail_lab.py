"""A hostile program in a jail: Python, which tries what it is told to and says how that went."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

from portwright.jail import libraries
from portwright.kernel import cgroup
from tests.deadline import PATIENCE
from tests.fix_daemon import LAB, PORTWRIGHT

PYTHON = os.path.realpath(sys.executable)
#: What every attempt has at hand. ``tried`` says the error's name, or "done" with what was returned.
PREAMBLE = """
import ctypes, errno, fcntl, os, resource, signal, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def call(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result
def syscall(*words):
    return call(libc.syscall(*[ctypes.c_long(w) if isinstance(w, int) else w for w in words]))
def tried(function, *words):
    try:
        result = function(*words)
    except OSError as error:
        print(errno.errorcode.get(error.errno, error.errno), flush=True)
    else:
        print("done", result if isinstance(result, (int, str, list)) else "", flush=True)
"""


@pytest.fixture(autouse=True, scope="module")
def controllers_handed_down() -> None:
    """What systemd does on a host: in the lab's guests, which have none, nobody has done it."""
    for found in cgroup.hierarchies() if LAB else ():
        if found.version == 2:
            for controller in found.controllers & {"memory", "pids", "cpu"}:
                (found.path / "cgroup.subtree_control").write_text(f"+{controller}")


@cache
def python_files() -> tuple[str, ...]:
    """The options that give a jail the Python of these tests."""
    library = sysconfig.get_path("stdlib")
    extension = next(Path(library).glob("lib-dynload/_ctypes.*.so"))
    paths = [library, *libraries.of(str(extension))]
    return tuple(word for path in paths for word in ("--file", path))


def jail_command(code: str, *options: str) -> list[str]:
    """The command line of a jail in which Python runs ``code`` behind the preamble."""
    python = (PYTHON, "-I", "-S", "-B", "-c", PREAMBLE + code)
    return [str(PORTWRIGHT), "jail", *python_files(), *options, "--", *python]


def attempt(
    code: str, *options: str, pass_fds: Sequence[int] = (), status: int | None = 0, timeout: float = 60
) -> str:
    """Run ``code`` in a jail; what it printed. AssertionError if the jail ended otherwise than ``status``."""
    done = subprocess.run(
        jail_command(code, *options),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        pass_fds=pass_fds,
        timeout=timeout * PATIENCE,
        check=False,
    )
    if status is not None:
        assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def attempts(codes: Mapping[str, str], *options: str) -> dict[str, str]:
    """Run each of ``codes`` in one jail, in turn, each in a process of its own; what they printed."""
    said: dict[str, str] = json.loads(attempt(f"codes = {dict(codes)!r}\n{_IN_TURN}", *options))
    return said


#: A fork for each, whose output is read to its end.
_IN_TURN = """
import json, traceback
said = {}
for name, code in codes.items():
    near, far = os.pipe()
    if not os.fork():
        os.dup2(far, 1)
        os.dup2(far, 2)
        os.closerange(3, 20)
        try:
            exec(code)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)
    os.close(far)
    said[name] = os.fdopen(near).read().strip()
    os.wait()
print(json.dumps(said))
"""


def groups(starter: int) -> list[str]:
    """The cgroups of the jails that this process started, in all hierarchies."""
    found = []
    for folder, folders, _ in os.walk("/sys/fs/cgroup"):  # which lets others' go meanwhile
        found += [f"{folder}/{name}" for name in folders if name.startswith(f"{cgroup.PREFIX}{starter}-")]
    return sorted(found)
