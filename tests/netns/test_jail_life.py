"""A jail's life: how its end is told, that it ends with who started it, and that nothing is ever left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from portwright.jail import Jail, start
from portwright.kernel import private
from portwright.model.errors import InvalidInput, KernelFailed, NotFound
from tests import mounts
from tests.deadline import PATIENCE, wait_readable, wait_until
from tests.fix_netns import NetnsFactory, open_fds
from tests.netns.jail_lab import attempt, controllers_handed_down, groups, jail_command  # noqa: F401 - a fixture

pytestmark = pytest.mark.netns

BUSYBOX = "/bin/busybox"

#: Starts a jail, and stops for good at a moment of its making: argv names the process ("starter": this one;
#: "inside": the jail's first) and how many calls it has made by then, in the modules that make a jail. It
#: says so on stdout, as long as it has that; with "0" it says a word for each call instead.
STARTER = f"""
import os, signal, sys
who, stop = sys.argv[1], int(sys.argv[2])
from portwright.jail import Jail, start
from portwright.kernel import private
starter, count, say = os.getpid(), 0, os.dup(1)
MODULES = ("jail/launch.py", "jail/inside.py", "jail/tree.py", "jail/guard.py", "kernel/cgroup.py",
           "kernel/confine.py", "kernel/mounts.py")

def watch(frame, event, _):
    global count
    if event not in ("call", "c_call") or not frame.f_code.co_filename.endswith(MODULES):
        return
    if os.getpid() != (starter if who == "starter" else 1):
        return
    count += 1
    if not stop:
        try:
            os.write(say, b"call\\n")
        except OSError:
            sys.setprofile(None)
    elif count == stop:
        sys.setprofile(None)
        os.write(say, b"stopped\\n")
        while True:
            signal.pause()

