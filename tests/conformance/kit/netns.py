"""Throw-away network namespaces, held by a bind mount and entered by a thread or by ``nsenter``."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MNT_DETACH = 0x2
NSENTER = shutil.which("nsenter") or "/usr/bin/nsenter"

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: object) -> None:
    """Call a libc function that returns -1 on failure; raises OSError with its errno."""
    if getattr(_libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def in_thread(function: Callable[[], T]) -> T:
    """Run ``function`` in a thread of its own, which may leave its namespace; re-raises what it raised.

    A thread that has called setns(2) must not be used again, so each call gets a new one.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def body() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001  # handed to the caller's thread, whatever it is
            failures.append(error)

    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


class Netns:
    """A network namespace with a path. ``delete`` may be called twice; a live process keeps it alive."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, *, loopback: bool = True) -> Netns:
        """Make a namespace bound at ``path`` (which must not exist); ``lo`` is up if ``loopback``."""
        path.touch(exist_ok=False)

        def make() -> None:
            _call("unshare", CLONE_NEWNET)
            source = f"/proc/self/task/{threading.get_native_id()}/ns/net"
            _call("mount", source.encode(), str(path).encode(), b"none", MS_BIND, None)

        try:
            in_thread(make)
        except BaseException:
            path.unlink()
            raise
        self = cls(path)
        if loopback:
            self.run(["ip", "link", "set", "lo", "up"])
        return self

    def delete(self) -> None:
        """Unbind and remove the path; the kernel frees the namespace once nothing else holds it."""
        if self.path.exists():
            _call("umount2", str(self.path).encode(), MNT_DETACH)
            self.path.unlink()

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` inside: sockets that it opens stay in this namespace for their whole life."""

        def body() -> T:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _call("setns", fd, CLONE_NEWNET)
            finally:
                os.close(fd)
            return function()

        return in_thread(body)

    def argv(self, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` inside."""
        return [NSENTER, f"--net={self.path}", "--", *command]

    def run(self, command: Sequence[str], *, check: bool = True, stdin: str = "") -> str:
        """Run a command inside; its standard output. RuntimeError with its stderr if it failed."""
        done = subprocess.run(
            self.argv(command), input=stdin, capture_output=True, text=True, timeout=30, check=False
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def ip_batch(self, *lines: str) -> None:
        """Run several ``ip`` commands in one process; stops at the first that fails."""
        self.run(["ip", "-batch", "-"], stdin="\n".join(lines) + "\n")

    def write_sysctl(self, name: str, value: str) -> None:
        """Write ``/proc/sys/net/<name>`` of this namespace."""
        self.call(lambda: Path("/proc/sys/net", name).write_text(value))

    def read_sysctl(self, name: str) -> str:
        """Read ``/proc/sys/net/<name>`` of this namespace, without the newline."""
        return self.call(lambda: Path("/proc/sys/net", name).read_text().strip())
