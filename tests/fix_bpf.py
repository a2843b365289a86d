"""Fixtures for BPF: programs compiled once per session, a bpffs, a veth pair to attach to."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import selectors
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from portwright.kernel import bpf

PROGS = Path(__file__).parent / "dataplane" / "progs"
TEST_FRAME = bytes(6) + b"\x02" * 6 + b"\x88\xb5" + bytes(50)
"""64 bytes of the local experimental ethertype, which tests/dataplane/progs/zoo.bpf.c counts."""

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="session")
def bpf_object(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compile ``tests/dataplane/progs/<name>.bpf.c`` when first asked; its object's path."""
    out = tmp_path_factory.mktemp("bpf")
    clang = shutil.which("clang")
    if clang is None:
        pytest.fail("clang is not installed (packaging/apt.txt)")

    def compiled(name: str) -> Path:
        target = out / f"{name}.bpf.o"
        if not target.exists():
            include = f"/usr/include/{platform.machine()}-linux-gnu"
            flags = ["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Werror", f"-I{include}"]
            source = PROGS / f"{name}.bpf.c"
            subprocess.run([clang, *flags, "-c", str(source), "-o", str(target)], check=True)
        return target

    return compiled


@pytest.fixture
def zoo(bpf_object: Callable[[str], Path]) -> Iterator[bpf.Collection]:
    """The collection of zoo.bpf.c, freshly loaded; closed at the end."""
    with bpf.Collection.load(bpf.CollectionSpec.load(bpf_object("zoo"))) as collection:
        yield collection


@pytest.fixture
def bpffs() -> Iterator[Path]:
    """An empty bpffs of the test's own; unmounted, with all pins, at the end."""
    path = Path(f"/tmp/pwt-{os.getpid()}-{uuid.uuid4().hex[:8]}-bpf")
    path.mkdir(mode=0o700)
    try:
        bpf.mount_bpffs(path)
        try:
            yield path
        finally:
            bpf.umount_bpffs(path)
    finally:
        path.rmdir()


@dataclass(frozen=True)
class Veth:
    """A veth pair in a namespace of its own, which the test's thread is in."""

    name: str
    ifindex: int
    peer_name: str
    peer_ifindex: int

    @contextmanager
    def sender(self, frame: bytes = TEST_FRAME) -> Iterator[Callable[[], None]]:
        """A function that transmits ``frame`` on the first end: the peer receives it (its ingress).

        A drop at the first end's egress is told to the sender as ENOBUFS: not a failure here.
        """
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind((self.name, 0))

            def one() -> None:
                try:
                    sock.send(frame)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise

            yield one

    def send(self, frame: bytes = TEST_FRAME, count: int = 1) -> None:
        """Transmit ``count`` frames, as :meth:`sender` does."""
        with self.sender(frame) as one:
            for _ in range(count):
                one()


def ip(*args: str) -> None:
    """Run ``ip``; a failure is the test's."""
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@contextmanager
def own_netns() -> Iterator[None]:
    """A new network namespace for this thread, gone with everything in it at the end."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.unshare(_CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        try:
            yield
        finally:
            if _libc.setns(home, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(home)


@pytest.fixture
def veth() -> Iterator[Veth]:
    """A veth pair, up; the thread is in its namespace until the end of the test."""
    with own_netns():
        ip("link", "add", "bpf0", "type", "veth", "peer", "name", "bpf1")
        # The peer first: an end that is opened without carrier gets its transmit queue later, from the
        # kernel's link watch, and drops without a word until then (net/sched/sch_generic.c: dev_activate).
        ip("link", "set", "bpf1", "up")
        ip("link", "set", "bpf0", "up")
        yield Veth("bpf0", socket.if_nametoindex("bpf0"), "bpf1", socket.if_nametoindex("bpf1"))


def records(ring: bpf.RingBuffer, count: int, timeout: float = 10) -> list[bytes]:
    """Wait on the ring's descriptor until ``count`` records came; fails at the deadline."""
    got: list[bytes] = []
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        selector.register(ring.epoll_fd, selectors.EVENT_READ)
        while len(got) < count:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                pytest.fail(f"only {len(got)} of {count} records came in {timeout} s")
            ring.consume(got.append)
    return got


def descriptors() -> set[str]:
    """What this process has open, by number."""
    return {path.name for path in Path("/proc/self/fd").iterdir()}
