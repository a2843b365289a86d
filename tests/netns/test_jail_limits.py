"""What a jail's program can take, what it is given, and what it shares with the host: only what was named."""

from __future__ import annotations

import ctypes
import fcntl
import os
import pty
import select
import socket
import stat
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from portwright.kernel import cgroup
from tests.deadline import PATIENCE
from tests.netns.jail_lab import attempt, controllers_handed_down, groups, jail_command  # noqa: F401 - a fixture

pytestmark = pytest.mark.netns


def test_fork_bomb_hits_its_limit() -> None:
    """With pids.max a program has so many processes and no more, and all of them end with the jail."""
    code = (
        "count = 0\n"
        "try:\n"
        "    while count < 1000:\n"
        "        if not os.fork():\n"
        "            signal.pause()\n"
        "        count += 1\n"
        "except OSError as error:\n"
        "    print(count, errno.errorcode[error.errno])\n"
    )
    # Two are the first process and the program itself.
    assert attempt(code, "--cgroup", "pids.max=16") == "14 EAGAIN"


def test_memory_bomb_ends_alone() -> None:
    """With memory.max who takes more is killed, and nobody else; the status says so."""
    code = "taken = bytearray(512 << 20)\nprint(len(taken))"
    assert attempt(code, "--cgroup", "memory.max=64M", status=137) == ""
    assert attempt(code, "--cgroup", "memory.max=1G") == str(512 << 20)


def test_limits_are_in_the_kernels_files() -> None:
    """The group has the values that were given, the jail is in it, and both are gone afterwards."""
    with _running("print(1, flush=True); signal.pause()", "--cgroup", "pids.max=31") as process:
        assert process.stdout is not None
        process.stdout.readline()
        (made,) = map(Path, groups(process.pid))
        assert (made / "pids.max").read_text() == "31\n"
        assert len((made / "cgroup.procs").read_text().split()) == 2
    assert groups(process.pid) == []


