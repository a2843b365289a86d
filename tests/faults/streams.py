"""Transfers that must not notice: paced TCP streams with every byte checked, and a control.

How long a stall may be, and why. Nothing that a stream needs is in the daemon: programs, maps, routes and
nftables rules are the kernel's. Whatever a daemon does, its packets go on, so a stall of *ours* would be a
moment without program, map entry, route or rule. TCP repeats a lost packet after 200 ms at the earliest
(TCP_RTO_MIN) unless later ones tell it sooner: an outage shows as a gap of its own length, rounded up to
that (one of 700 ms, made on purpose, showed as 2 s). What also makes gaps is this machine: two cores, shared
with a starting daemon. So a stream of the same pace on the loopback of the world's namespace, where nothing
of ours is, runs beside as the control. The bound: no gap longer than ``BOUND`` above the control's longest
in the same interval and the one before (two processes do not wait for a core at the very same moment).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.deadline import PATIENCE, wait_readable, wait_until
from tests.fix_daemon import WORLD4, Sandbox
from tests.fix_netns import TestNetns

PEER = Path(__file__).with_name("stream_peer.py")
BOUND = 0.3 * PATIENCE  # seconds
PORT = 5999


class Stream:
    """One running stream; ``check`` says what is wrong with it since the last time."""

    def __init__(self, name: str, source: TestNetns, target: TestNetns, address: str, port: int) -> None:
        self.name = name
        self._server = _peer(target, "serve", address, port)
        self._octets = 0
        with contextlib.ExitStack() as started:
            started.callback(_end, self._server)
            assert self._line(self._server) == "ready"
            self._client = _peer(source, "send", address, port)
            started.callback(_end, self._client)
            wait_until(lambda: bool(self.report()["octets"]), 10, f"stream {name} to run")
            started.pop_all()

    def report(self) -> dict[str, float]:
        """``octets`` so far, the longest ``gap`` since the last report in seconds, ``closed``."""
        assert self._server.poll() is None, f"stream {self.name}: a byte was not the one that was sent"
        assert self._server.stdin is not None
        self._server.stdin.write("report\n")
        self._server.stdin.flush()
        found: dict[str, float] = json.loads(self._line(self._server))
        return found

    def advance(self) -> float:
        """The longest gap since the last time; AssertionError if the stream broke or stands still."""
        found = self.report()
        gap = found["gap"]
        if found["octets"] == self._octets:  # asked twice at once: give it its turn
            found = wait_until(self._moved, 10, f"stream {self.name} to go on")[0]
            gap = max(gap, found["gap"])
        assert not found["closed"], f"stream {self.name} was closed"
        self._octets = int(found["octets"])
        return gap

    def _moved(self) -> list[dict[str, float]]:
        found = self.report()
        return [found] if found["octets"] > self._octets or found["closed"] else []

    def close(self) -> int:
        """End both; how many segments were sent again."""
        try:
            assert self._client.stdin is not None
            self._client.stdin.close()
            again = self._line(self._client)
        finally:
            _end(self._client)
            _end(self._server)
        return int(again)

    def _line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        wait_readable(process.stdout.fileno(), 15, f"stream {self.name}")
        return process.stdout.readline().strip()


class Witness:
    """Streams through ports that nobody touches, and the control."""

    def __init__(self, streams: list[Stream], control: Stream) -> None:
        self.streams, self.control = streams, control
        self.longest = self.noise = 0.0
        self._before = 0.0

    def check(self) -> None:
        """AssertionError if any stream broke, or stalled for longer than the bound since the last time."""
        now = self.control.advance()
        noise, self._before = max(now, self._before), now
        self.noise = max(self.noise, now)
        for stream in self.streams:
            gap = stream.advance()
            self.longest = max(self.longest, gap)
            assert gap <= BOUND + noise, (
                f"stream {stream.name} stalled for {gap * 1e3:.0f} ms (control: {noise * 1e3:.0f} ms)"
            )

    def sentence(self) -> str:
        """The figures so far."""
        return f"longest stall {self.longest * 1e3:.0f} ms (control {self.noise * 1e3:.0f} ms)"


@contextlib.contextmanager
def witness(a: Sandbox, b: Sandbox, world: TestNetns) -> Iterator[Witness]:
    """IPv4 from ``a`` to ``b``, IPv6 from ``b`` to ``a`` (fast path), ``a`` to the world (masqueraded)."""
    with contextlib.ExitStack() as stack:

        def make(name: str, source: TestNetns, target: TestNetns, address: str, port: int) -> Stream:
            made = Stream(name, source, target, address, port)
            stack.callback(made.close)
            return made

        yield Witness(
            [
                make("port to port, IPv4", a.ns, b.ns, b.ip4, PORT),
                make("port to port, IPv6", b.ns, a.ns, a.ip6, PORT),
                make("port to world, masqueraded", a.ns, world, WORLD4, PORT),
            ],
            make("control", world, world, "127.0.0.1", PORT + 1),
        )


def _peer(ns: TestNetns, role: str, address: str, port: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            "nsenter",
            f"--net={ns.path}",
            "--",
            sys.executable,
            "-I",
            "-S",
            str(PEER),
            role,
            address,
            str(port),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def _end(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
