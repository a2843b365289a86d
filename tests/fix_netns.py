"""pytest plugin: network namespaces for a test, gone when it ends.

Load it with ``pytest_plugins = ["tests.fix_netns"]`` in tests/conftest.py or ``-p tests.fix_netns``.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from portwright.kernel import netns
from tests.deadline import PATIENCE

_NAMED = Path("/run/netns")
_MS_BIND, _MNT_DETACH = 0x1000, 2
_libc = ctypes.CDLL(None, use_errno=True)


class TestNetns:
    """One namespace with ``lo`` up: ``fd`` (owned), ``path`` (a mount in /run/netns), ``name``.

    ``ip netns exec NAME`` and ``ip -n NAME`` work on it.
    """

    __test__ = False

    def __init__(self, name: str) -> None:
        """Make it; raises OSError and leaves nothing if the kernel refuses."""
        self.name = name
        self.path = str(_NAMED / name)
        self.fd = -1
        _NAMED.mkdir(parents=True, exist_ok=True)
        Path(self.path).touch(exist_ok=False)
        back = netns.self_fd()
        try:
            with netns.entered(back):  # its exit undoes our unshare
                _check(_libc.unshare(netns.CLONE_NEWNET), "unshare")
                self.fd = netns.self_fd()
                source = b"/proc/thread-self/ns/net"
                _check(_libc.mount(source, self.path.encode(), None, _MS_BIND, None), "mount")
        except OSError:
            self.close()
            raise
        finally:
            os.close(back)
        self.run(["ip", "link", "set", "lo", "up"])

    def run(
        self, command: Sequence[str], *, check: bool = True, input: str | None = None, timeout: float = 30
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside and return its result, text captured.

        It keeps our mounts: /sys/fs/bpf is there, but /sys/class/net shows the host's links
        (use ``ip netns exec`` for the opposite). With ``check`` a failure is an AssertionError
        that shows the output.
        """
        with self.entered():  # by our thread and not by nsenter: one exec less, which is dear in the lab
            result = subprocess.run(
                command,
                check=False,
                capture_output=True,
                text=True,
                input=input,
                timeout=timeout * PATIENCE,
            )
        if check and result.returncode:
            raise AssertionError(
                f"{' '.join(command)}: exit {result.returncode}\n{result.stdout}{result.stderr}"
            )
        return result

    def entered(self) -> netns.entered:
        """Return the context manager that puts this thread inside."""
        return netns.entered(self.fd)

    def close(self) -> None:
        """Take the name away and drop our descriptor; a second time does nothing."""
        _libc.umount2(self.path.encode(), _MNT_DETACH)
        Path(self.path).unlink(missing_ok=True)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


NetnsFactory = Callable[[], TestNetns]


@pytest.fixture
def netns_factory() -> Iterator[NetnsFactory]:
    """Make as many fresh namespaces as the test asks for; all are gone afterwards."""
    made: list[TestNetns] = []

    def make() -> TestNetns:
        fresh = TestNetns(f"pwt-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        made.append(fresh)
        return fresh

    yield make
    for fresh in made:
        fresh.close()


def open_fds() -> int:
    """Return how many descriptors this process has open (counting does not add to it)."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def where() -> str:
    """Return the calling thread's network namespace, as ``net:[4026531840]``."""
    return str(Path("/proc/thread-self/ns/net").readlink())


def _check(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
