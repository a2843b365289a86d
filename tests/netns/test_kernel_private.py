"""Namespaces and processes that leave nothing behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from portwright.kernel import netns, private
from tests.deadline import wait_until

pytestmark = pytest.mark.netns

#: A process that moves away and says what it sees there; it ends with its stdin.
AWAY = """
import os, sys
from pathlib import Path
from portwright.kernel import private
private.leave(Path("/run"))
Path("/run/mine").write_text("x")
print(sorted(os.listdir("/run")), len(os.listdir("/sys/class/net")) > 0, flush=True)
sys.stdin.read()
"""

#: A parent with a child of its own, which says its pid and waits.
PARENT = """
import os, signal
from portwright.kernel import private
child = private.fork()
if not child:
    print(os.getpid(), flush=True)
    signal.pause()
signal.pause()
"""


def test_a_new_namespace_has_loopback_and_no_name() -> None:
    """It is another one than ours, its lo is up, and it ends with its descriptor."""
    own = netns.self_fd()
    fd = private.new_netns()
    try:
        assert not netns.same(own, fd)
        cookie = netns.cookie(fd)
        with netns.entered(fd):
            done = subprocess.run(["ip", "-o", "link"], check=True, capture_output=True, text=True)
        assert len(done.stdout.splitlines()) == 1
        assert "LOOPBACK,UP" in done.stdout
        after = netns.self_fd()
        assert netns.same(own, after)
        os.close(after)
    finally:
        os.close(fd)
        os.close(own)
    assert netns.find_by_cookie(cookie) is None


def test_who_has_left_is_seen_by_nobody() -> None:
    """A process that left has an empty folder and namespaces of its own; ours show nothing of it."""
    before = _mounted_at("/run")
    with subprocess.Popen(
        [sys.executable, "-c", AWAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "['mine'] True\n"
        assert _mounted_at("/run") == before
        assert not Path("/run/mine").exists()
        for kind in ("net", "mnt"):
            assert (
                Path(f"/proc/{process.pid}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink()
            )
        process.stdin.close()
    assert process.returncode == 0


def _mounted_at(path: str) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if line.split()[4] == path]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent(number: signal.Signals) -> None:
    """However the parent ends, its child is gone."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        handle = os.pidfd_open(child)
        parent.send_signal(number)
        assert parent.wait(10) == -number
    try:
        wait_until(lambda: _ended(handle), 5, f"process {child} to end")
    finally:
        os.close(handle)


def _ended(handle: int) -> bool:
    """Whether its process is no more, or waits for somebody to take note of its end."""
    return bool(select.select([handle], [], [], 0)[0])