@pytest.fixture
def unified() -> Iterator[cgroup.Hierarchy]:
    """The hierarchy of version 2; no other test hands its controllers down meanwhile."""
    found = [each for each in cgroup.hierarchies() if each.version == 2 and "hugetlb" in each.controllers]
    if not found:
        pytest.skip("no cgroup v2 with the controller hugetlb here")
    with Path("/tmp/pwt-jail-cgroup2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield found[0]


def test_version_2_by_its_own_names(unified: cgroup.Hierarchy) -> None:
    """In version 2 a limit needs its controller handed down by the parent; then it is in force, and goes."""
    limit = ("--cgroup", "hugetlb.2MB.max=2M")
    control = unified.path / "cgroup.subtree_control"
    handed_down = "hugetlb" in control.read_text().split()
    try:
        if not handed_down:
            done = subprocess.run(jail_command("", *limit), capture_output=True, text=True, check=False)
            assert done.returncode == 1
            assert f"hugetlb is not enabled below {unified.path}: echo +hugetlb >{control}" in done.stderr
            control.write_text("+hugetlb")
        with _running("print(1, flush=True); signal.pause()", *limit) as process:
            assert process.stdout is not None
            process.stdout.readline()
            (made,) = unified.path.glob(f"portwright-jail-{process.pid}-*")
            assert (made / "hugetlb.2MB.max").read_text() == f"{2 << 20}\n"
            assert len((made / "cgroup.procs").read_text().split()) == 2
        assert not made.exists()
    finally:
        if not handed_down:
            control.write_text("-hugetlb")


def test_group_without_an_owner_is_swept() -> None:
    """A group that was left, its owner and the owner's guard killed, goes when the next jail is made."""
    parent = next(each for each in cgroup.hierarchies() if "pids" in each.controllers).path
    left = parent / f"{cgroup.PREFIX}0-{uuid.uuid4().hex}"
    left.mkdir()
    assert attempt("print(1)", "--cgroup", "pids.max=16") == "1"
    assert not left.exists()


@pytest.mark.parametrize(
    ("option", "code", "said"),
    [
        (
            "nofile=20",
            "fds = []\nwhile len(fds) < 100:\n    try: fds.append(os.dup(0))\n"
            "    except OSError as e: print(len(fds), errno.errorcode[e.errno]); break",
            "17 EMFILE",
        ),
        (
            "fsize=4096",
            'signal.signal(signal.SIGXFSZ, signal.SIG_IGN); f = open("/tmp/x", "wb", 0)\n'
            "print(f.write(bytes(9000))); tried(f.write, b'x')",
            "4096\nEFBIG",
        ),
        ("nproc=1", "tried(os.fork)", "EAGAIN"),
        ("core=0", "print(resource.getrlimit(resource.RLIMIT_CORE))", "(0, 0)"),
    ],
)
def test_resource_limits_hold(option: str, code: str, said: str) -> None:
    """A limit of the kernel's resources is the jail's, and nobody in it raises it."""
    # A user of its own, who has no other process.
    assert attempt(code, "--uid", "1877263", "--tmp", "1", "--rlimit", option) == said


def test_what_else_is_bounded_by_default() -> None:
    """Without an option a jail writes no core and has 2,048 descriptors, as Firecracker's jailer has it."""
    code = "print(resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_NOFILE))"
    assert attempt(code) == "(1, 1) (2048, 2048)"


OPEN = (
    "found = []\n"
    "for fd in range(2048):\n"
    "    try: fcntl.fcntl(fd, fcntl.F_GETFD); found.append(fd)\n"
    "    except OSError: pass\n"
    "print(found)"
)


def test_only_named_descriptors_are_there() -> None:
    """Of all that its starter has open, inheritable too, a jail has what was named, by the same number."""
    pipes = [os.pipe() for _ in range(4)]
    ends = [end for pair in pipes for end in pair]
    try:
        assert attempt(OPEN, pass_fds=ends) == "[0, 1, 2]"
        named = pipes[1][1]
        words = f"os.write({{fd:out}}, b'here')\n{OPEN}"
        assert attempt(words, "--fd", f"{named}:out", pass_fds=ends) == f"[0, 1, 2, {named}]"
        assert os.read(pipes[1][0], 10) == b"here"
    finally:
        for end in ends:
            os.close(end)


def test_directory_is_not_handed_over(tmp_path: Path) -> None:
    """A directory's descriptor would be a way out: it is refused before anything is made."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        done = subprocess.run(
            jail_command("", "--fd", str(fd)), pass_fds=[fd], capture_output=True, text=True, check=False
        )
    finally:
        os.close(fd)
    assert done.returncode == 1
    assert done.stderr == (
        f"portwright: fd: a directory would be a way out of the jail; use --file (got {fd})\n"
    )


def test_environment_is_what_was_named() -> None:
    """Nothing of the starter's environment is there but what was asked for."""
    code = "print(sorted((k, v) for k, v in os.environ.items() if k != 'LC_CTYPE'))"
    assert attempt(code) == "[]"
    assert (
        attempt(code, "--env", "A=b=c", "--env", "HOME")
        == f"[('A', 'b=c'), ('HOME', '{os.environ['HOME']}')]"
    )


def test_files_are_as_they_were_named(tmp_path: Path) -> None:
    """A file is where it was put, to be read or written as it was said; set-user-ID bits mean nothing."""
    (tmp_path / "shown").write_text("shown")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    code = (
        'print(open("/a/b/shown").read()); tried(os.open, "/a/b/shown", os.O_WRONLY)\n'
        f'open("/w/new", "w").write("made"); tried(os.open, "/w/../..{tmp_path}", os.O_RDONLY)'
    )
    options = ("--file", f"{tmp_path}/shown:/a/b/shown", "--file", f"{tmp_path}/open:/w:rw", "--uid", "1000")
    assert attempt(code, *options) == "shown\nEACCES\nENOENT"
    assert (tmp_path / "open/new").read_text() == "made"
    assert (tmp_path / "open/new").stat().st_uid == 1000


def test_set_user_id_gives_nothing(tmp_path: Path) -> None:
    """A program of root's with the set-user-ID bit runs as the jail's user."""
    copy = tmp_path / "busybox"
    copy.write_bytes(Path("/bin/busybox").read_bytes())
    copy.chmod(0o4755)
    assert copy.stat().st_mode & stat.S_ISUID
    code = "import subprocess; print(subprocess.run(['/busybox', 'id', '-u'], capture_output=True).stdout)"
    assert attempt(code, "--file", f"{copy}:/busybox") == "b'65534\\n'"


def test_hosts_unix_sockets_are_out_of_reach(tmp_path: Path) -> None:
    """Neither an abstract Unix socket of the host's, nor one with a path, nor a TCP port answers."""
    name = f"pwt-{uuid.uuid4().hex}"
    with (
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket() as tcp,
    ):
        abstract.bind(f"\0{name}")
        named.bind(str(tmp_path / "s"))
        tcp.bind(("127.0.0.1", 0))
        for server in (abstract, named, tcp):
            server.listen()
        code = (
            f"tried(socket.socket(socket.AF_UNIX).connect, '\\0{name}')\n"
            f"tried(socket.socket(socket.AF_UNIX).connect, '{tmp_path}/s')\n"
            f"tried(socket.socket().connect, ('127.0.0.1', {tcp.getsockname()[1]}))\n"
        )
        assert attempt(code) == "ECONNREFUSED\nENOENT\nECONNREFUSED"


def test_hosts_shared_memory_is_out_of_reach() -> None:
    """System V's shared memory, POSIX's, and POSIX message queues of the host don't exist in a jail."""
    libc = ctypes.CDLL(None, use_errno=True)
    key = int.from_bytes(os.urandom(3), "little") + 1
    segment = libc.shmget(key, 4096, 0o1666)
    assert segment >= 0
    queue = f"/pwt-{uuid.uuid4().hex}".encode()
    mqd = libc.mq_open(queue, os.O_CREAT | os.O_RDWR, 0o666, None)
    try:
        code = (
            f"tried(lambda: call(libc.shmget({key}, 4096, 0)))\n"
            f"tried(lambda: call(libc.mq_open({queue!r}, 0)))\n"
            "tried(lambda: call(libc.shm_open(b'/x', 0, 0)))\n"
        )
        assert attempt(code) == "ENOENT\nENOENT\nENOENT"
        # They are there: the same words outside find them.
        assert libc.shmget(key, 4096, 0) == segment
    finally:
        libc.shmctl(segment, 0, None)
        if mqd >= 0:
            os.close(mqd)
            libc.mq_unlink(queue)


def test_hosts_keys_are_out_of_reach() -> None:
    """A key in the session keyring of who starts a jail is not found in it, filter or not."""
    if os.uname().machine != "x86_64":
        pytest.skip("numbers of x86-64")
    libc = ctypes.CDLL(None, use_errno=True)
    name = f"pwt-{uuid.uuid4().hex}".encode()
    if libc.syscall(250, 1, None) < 0:  # a session keyring of this process's own: it ends with it
        pytest.skip("this kernel has no keys")
    key = libc.syscall(248, b"user", name, b"secret", 6, -3)
    assert key > 0
    # Search the session's, and read the key itself by its number.
    code = f"tried(syscall, 250, 10, -3, b'user', {name!r}, 0); tried(syscall, 250, 11, {key}, 0, 0)"
    assert attempt(code) == "EPERM\nEPERM"
    assert attempt(code, "--no-seccomp") == "ENOKEY\nEACCES"
    assert attempt(code, "--no-seccomp", "--uid", "0") == "ENOKEY\nEACCES"


@pytest.mark.parametrize("options", [(), ("--no-seccomp",), ("--no-seccomp", "--uid", "0")])
def test_nothing_is_typed_into_the_callers_terminal(options: tuple[str, ...]) -> None:
    """On its starter's terminal a jail reads and writes, but neither types there nor takes it over."""
    ours, theirs = pty.openpty()
    code = (
        "print(os.isatty(0))\n"
        "tried(fcntl.ioctl, 0, 0x5412, b'x')\n"  # TIOCSTI
        "tried(fcntl.ioctl, 0, 0x540E, 1)\n"  # TIOCSCTTY
        "tried(os.open, '/dev/tty', os.O_RDWR)\n"
    )
    process = subprocess.Popen(
        ["setsid", "--ctty", *jail_command(code, *options)], stdin=theirs, stdout=subprocess.PIPE, text=True
    )
    try:
        with process:
            assert process.stdout is not None
            # EIO: a kernel that has no TIOCSTI (dev.tty.legacy_tiocsti).
            assert process.stdout.read().replace("EIO", "EPERM") == "True\nEPERM\nEPERM\nENOENT\n"
        assert not select.select([theirs], [], [], 0)[0]
    finally:
        os.close(ours)
        os.close(theirs)


@contextmanager
def _running(code: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A jail that runs meanwhile, and is ended in order."""
    process = subprocess.Popen(
        jail_command(code, *options), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=20 * PATIENCE)
