"""What a process gives up for good, and a process that is the first of a pid namespace.

prctl(2), capset(2), keyctl(2) and unshare(2), for the calling thread: for processes with one thread.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from pathlib import Path
from typing import Final

from portwright.kernel import netns
from portwright.model.errors import KernelFailed, NotSupported

CLONE_NEWNS: Final = 0x00020000  # linux/sched.h
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
_CLONE_NEWPID: Final = 0x20000000
# linux/prctl.h
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS = 1, 4, 24, 28
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
#: NOROOT, NO_SETUID_FIXUP and NO_CAP_AMBIENT_RAISE, each locked (linux/securebits.h): to be user 0, or to
#: become it, gives no capability.
_SECURE_BITS: Final = 0b1100_1111
_CAP_VERSION_3: Final = 0x20080522  # linux/capability.h
_KEYCTL_JOIN_SESSION_KEYRING: Final = 1  # linux/keyctl.h
#: asm/unistd.h; the C library has no functions for them.
_KEYCTL: Final = {"x86_64": 250, "aarch64": 219}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)


def unshare(flags: int) -> None:
    """Move this process into new namespaces (CLONE_NEW…). Raises KernelFailed: EPERM for all but root."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare", "new namespaces need root")


def fork_first() -> int:
    """As os.fork(), but the child is the first process of a new pid namespace: all others end with it.

    It is killed when the calling thread ends; whoever called may have ended before that is arranged, which
    the child has to look for itself: its parent is in another namespace, and has no number for it.
    """
    back = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(_CLONE_NEWPID)
        child = -1
        try:
            child = os.fork()
            if not child:
                _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        finally:
            if child and _libc.setns(back, _CLONE_NEWPID):
                # Our next child would be in there, and end with what is not its parent: see netns.entered.
                os.abort()
    finally:
        os.close(back)
    return child


def hide() -> None:
    """Nobody without privileges may trace this process, or read its memory: until it executes a program."""
    _prctl(_PR_SET_DUMPABLE, 0)


def new_session_keyring() -> None:
    """Leave the session keyring that was inherited for a new, empty one. A kernel without keys has none."""
    machine = platform.machine()
    if machine not in _KEYCTL:
        raise NotSupported("jail", machine, "it runs on x86-64 and arm64")
    _libc.syscall(_KEYCTL[machine], _KEYCTL_JOIN_SESSION_KEYRING, None)


def last_capability() -> int:
    """The highest capability that this kernel knows."""
    return int(Path("/proc/sys/kernel/cap_last_cap").read_text())


def close_bounds(last: int) -> None:
    """No program that is executed from now on gets a capability, whoever runs it.

    ``last``: see :func:`last_capability`, of which a jail without /proc can't ask. Needs CAP_SETPCAP.
    """
    for capability in range(last + 1):
        _prctl(_PR_CAPBSET_DROP, capability)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _prctl(_PR_SET_SECUREBITS, _SECURE_BITS)


def drop_capabilities() -> None:
    """Give up every capability (effective, permitted, inheritable), and all ways to get one back."""
    header = (ctypes.c_uint32 * 2)(_CAP_VERSION_3, 0)
    none = (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, none), "capset")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def enter_netns(fd: int) -> None:
    """Move this process into the network namespace behind ``fd``, for good."""
    _check(_libc.setns(fd, netns.CLONE_NEWNET), "setns", f"entering network namespace fd {fd}")


def _prctl(option: int, first: int) -> None:
    _check(_libc.prctl(option, first, 0, 0, 0), f"prctl {option}")


def _check(result: int, what: str, detail: str = "") -> None:
    if result < 0:
        raise KernelFailed(ctypes.get_errno(), what, detail)