namespace = private.new_netns()
jail = Jail(command=("{BUSYBOX}", "sleep", "600"), cgroup={{"pids.max": "20"}}, tmp=1, proc=True)
start(Jail(command=("{BUSYBOX}", "true")), namespace).wait()  # all is imported
sys.setprofile(watch)
jailed = start(jail, namespace)
sys.setprofile(None)
os.write(say, b"running\\n")
jailed.wait()
"""


@pytest.mark.parametrize(
    ("code", "status"),
    [("sys.exit(0)", 0), ("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137), ("os.abort()", 134)],
)
def test_status_is_the_commands(code: str, status: int) -> None:
    """The exit status is the command's, and 128 and the signal's number where a signal ended it."""
    assert attempt(code, status=status) == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_are_passed_on(number: signal.Signals) -> None:
    """What ``portwright jail`` is sent comes to the command, which may do with it what it likes."""
    code = f"signal.signal({int(number)}, lambda *_: sys.exit(21))\nprint(1, flush=True)\nsignal.pause()"
    with _running(code) as process:
        process.send_signal(number)
        assert process.wait(20 * PATIENCE) == 21


def test_orphans_end_with_the_command() -> None:
    """A daemon that left its session and its parent ends when the command does."""
    near, far = os.pipe()
    code = (
        "for _ in range(2):\n"
        "    if os.fork(): break\n"
        "    os.setsid()\n"
        "else:\n"
        "    signal.signal(1, signal.SIG_IGN)\n"
        "    os.write({fd:out}, b'lives')\n"
        "    while True: signal.pause()\n"
        "if os.getpid() == 2:\n"
        "    os.read(0, 1)\n"
    )
    command = jail_command(code, "--fd", f"{far}:out")
    process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[far])
    os.close(far)
    try:
        wait_readable(near, 30, "the daemon")
        assert os.read(near, 5) == b"lives"
        process.communicate(b"x", timeout=20 * PATIENCE)
        wait_readable(near, 10, "its end")
        assert os.read(near, 1) == b""
    finally:
        process.kill()
        process.wait()
        os.close(near)


def test_every_process_in_it_ends_with_the_starter() -> None:
    """SIGKILL of ``portwright jail`` ends all that runs in the jail, and its cgroup goes."""
    near, far = os.pipe()
    code = (
        "if not os.fork() or not os.fork():\n"
        "    os.setsid()\n"
        "    signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "print(1, flush=True)\nwhile True: signal.pause()"
    )
    with _running(code, "--cgroup", "pids.max=32", "--fd", str(far), pass_fds=(far,)) as process:
        os.close(far)
        assert groups(process.pid)
        process.kill()
        process.wait()
        wait_readable(near, 10, "the end of all who have the pipe")
        assert os.read(near, 1) == b""
        wait_until(partial(_no_groups, process.pid), 10, "the cgroup to go")
    os.close(near)


@pytest.mark.parametrize("who", ["starter", "inside"])
@pytest.mark.parametrize("part", range(16))
def test_kill_at_any_moment_leaves_nothing(who: str, part: int, calls: dict[str, int]) -> None:
    """Whatever call a jail is in when its starter is killed: no process, cgroup or mount is left."""
    # By the first three calls the process inside has arranged its end with the starter's: for who is killed
    # before that it is stopped here, but wouldn't be: it looks whether the starter is there, and ends.
    first = 4 if who == "inside" else 1
    stop = first + part * (calls[who] - first) // 15
    before = mounts.standing()
    with _starter(who, stop) as (process, marker):
        assert process.stdout is not None
        # A jail that has fewer neighbours whose groups it looks at makes fewer calls, and may run by then.
        assert process.stdout.readline() in {"stopped\n", "running\n"}
        assert _processes(marker)
        process.kill()
        process.wait()
        wait_until(lambda: not _processes(marker), 20, f"the processes to end at call {stop} of {who}")
        wait_until(partial(_no_groups, process.pid), 10, f"the cgroup to go at call {stop} of {who}")
    assert mounts.standing() == before


@pytest.fixture(scope="module")
def calls() -> dict[str, int]:
    """How many calls of its own each makes for one jail; the one inside until it has let go of all it had."""
    found: dict[str, int] = {}
    for who in ("starter", "inside"):
        with _starter(who, 0) as (process, _):
            assert process.stdout is not None
            for line in process.stdout:
                if line == "running\n":
                    break
                found[who] = found.get(who, 0) + 1
    assert min(found.values()) > 50, found
    return found


def test_first_process_killed_is_the_end() -> None:
    """Who kills the jail's first process ends the jail, whose status is that."""
    before = open_fds()
    namespace = private.new_netns()
    try:
        with start(Jail(command=(BUSYBOX, "sleep", "600")), namespace) as jailed:
            os.kill(jailed.pid, signal.SIGKILL)
            assert jailed.wait() == -signal.SIGKILL
            assert jailed.wait() == -signal.SIGKILL
    finally:
        os.close(namespace)
    assert open_fds() == before


def test_first_process_has_nothing() -> None:
    """The jail's first process has one descriptor, the status's pipe, no capability, and no way to one."""
    namespace = private.new_netns()
    try:
        with start(Jail(command=(BUSYBOX, "sleep", "600")), namespace) as jailed:
            first = Path(f"/proc/{jailed.pid}")
            status = (first / "status").read_text()
            assert status.count("\t" + "0" * 16) >= 5
            assert "NoNewPrivs:\t1" in status
            # By then it has said its last word, and is about to close what it said it on.
            wait_until(lambda: len(list((first / "fd").iterdir())) == 1, 10, "its descriptors to be closed")
            (held,) = (first / "fd").iterdir()
            assert str(held.readlink()).startswith("pipe:")
            command = Path(f"/proc/{jailed.command_pid}")
            assert (first / "root").samefile(command / "root")
            assert not (first / "root").samefile("/")
    finally:
        os.close(namespace)


