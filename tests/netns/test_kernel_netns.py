"""Namespaces: what opens, which is which, and that a thread always comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from portwright.kernel import netns
from portwright.model.errors import InvalidInput, KernelFailed
from tests.deadline import wait_until
from tests.fix_netns import NetnsFactory, open_fds, where

pytestmark = pytest.mark.netns


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/proc/self/ns/mnt", "/nowhere", "", "/proc/self/ns", "a\0b"]
)
def test_only_a_network_namespace_opens(path: str) -> None:
    """Anything else is InvalidInput naming the field and the path, with nothing left open."""
    before = open_fds()
    with pytest.raises(InvalidInput) as caught:
        netns.open_netns(path)
    assert (caught.value.field, caught.value.value) == ("netns", path)
    assert open_fds() == before


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    """A path that leads to a FIFO is refused at once: a hostile caller can't hang the daemon."""
    os.mkfifo(tmp_path / "netns")
    with pytest.raises(InvalidInput):
        netns.open_netns(str(tmp_path / "netns"))


def test_a_name_whose_mount_is_gone_is_refused(netns_factory: NetnsFactory) -> None:
    """The empty file that an unmounted namespace leaves behind is no namespace."""
    ns = netns_factory()
    subprocess.run(["umount", ns.path], check=True)
    with pytest.raises(InvalidInput, match="not a namespace"):
        netns.open_netns(ns.path)


def test_descriptors_tell_namespaces_apart(netns_factory: NetnsFactory) -> None:
    """same() and cookie() agree: equal for two descriptors of one namespace, else different."""
    one, two = netns_factory(), netns_factory()
    again, own = netns.open_netns(one.path), netns.self_fd()
    try:
        assert netns.same(one.fd, again)
        assert not netns.same(one.fd, two.fd)
        assert netns.cookie(one.fd) == netns.cookie(again) > 0
        assert len({netns.cookie(fd) for fd in (one.fd, two.fd, own)}) == 3
        assert netns.is_netns(again)
        assert not os.get_inheritable(again)
    finally:
        os.close(again)
        os.close(own)


def test_is_netns_judges_any_descriptor(tmp_path: Path) -> None:
    """A descriptor from a peer may be anything: a pipe, a file, another kind of namespace."""
    fds = [*os.pipe(), os.open("/proc/self/ns/uts", os.O_RDONLY), os.open(tmp_path, os.O_RDONLY)]
    try:
        assert not any(netns.is_netns(fd) for fd in fds)
    finally:
        for fd in fds:
            os.close(fd)


def test_entering_moves_this_thread_only_and_nests(netns_factory: NetnsFactory) -> None:
    """Another thread stays where it is; leaving restores each level; a sysctl tells where we are."""
    one, two = netns_factory(), netns_factory()
    outside = where()
    seen: list[str] = []
    with one.entered():
        first = where()
        with two.entered():
            assert where() not in (outside, first)
            # A thread made here would inherit the namespace: the one that runs already must not move.
        assert where() == first
    assert where() == outside

    inside, checked = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(5)
        seen.append(where())
        checked.set()

    thread = threading.Thread(target=other)
    thread.start()
    with one.entered():
        inside.set()
        assert checked.wait(5)
    thread.join(5)
    assert seen == [outside]


def test_an_exception_inside_still_leads_back(netns_factory: NetnsFactory) -> None:
    """The body's exception passes on, the thread is home, and no descriptor is left."""
    ns = netns_factory()
    outside = where()
    before = open_fds()
    with pytest.raises(ZeroDivisionError), ns.entered():
        _ = 1 / 0
    assert where() == outside
    assert open_fds() == before


def test_what_is_no_namespace_cannot_be_entered() -> None:
    """KernelFailed, and the thread has not moved."""
    outside = where()
    with pytest.raises(KernelFailed), netns.entered(0):
        pytest.fail("must not get in")
    assert where() == outside


def test_if_the_way_back_is_lost_the_process_dies(netns_factory: NetnsFactory) -> None:
    """No code may run on in the wrong namespace: abort with a message, even under ``except``."""
    ns = netns_factory()
    script = (
        "import os, sys\n"
        "from portwright.kernel import netns\n"
        "try:\n"
        "    inside = netns.entered(netns.open_netns(sys.argv[1]))\n"
        "    with inside: os.close(inside._back)\n"
        "except BaseException: pass\n"
        "print('went on')\n"
    )
    command = [sys.executable, "-c", script, ns.path]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert result.returncode == -signal.SIGABRT
    assert "cannot leave a network namespace" in result.stderr
    assert "went on" not in result.stdout


def test_a_namespace_is_found_again_by_its_cookie(netns_factory: NetnsFactory) -> None:
    """By its mount, wherever that is; by a process in it; and not once it is gone."""
    ns = netns_factory()
    cookie = netns.cookie(ns.fd)
    found = netns.find_by_cookie(cookie)
    assert found is not None
    try:
        assert netns.same(found, ns.fd)
    finally:
        os.close(found)

    with subprocess.Popen(["nsenter", f"--net={ns.path}", "cat"], stdin=subprocess.PIPE) as inside:
        wait_until(lambda: _is_in(inside.pid, ns.fd), why="the process to be inside")
        ns.close()
        found = netns.find_by_cookie(cookie)
        assert found is not None
        assert netns.cookie(found) == cookie
        os.close(found)
        inside.communicate(b"")
    assert netns.find_by_cookie(cookie) is None


def test_an_odd_mount_path_is_found(netns_factory: NetnsFactory, tmp_path: Path) -> None:
    """A mount path with spaces and backslashes, escaped in mountinfo, is still found."""
    ns = netns_factory()
    odd = tmp_path / "a b\\040c"
    odd.touch()
    subprocess.run(["mount", "--bind", ns.path, odd], check=True)
    try:
        assert str(odd) in set(netns._candidates())
    finally:
        subprocess.run(["umount", odd], check=True)


def test_our_own_namespace_is_found_and_searching_leaks_nothing() -> None:
    """The thread's own namespace is found; a cookie of nobody is None; descriptors stay level."""
    own = netns.self_fd()
    cookie = netns.cookie(own)
    os.close(own)
    before = open_fds()
    found = netns.find_by_cookie(cookie)
    assert found is not None
    os.close(found)
    assert netns.find_by_cookie(2**64 - 1) is None
    assert open_fds() == before


def test_boot_id_is_one_line() -> None:
    """The boot's id is a UUID, the same each time."""
    assert netns.boot_id() == netns.boot_id()
    assert len(netns.boot_id()) == 36


def _is_in(pid: int, fd: int) -> bool:
    status, wanted = Path(f"/proc/{pid}/ns/net").stat(), os.fstat(fd)
    return (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino)
