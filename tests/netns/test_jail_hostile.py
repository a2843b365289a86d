"""A hostile program in the jail tries every way out; each attempt says how it ended.

Three jails: the usual one; one without the filter of system calls, where the kernel itself has to refuse; and
one without the filter for user 0, who has the host's root's number and none of its powers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tests.netns.jail_lab import attempt, attempts, controllers_handed_down  # noqa: F401 - a fixture

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="numbers of x86-64"),
]

JAILS = {
    "usual": (),
    "no filter": ("--no-seccomp",),
    "user 0": ("--no-seccomp", "--uid", "0"),
}


#: All of them have what a program could do most with.
OPTIONS = ("--proc", "--tmp", "1", "--device", "/dev/net/tun")


@dataclass(frozen=True)
class Try:
    """``said`` is what comes of ``code``, or one of several; ``other`` where it is not so in each jail.

    ``alone``: it may hit its neighbours in the jail, and has none.
    """

    name: str
    code: str
    said: str
    other: dict[str, str] = field(default_factory=dict)
    alone: bool = False


#: By its mode, by the mount, or as it runs: which of them speaks first is the file system's.
NOT_WRITTEN = "EACCES|EROFS|ETXTBSY"
FILTER_ONLY = {"no filter": "EPERM", "user 0": "EPERM"}
#: Where a kernel is built without it; and, without the filter, a bad address.
REFUSED_OR_NONE, UNUSED = "EPERM|EACCES|ENOSYS", "EFAULT|EPERM|ENOSYS"
KERNELS = {"no filter": REFUSED_OR_NONE, "user 0": REFUSED_OR_NONE}
HOST = os.getpid()  # a process outside

TRIES = (
    # --- mounts and roots
    Try("mount", 'tried(lambda: call(libc.mount(b"x", b"/dev", b"tmpfs", 0, None)))', "EPERM"),
    Try("mount cgroups", 'tried(lambda: call(libc.mount(b"x", b"/dev", b"cgroup2", 0, None)))', "EPERM"),
    Try(
        "make the root writable",
        'tried(lambda: call(libc.mount(None, b"/", None, 32 | 4096, None)))',
        "EPERM",
    ),
    Try("umount", 'tried(lambda: call(libc.umount2(b"/dev", 2)))', "EPERM"),
    Try("new mount API", 'tried(lambda: call(libc.fsopen(b"tmpfs", 0)))', "EPERM"),
    Try("clone a mount", 'tried(lambda: call(libc.open_tree(-100, b"/", 1)))', "EPERM"),
    Try("pivot_root", 'tried(syscall, 155, b"/dev", b"/dev")', "EPERM"),
    Try("chroot", 'tried(os.chroot, "/dev")', "EPERM"),
    Try(
        "climb by ..",
        'os.chdir("/dev"); os.chdir("/".join([".."] * 64)); '
        'print(os.stat(".") == os.stat("/"), os.path.exists("bin/sh"), os.path.exists("boot"))',
        "True False False",
    ),
    Try(
        "climb by an open directory",
        'fd = os.open("/dev", os.O_RDONLY); os.fchdir(fd); up = os.open("../../..", os.O_RDONLY)\n'
        'os.fchdir(up); print(sorted(os.listdir(".")) == sorted(os.listdir("/")), os.path.exists("boot"))',
        "True False",
    ),
    # Of a jail's own files none can be written to, and in what it can write to nothing can be executed.
    Try("write to the root", 'tried(os.open, "/x", os.O_CREAT | os.O_WRONLY)', "EROFS"),
    Try("write to its program", "tried(os.open, sys.executable, os.O_WRONLY)", NOT_WRITTEN),
    Try("write to a library", "tried(os.open, os.__file__, os.O_WRONLY)", NOT_WRITTEN),
    Try("change a library's mode", "tried(os.chmod, os.__file__, 0o777)", "EROFS"),
    Try("remove a device", 'tried(os.unlink, "/dev/null")', "EROFS"),
    Try(
        "execute what it wrote",
        'open("/tmp/x", "w").write("#!/bin/sh"); os.chmod("/tmp/x", 0o700); tried(os.execv, "/tmp/x", ["x"])',
        "EACCES",
    ),
    Try(
        "fill memory by /tmp",
        'f = open("/tmp/y", "wb", 0)\nfor _ in range(3): tried(f.write, bytes(1 << 19))\nos.unlink("/tmp/y")',
        "done 524288\ndone 520192\nENOSPC",
    ),
    # --- the host's files
    *(
        Try(f"open {path}", f'tried(os.open, "{path}", os.O_RDONLY)', "ENOENT")
        for path in ("/etc/passwd", "/boot", "/sys/fs/cgroup", "/dev/mem", "/dev/shm", "/run")
    ),
    *(
        Try(f"open {path}", f'tried(os.open, "{path}", os.O_RDONLY)', "ENOENT")
        for path in (
            "/proc/sys/kernel/core_pattern",
            "/proc/kcore",
            "/proc/sysrq-trigger",
            "/proc/mounts.x",
            f"/proc/{HOST}/root",
            "/proc/kallsyms",
            "/proc/keys",
        )
    ),
    Try(
        "root of pid 1", 'tried(os.listdir, "/proc/1/root/")', "ENOENT", {"user 0": "EACCES"}
    ),  # it sees the process, but may not look into it
    Try(
        "memory of pid 1",
        'tried(os.open, "/proc/1/mem", os.O_RDWR)',
        "ENOENT",
        {"user 0": "EROFS"},
    ),
    Try("write to /proc", 'tried(os.open, "/proc/self/oom_score_adj", os.O_WRONLY)', "EROFS"),
    Try("write to its program by /proc", 'tried(os.open, "/proc/self/exe", os.O_WRONLY)', NOT_WRITTEN),
    Try(
        "file by handle",
        'h = ctypes.create_string_buffer(struct.pack("=Ii2Q", 8, 1, 2, 0))\n'
        'fd = os.open("/", os.O_RDONLY)\n'
        "tried(syscall, 304, fd, ctypes.c_void_p(ctypes.addressof(h)), 0)",
        "EPERM",
    ),
    # --- devices
    Try("mknod /dev/mem", 'tried(os.mknod, "/tmp/m", 0o20666, os.makedev(1, 1))', "EPERM"),
    Try("mknod a disk", 'tried(os.mknod, "/tmp/m", 0o60666, os.makedev(8, 0))', "EPERM"),
    Try(
        "make a tap",
        'fd = os.open("/dev/net/tun", os.O_RDWR)\n'
        'tried(fcntl.ioctl, fd, 0x400454CA, struct.pack("16sH22x", b"t0", 0x1002))',
        "EPERM",
    ),
    # --- other processes
    Try("trace pid 1", "tried(syscall, 101, 16, 1, 0, 0)", "EPERM"),
    Try(
        "trace the host",
        f"tried(syscall, 101, 16, {HOST}, 0, 0)",
        "EPERM",
        other={"no filter": "ESRCH", "user 0": "ESRCH"},
    ),
    Try(
        "read pid 1's memory",
        "tried(syscall, 310, 1, 0, 0, 0, 0, 0)",
        "EPERM",
        other={"no filter": "done 0", "user 0": "done 0"},
    ),  # nothing was asked for
    Try("take pid 1's descriptor", "tried(syscall, 438, os.pidfd_open(1), 0, 0)", "EPERM"),
    Try(
        "kill pid 1",
        "tried(os.kill, 1, 9); print(os.getppid())",
        "EPERM\n1",
        other={"user 0": "done \n1"},
        alone=True,
    ),
    Try(
        "kill its parent",
        "signal.signal(15, signal.SIG_IGN); tried(os.kill, os.getppid(), 15); print(os.getppid())",
        "EPERM\n1",
        other={"user 0": "done \n1"},
        alone=True,
    ),  # who passes it on to whoever sent it: see test_jail_life
    Try("kill a process of the host", f"tried(os.kill, {HOST}, 9)", "ESRCH"),
    Try("open a process of the host", f"tried(os.pidfd_open, {HOST})", "ESRCH"),
    Try("kill everybody", "tried(os.kill, -1, 9)", "ESRCH", alone=True),
    # --- privileges
    Try("setuid 0", "tried(os.setuid, 0)", "EPERM", other={"user 0": "done"}),
    Try("setgid 0", "tried(os.setgid, 0)", "EPERM", other={"user 0": "done"}),
    Try("setuid another", "tried(os.setuid, 1)", "EPERM"),
    Try("setgroups", "tried(os.setgroups, [0])", "EPERM"),
    Try(
        "capset",
        "head, all = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[1 << 21] * 3)\n"
        "tried(lambda: call(libc.capset(head, all)))",
        "EPERM",
    ),
    Try(
        "capabilities that are left", "print([c for c in range(64) if libc.prctl(23, c, 0, 0, 0) == 1])", "[]"
    ),
    Try("ambient capability", "tried(lambda: call(libc.prctl(47, 2, 21, 0, 0)))", "EPERM"),
    Try(
        "no_new_privs off",
        "tried(lambda: call(libc.prctl(38, 0, 0, 0, 0))); print(libc.prctl(39, 0, 0, 0, 0))",
        "EINVAL\n1",
    ),
    Try("securebits off", "tried(lambda: call(libc.prctl(28, 0, 0, 0, 0)))", "EPERM"),
    Try(
        "raise a limit",
        "try: resource.setrlimit(resource.RLIMIT_NOFILE, (9999, 9999))\nexcept ValueError as e: print(e)",
        "not allowed to raise maximum limit",
    ),
    # --- namespaces
    Try("user namespace", "tried(lambda: call(libc.unshare(0x10000000)))", "EPERM"),
    Try("other namespaces", "tried(lambda: call(libc.unshare(0x6E020000)))", "EPERM"),
    Try("clone a user namespace", "tried(syscall, 56, 0x10000011, 0, 0, 0, 0)", "EPERM"),
    Try(
        "clone3 a user namespace",
        'a = ctypes.create_string_buffer(struct.pack("8Q", 0x10000000, 0, 0, 0, 17, 0, 0, 0))\n'
        "tried(syscall, 435, ctypes.c_void_p(ctypes.addressof(a)), 64)",
        "ENOSYS",
        other=FILTER_ONLY,
    ),
    Try(
        "setns",
        'tried(lambda: call(libc.setns(os.open("/proc/self/ns/net", os.O_RDONLY), 0)))',
        "EPERM",
    ),
    # --- the kernel
    Try(
        "a BPF program of the host",
        'a = ctypes.create_string_buffer(struct.pack("=QQ", 1, 0))\n'
        "tried(syscall, 321, 13, ctypes.c_void_p(ctypes.addressof(a)), 16)",
        "EPERM",
    ),
    Try(
        "perf events",
        'a = ctypes.create_string_buffer(struct.pack("=IIQ", 1, 128, 0) + bytes(112))\n'
        "tried(syscall, 298, ctypes.c_void_p(ctypes.addressof(a)), -1, 0, -1, 0)",
        "EPERM",
        other=KERNELS,
    ),
    Try("load a module", "tried(syscall, 175, 0, 0, 0)", "EPERM", other=KERNELS),
    Try("load a module by file", "tried(syscall, 313, 0, 0, 0)", "EPERM", other=KERNELS),
    Try("delete a module", "tried(syscall, 176, b'x', 0)", "EPERM", other=KERNELS),
    Try("kexec", "tried(syscall, 246, 0, 0, 0, 0)", "EPERM", other=KERNELS),
    Try("reboot", "tried(syscall, 169, 0xfee1dead - (1 << 32), 672274793, 0, 0)", "EPERM", other=KERNELS),
    Try("swap", "tried(syscall, 167, b'/dev/zero', 0)", "EPERM", other=KERNELS),
    Try("the kernel's log", "tried(syscall, 103, 3, 0, 0)", "EPERM"),
    Try("set the clock", "tried(time.clock_settime, 0, 1.0)", "EPERM"),
    Try("host name", 'tried(socket.sethostname, "x")', "EPERM"),
    Try("ports of the CPU", "tried(syscall, 172, 3)", "EPERM", other=KERNELS),
    Try("io_uring", "tried(syscall, 425, 0, 0)", "EPERM", other={"no filter": UNUSED, "user 0": UNUSED}),
    # --- the network
    Try("raw socket", "tried(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)", "EPERM"),
    Try("raw socket of IPv6", "tried(socket.socket, socket.AF_INET6, socket.SOCK_RAW, 58)", "EPERM"),
    Try(
        "packet socket",
        "tried(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)",
        "EAFNOSUPPORT",
        other=FILTER_ONLY,
    ),
    Try("low port", 's = socket.socket(); tried(s.bind, ("127.0.0.1", 80))', "EACCES"),
    Try(
        "set lo down",
        's = socket.socket(); tried(fcntl.ioctl, s, 0x8914, struct.pack("16sH22x", b"lo", 0))',
        "EPERM",
    ),
    Try(
        "make a link by netlink",
        "s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\n"
        's.send(struct.pack("=IHHII BxHiII", 32, 16, 0x605, 1, 0, 0, 0, 0, 0, 0))\n'
        'print(errno.errorcode[-struct.unpack_from("=i", s.recv(4096), 16)[0]])',
        "EPERM",
    ),
    Try(
        "netfilter's netlink",
        "def ask():\n"
        "    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12); s.settimeout(5)\n"
        '    s.send(struct.pack("=IHHIIBBH", 20, 0xA00, 5, 1, 0, 1, 0, 0))\n'
        '    raise OSError(-struct.unpack_from("=i", s.recv(4096), 16)[0], "")\n'
        "tried(ask)",
        "EPROTONOSUPPORT",
        FILTER_ONLY,
    ),
    Try(
        "system calls of i386",
        "import mmap; m = mmap.mmap(-1, 4096, prot=7); m.write(bytes.fromhex('b814000000cd80c3'))\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
        "    os._exit(3 if f() == os.getpid() else 4)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))",
        "-31|-11",
        # Without the filter they are there, if the kernel has them.
        {"no filter": "3|-11", "user 0": "3|-11"},
    ),
    Try("the host's links", "print(socket.if_nameindex())", "[(1, 'lo')]"),
)
assert len({row.name for row in TRIES}) == len(TRIES)


Said = Callable[[str, Try], str]


@pytest.fixture(scope="module")
def said() -> Said:
    """What came of an attempt in a jail: all of a jail's are made there at once, each by its own process."""
    done: dict[str, dict[str, str]] = {}

    def ask(jail: str, row: Try) -> str:
        options = (*JAILS[jail], *OPTIONS)
        if row.alone:
            return attempt(row.code, *options)
        if jail not in done:
            codes = {each.name: each.code for each in TRIES if not each.alone}
            done[jail] = attempts(codes, *options)
        return done[jail][row.name]

    return ask


@pytest.mark.parametrize("jail", JAILS)
@pytest.mark.parametrize("row", TRIES, ids=lambda row: row.name.replace(str(HOST), "PID"))
def test_attempt_ends_as_it_should(row: Try, jail: str, said: Said) -> None:
    """Nothing that a program in the jail may try brings it anything of the host."""
    assert said(jail, row) in row.other.get(jail, row.said).split("|")