@pytest.mark.parametrize(
    ("jail", "error"),
    [
        (Jail(command=()), InvalidInput),
        (Jail(command=("busybox",)), InvalidInput),
        (Jail(command=("/nonexistent/program",)), NotFound),
        (Jail(command=("/etc/hostname",)), InvalidInput),
        (Jail(command=(BUSYBOX,), cgroup={"pids.max": "many"}), InvalidInput),
        (Jail(command=(BUSYBOX,), cgroup={"pids.max": "20", "memory.nothing": "1"}), InvalidInput),
        (Jail(command=(BUSYBOX,), cgroup={"pids.max": "20"}, cgroup_parent="pwt-nowhere"), InvalidInput),
        (Jail(command=(BUSYBOX,), rlimits={"nofile": 1 << 40}), InvalidInput),
        (Jail(command=(BUSYBOX,), devices=("/dev/nothing",)), InvalidInput),
        (Jail(command=(BUSYBOX,), uid=2**32 - 1), InvalidInput),
        # The group is full before the command is there.
        (Jail(command=(BUSYBOX,), cgroup={"pids.max": "1"}), KernelFailed),
    ],
)
def test_what_can_not_start_leaves_nothing(jail: Jail, error: type[Exception]) -> None:
    """An error at the start is one of ours, and neither a descriptor nor a cgroup nor a process stays."""
    before = open_fds(), _children()
    namespace = private.new_netns()
    try:
        with pytest.raises(error):
            start(jail, namespace)
    finally:
        os.close(namespace)
    assert (open_fds(), _children()) == before
    assert groups(os.getpid()) == []


def _children() -> set[str]:
    """Processes of ours that have not been waited for; other tests may have left some."""
    return {
        pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    }


@pytest.mark.parametrize("part", range(8))
def test_first_process_killed_while_it_is_made(part: int, calls: dict[str, int]) -> None:
    """When the jail's first process is killed at a call of its own, the starter says so; nothing is left."""
    with _starter("inside", 4 + part * (calls["inside"] - 4) // 8) as (process, marker):
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n"
        (first,) = (pid for pid in _processes(marker) if _number_inside(pid) == 1)
        os.kill(first, signal.SIGKILL)
        assert process.wait(20 * PATIENCE) == 1
        assert process.stderr is not None
        assert "KernelFailed: jail: ESRCH" in process.stderr.read()
        wait_until(lambda: not _processes(marker), 20, "the processes to end")
        assert _no_groups(process.pid)


def test_many_at_once() -> None:
    """Jails are made side by side, each with a limit of its own, and none is in another's way."""
    codes = [f"print({number})" for number in range(8)]
    options = ("--cgroup", "pids.max=32", "--cgroup", "memory.max=256M")
    running = [
        subprocess.Popen(jail_command(code, *options), stdout=subprocess.PIPE, text=True) for code in codes
    ]
    assert [process.communicate(timeout=60 * PATIENCE)[0] for process in running] == [
        f"{n}\n" for n in range(8)
    ]
    assert [process.returncode for process in running] == [0] * 8
    assert [group for process in running for group in groups(process.pid)] == []


def test_host_sees_nothing_of_it(netns_factory: NetnsFactory) -> None:
    """While it runs, a jail has made no mount, folder or name on the host, but for its cgroup."""
    with netns_factory().entered():
        before, links = mounts.standing(), socket.if_nameindex()
        with _running("print(1, flush=True)\nwhile True: signal.pause()", "--tmp", "4"):
            assert mounts.standing() == before
            assert socket.if_nameindex() == links


@contextmanager
def _running(code: str, *options: str, pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """A jail whose program has said something."""
    process = subprocess.Popen(
        jail_command(code, *options),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
    )
    try:
        assert process.stdout is not None
        wait_readable(process.stdout.fileno(), 30, "the jail")
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()  # not read to its end: what outlived us, which is a bug, would hold it


@contextmanager
def _starter(who: str, stop: int) -> Iterator[tuple[subprocess.Popen[str], bytes]]:
    """STARTER, and the mark that it and its forks carry in their environment."""
    marker = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER, who, str(stop)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PWT_JAIL": marker},
    )
    try:
        assert process.stdout is not None
        wait_readable(process.stdout.fileno(), 60, "the starter")
        yield process, marker.encode()
    finally:
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()  # not read to its end: what outlived us, which is a bug, would hold it


def _number_inside(pid: int) -> int:
    """A process's number in its own pid namespace; 0 for one that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    (line,) = (line for line in status.splitlines() if line.startswith("NSpid:"))
    return int(line.split()[-1])


def _processes(marker: bytes) -> list[int]:
    """Who carries the mark; the jail's command does not, and ends with its first process."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if marker in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue  # gone meanwhile
    return found


def _no_groups(pid: int) -> bool:
    return not groups(pid)
