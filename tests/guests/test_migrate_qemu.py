"""``port migrate``: a real guest under QEMU leaves a bridge while it runs."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from portwright.kernel import tap
from portwright.vmm.driver import Console
from portwright.vmm.qemu import Guest
from portwright.vmm.spec import GuestSpec, Nic
from tests.deadline import wait_until
from tests.fix_daemon import Daemon
from tests.fix_netns import NetnsFactory, TestNetns
from tests.guests.conftest import Image, booted
from tests.netns import bridge_lab as lab
from tests.netns.bridge_lab import BRIDGE, HOST4, HOST6, Member
from tests.netns.policy_lab import connect

pytestmark = [pytest.mark.guests, pytest.mark.slow, pytest.mark.timeout(300)]

TAP, MAC, IP4, IP6 = "tap51lab", "02:00:00:00:88:51", "10.88.0.51", "fd88::51"
ECHO = 7
CHUNK, PACE = 512, 0.005


class Talk:
    """A connection to the guest's echo: what is sent, 512 bytes each 5 ms, comes back byte by byte."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._over = sock, threading.Event()
        self._heard, self._longest, self._broken = 0, 0.0, ""
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        sent, last = 0, time.monotonic()
        due = last
        while not self._over.is_set():
            now = time.monotonic()
            if now >= due and sent - self._heard < 64 * CHUNK:
                sent += self._sock.send(bytes((sent + i) % 251 for i in range(CHUNK)))
                due = now + PACE
            if not select.select([self._sock], [], [], PACE)[0]:
                continue
            data = self._sock.recv(65536)
            now = time.monotonic()
            with self._lock:
                if not data or any(b != (self._heard + i) % 251 for i, b in enumerate(data)):
                    self._broken = "closed" if not data else "another byte than was sent"
                    return
                self._heard += len(data)
                self._longest, last = max(self._longest, now - last), now

    def longest(self) -> float:
        """The longest time without a byte since the last call, once more came; AssertionError if it broke."""
        with self._lock:
            before = self._heard
        wait_until(lambda: self._broken or self._heard > before, 20, "the guest's echo to go on")
        with self._lock:
            assert not self._broken, self._broken
            found, self._longest = self._longest, 0.0
        return found

    def heard(self) -> int:
        """How many bytes came back."""
        return self._heard

    def close(self) -> None:
        """End it."""
        self._over.set()
        self._thread.join()


@contextmanager
def talk(ns: TestNetns, address: str) -> Iterator[Talk]:
    """One from inside ``ns``."""
    with closing(connect(ns, address, ECHO, timeout=10)) as sock, closing(Talk(sock)) as made:
        yield made


def test_a_guest_under_qemu_leaves_a_bridge(
    daemon: Daemon,
    netns_factory: NetnsFactory,
    image: Image,
    console: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Its connections to a container and to the host go on, an idle one too, both families; its process and
    its tap are the same. The gap is compared with the longest of a second before: the guest is emulated."""
    host = daemon.host
    lab.make_bridge(host)
    lab.network(daemon)
    tap.create(host.fd, TAP)
    lab.ip(host, f"link set {TAP} master {BRIDGE} up")
    spec = GuestSpec(
        name="g1",
        kernel=str(image.kernel),
        initramfs=str(image.initramfs),
        append=f"portwright.nic=eth0,{MAC},1500 portwright.addr=eth0,{IP4}/24 portwright.addr=eth0,{IP6}/64 "
        f"portwright.route=eth0,0.0.0.0/0,via={HOST4} portwright.route=eth0,::/0,via={HOST6} "
        f"portwright.echo={ECHO}",
        memory=128,
        nics=(Nic(tap=TAP, mac=MAC, mtu=1500),),
        accel="tcg",
    )

    async def run(out: int, nothing: int) -> None:
        guest = await Guest.start(spec, host.fd, Console(nothing, out))
        try:
            await asyncio.to_thread(move, guest)
        finally:
            await guest.quit()

    def move(guest: Guest) -> None:
        pid = guest.pid
        booted(console)
        box = Member(netns_factory(), host, 12)
        for address in (IP4, IP6):  # the host hears of both
            ping = ["ping", "-n", "-c1", "-W1", address]
            wait_until(lambda p=ping: host.run(p, check=False).returncode == 0, 20, "the guest to answer")  # type: ignore[misc]  # bound at once
        with ExitStack() as stack:
            idle = stack.enter_context(closing(connect(box.ns, IP4, ECHO, timeout=10)))
            talks = [stack.enter_context(talk(ns, to)) for ns, to in ((box.ns, IP4), (host, IP6))]
            wait_until(lambda: all(t.heard() > 200 * CHUNK for t in talks), 30, "a second of traffic")
            noise = max(t.longest() for t in talks)
            with daemon.client() as client:
                done = client.port_migrate(BRIDGE, remove_bridge=True)
            wait_until(partial(_more, talks, [t.heard() for t in talks]), 30, "traffic after the move")
            gap = max(t.longest() for t in talks)
            idle.settimeout(10)
            idle.sendall(b"still there?")
            assert idle.recv(64) == b"still there?"
            moved = next(p for p in done.bridges[0].ports if p.adopted and p.adopted.link == TAP)
            assert (moved.mac, {a.address for a in moved.addresses}) == (MAC, {IP4, IP6})
            assert BRIDGE not in lab.names(host)
            assert guest.pid == pid
            os.kill(pid, 0)
        lab.judge(noise, [gap], record_property)

    with console.open("wb") as out, Path(os.devnull).open("rb") as nothing:
        asyncio.run(run(out.fileno(), nothing.fileno()))


def _more(talks: list[Talk], before: list[int]) -> bool:
    return all(t.heard() > was + 100 * CHUNK for t, was in zip(talks, before, strict=True))
