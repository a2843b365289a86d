"""The system calls that a jailed process doesn't have, by libseccomp.

A list of what is refused, as any hypervisor is to run: what changes the host or looks into other processes,
and what brings kernel code within reach that no hypervisor needs. A refused call fails with EPERM, or as one
that the kernel doesn't have, where programs then do something else.

The binding is libseccomp's own (``seccomp``, Debian's python3-seccomp) or ``pyseccomp``, which has its API.
"""

from __future__ import annotations

import errno
import importlib
import socket
from collections.abc import Collection
from typing import Any, Final, Protocol

from portwright.model.errors import InvalidInput, NotSupported

#: Refused with EPERM. Most need capabilities, which a jail hasn't: here even bugs in them are out of reach.
REFUSED: Final = frozenset(
    {
        # mounts, roots, namespaces
        *("mount", "umount", "umount2", "pivot_root", "chroot", "unshare", "setns", "mount_setattr"),
        *("move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick", "swapon", "swapoff"),
        *("quotactl", "quotactl_fd", "acct", "statmount", "listmount"),
        # other processes, and files by handle
        *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd"),
        *("open_by_handle_at", "name_to_handle_at"),
        # keys
        *("keyctl", "add_key", "request_key"),
        # the kernel itself
        *("bpf", "perf_event_open", "init_module", "finit_module", "delete_module", "create_module"),
        *("kexec_load", "kexec_file_load", "reboot", "syslog", "iopl", "ioperm", "lookup_dcookie"),
        *("fanotify_init", "vhangup", "uselib", "modify_ldt"),
        # the host's names and clocks
        *("sethostname", "setdomainname", "settimeofday", "clock_settime", "clock_adjtime", "adjtimex"),
        "stime",
        # what goes around this filter
        *("io_uring_setup", "io_uring_enter", "io_uring_register"),
    }
)
#: Refused as if the kernel had none: clone3's flags lie in memory, where no filter can look, and the C
#: library falls back to clone.
ABSENT: Final = frozenset({"clone3"})
#: Families of sockets that there are. AF_VSOCK, which no namespace holds back, is not one of them.
FAMILIES: Final = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
#: All CLONE_NEW… that clone(2) takes (linux/sched.h).
_NAMESPACES: Final = 0x7E020000
#: Of another's terminal: type into it, and the console's own (asm-generic/ioctls.h).
_IOCTLS: Final = (0x5412, 0x541C)
_LOW: Final = 0xFFFFFFFF


class Filter(Protocol):
    """A filter that is complete."""

    def load(self) -> None:
        """Put this process, and its children, under it for good. Needs no_new_privs, and nothing else."""


def build(allowed: Collection[str] = ()) -> Filter:
    """The filter, without the system calls ``allowed``.

    Raises InvalidInput (field ``allow``) for one that is not on the list, NotSupported without libseccomp.
    """
    library = _library()
    known = REFUSED | ABSENT | {"socket"}
    for name in allowed:
        if name not in known:
            why = f"the filter doesn't refuse it; it refuses {', '.join(sorted(known))}"
            raise InvalidInput("allow", name, why)
    made = library.SyscallFilter(library.ALLOW)
    refuse = library.ERRNO(errno.EPERM)
    for name in sorted(REFUSED.difference(allowed)):
        if library.resolve_syscall(library.system_arch(), name) != -1:  # -1: unknown to this libseccomp
            made.add_rule(refuse, name)
    for name in ABSENT.difference(allowed):
        made.add_rule(library.ERRNO(errno.ENOSYS), name)
    if "unshare" not in allowed:
        flag = 1
        while flag <= _NAMESPACES:
            if flag & _NAMESPACES:
                made.add_rule(refuse, "clone", library.Arg(0, library.MASKED_EQ, flag, flag))
            flag <<= 1
    for request in _IOCTLS:
        # The kernel looks at the lower half alone.
        made.add_rule(refuse, "ioctl", library.Arg(1, library.MASKED_EQ, _LOW, request))
    if "socket" not in allowed:
        for family in range(1, max(FAMILIES) + 1):
            if family not in FAMILIES:
                _no_socket(library, made, library.EQ, family)
        _no_socket(library, made, library.GT, max(FAMILIES))
        # Of netlink what asks for links and addresses: the C library does, to look up a name.
        other = (library.Arg(0, library.EQ, socket.AF_NETLINK), library.Arg(2, library.NE, 0))
        made.add_rule(library.ERRNO(errno.EPROTONOSUPPORT), "socket", *other)
    return made  # type: ignore[no-any-return]  # the bindings have no types


def _no_socket(library: Any, made: Any, relation: Any, family: int) -> None:
    for call in ("socket", "socketpair"):
        made.add_rule(library.ERRNO(errno.EAFNOSUPPORT), call, library.Arg(0, relation, family))


def _library() -> Any:
    for name in ("seccomp", "pyseccomp"):
        try:
            return importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):
            continue  # neither, or the binding without libseccomp.so.2
    way = "pip install 'portwright[jail]' and apt-get install libseccomp2, or go without by --no-seccomp"
    raise NotSupported("jail", "a seccomp filter without libseccomp", way)
