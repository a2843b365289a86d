"""A terminal with ``portwright vm run --console -`` on it."""

from __future__ import annotations

import os
import pty
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from tests.deadline import wait_readable, wait_until
from tests.fix_daemon import PORTWRIGHT, Daemon
from tests.fix_netns import TestNetns
from tests.guests.conftest import BOOT_WITHIN, Image, no_port


class Terminal:
    """The end at which one sits; ``fd`` stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._heard = bytearray()

    def says(self, words: bytes) -> None:
        """Read until these have come, and go on after them next time."""
        while words not in self._heard:
            wait_readable(self._fd, BOOT_WITHIN, f"{words!r} after {bytes(self._heard)[-1000:]!r}")
            self._heard.extend(os.read(self._fd, 4096))
        del self._heard[: self._heard.index(words) + len(words)]

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)


@contextmanager
def guest_on_terminal(daemon: Daemon, host: TestNetns, image: Image, *options: str) -> Iterator[Terminal]:
    """The guest g1 with its console on a terminal.

    At the end ^A x has to end it, leave the terminal as it was, and no port.
    """
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    command = [
        *("nsenter", f"--net={host.path}", "--", str(PORTWRIGHT), "vm", "run", "--console", "-"),
        *("--kernel", str(image.kernel), "--initramfs", str(image.initramfs), "--name", "g1"),
        *("--memory", "128", "--accel", "tcg", *options),
    ]
    process = subprocess.Popen(
        command, env=daemon.env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    try:
        terminal = Terminal(ours)
        yield terminal
        terminal.type(b"\x01x")
        terminal.says(b"QEMU: Terminated")
        assert process.wait(30) == 0
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
    wait_until(partial(no_port, daemon), 10, "the guest's port to be gone")
