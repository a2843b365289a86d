"""Token buckets that follow ports' limits, by a server that enforces Firecracker's API, a daemon played."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest

from portwright.api.errors import RequestTimeout
from portwright.kernel import news
from portwright.model.errors import DaemonUnavailable, PortwrightError
from portwright.model.port import Limits, NetnsRef, Owner, Port, PortState
from portwright.vmm.firecracker.api import PutBootSource
from portwright.vmm.firecracker.driver import Driver
from portwright.vmm.firecracker.follow import TRIES, LimitsFollower
from portwright.vmm.firecracker.guest import FirecrackerGuest
from portwright.vmm.firecracker.limits import fitted
from portwright.vmm.firecracker.nics import Nic
from portwright.vmm.qemu import bounded_file
from portwright.vmm.spec import GuestSpec
from tests.deadline import wait_until
from tests.firecracker_server import DeclaredTaps, Fault, FirecrackerServer

COOKIE = 7
TEN = Limits(egress_rate=10_000_000, egress_burst=1_000_000)
HUNDRED = Limits(egress_rate=100_000_000, egress_burst=10_000_000, ingress_rate=8_000_000)
Play = Callable[[Callable[["Lab"], Awaitable[None]]], None]
PATCH0 = ("PATCH", "/network-interfaces/eth0")


class Played:
    """The daemon's part: each port's limits, what it fails with first, and how often it was asked."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.limits = {"a" * 16: TEN, "b" * 16: Limits()}
        self.failures: list[PortwrightError] = []
        self.asked = 0

    async def ask(self, port_ids: Sequence[str]) -> Mapping[str, Limits]:
        self.asked += 1
        if self.failures:
            raise self.failures.pop(0)
        return {port_id: self.limits[port_id] for port_id in port_ids if port_id in self.limits}

    def set(self, limits: Limits, port: str = "a") -> None:
        """As `port set` does, word included."""
        self.limits[port * 16] = limits
        news.tell(self.run_dir, COOKIE)

    async def looked(self) -> None:
        """Wait until what was said so far has been looked at."""
        before = self.asked
        news.tell(self.run_dir, COOKIE)
        await until(lambda: self.asked > before, "the ports to be looked at")


class Lab:
    """A guest with two NICs that runs, and its follower."""

    def __init__(self, server: FirecrackerServer, guest: FirecrackerGuest, daemon: Played) -> None:
        self.server = server
        self.guest = guest
        self.daemon = daemon

    def rates(self, nic: str = "eth0") -> tuple[Fraction | int, Fraction | int]:
        """In bits per second as Firecracker has them, 0 for none: egress, ingress."""
        return _rate(self.server.nics[nic], "tx"), _rate(self.server.nics[nic], "rx")

    async def has(self, egress: int, ingress: int, nic: str = "eth0") -> None:
        """Wait until the NIC has these rates."""
        await until(lambda: self.rates(nic) == (egress, ingress), f"{egress} and {ingress} on {nic}")

    async def said(self, capsys: pytest.CaptureFixture[str], number: int) -> list[str]:
        """Wait for so many lines on stderr."""
        lines: list[str] = []

        def come() -> bool:
            lines.extend(capsys.readouterr().err.splitlines())
            return len(lines) >= number

        await until(come, f"{number} lines")
        assert len(lines) == number
        return lines

    def patches(self) -> list[str]:
        """The NICs whose limits were sent, and came."""
        return [path.rpartition("/")[2] for verb, path, _ in self.server.requests if verb == "PATCH"]


class Always(dict[tuple[str, str], Fault]):
    """Faults that are not used up."""

    def pop(self, key: Any, default: Any = None) -> Any:
        """Leave it."""
        return self.get(key, default)


def _rate(nic: dict[str, Any], side: str) -> Fraction | int:
    bucket = (nic.get(f"{side}_rate_limiter") or {}).get("bandwidth")
    return Fraction(bucket["size"] * 8000, bucket["refill_time"]) if bucket else 0


async def until(true: Callable[[], object], why: str) -> None:
    await asyncio.to_thread(wait_until, true, 20, why)


def _port(letter: str, ifname: str, limits: Limits) -> Port:
    here = NetnsRef(path="", cookie=COOKIE, boot_id="")
    return Port(
        port_id=letter * 16,
        network="n1",
        net_id=1,
        owner=Owner(kind="name", name="g1"),
        model="tcfilter",
        state=PortState.ATTACHED,
        ifname=ifname,
        rep_name=f"pw{letter * 8}",
        mac="02:00:00:00:00:01",
        mtu=1500,
        host=here,
        sandbox=here,
        limits=limits,
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FirecrackerServer]:
    taps = DeclaredTaps(tap0=False, tap1=False)
    with FirecrackerServer(tmp_path / "api.sock", taps) as process:
        yield process


def _process() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["cat"], stdin=subprocess.PIPE)


@contextlib.asynccontextmanager
async def running(server: FirecrackerServer, daemon: Played) -> AsyncIterator[Lab]:
    """Started with the limits TEN on eth0 and none on eth1, and followed; its process is ``cat``."""
    process = _process()
    guest = FirecrackerGuest(GuestSpec(name="g1", kernel="/vmlinux"), process, bounded_file("words"))
    ports = [_port("a", "eth0", TEN), _port("b", "eth1", Limits())]
    try:
        guest.driver = await Driver.connect(server.path, seconds=30)
        await guest.driver.configure(PutBootSource(kernel_image_path="/vmlinux"))
        for number, port in enumerate(ports):
            nic = Nic(iface_id=port.ifname, tap=f"tap{number}", limits=fitted(port.limits))
            await guest.driver.add_nic(nic)
        await guest.driver.boot()
        with news.heard(daemon.run_dir, COOKIE) as word:
            follower = LimitsFollower(guest, ports, daemon.ask, pause=0.001)
            async with follower.following(word):
                await until(lambda: daemon.asked, "the first look")
                yield Lab(server, guest, daemon)
    finally:
        await guest.quit()
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Played:
    (tmp_path / "vm").mkdir()
    return Played(tmp_path)


@pytest.fixture
def play(daemon: Played, server: FirecrackerServer) -> Play:
    """Run a scenario with a guest."""

    def run(scenario: Callable[[Lab], Awaitable[None]]) -> None:
        async def whole() -> None:
            async with running(server, daemon) as lab:
                await scenario(lab)

        asyncio.run(whole())

    return run


def test_buckets_are_as_the_limits_are(play: Play) -> None:
    """Raised, lowered and taken away, in both directions, exactly; the other NIC stays as it was."""

    async def scenario(lab: Lab) -> None:
        assert (lab.rates(), lab.rates("eth1")) == ((10_000_000, 0), (0, 0))
        for limits in (
            HUNDRED,
            Limits(egress_rate=1_000_001, ingress_rate=8_000_000),
            Limits(ingress_rate=9_000_000),
            Limits(),
            TEN,
            Limits(egress_burst=5),  # a burst of no rate limits nothing
        ):
            lab.daemon.set(limits)
            await lab.has(limits.egress_rate, limits.ingress_rate)
            assert lab.rates("eth1") == (0, 0)
        lab.daemon.set(HUNDRED, "b")
        await lab.has(100_000_000, 8_000_000, "eth1")
        assert lab.rates() == (0, 0)
        assert lab.patches() == ["eth0"] * 6 + ["eth1"]

    play(scenario)


def test_what_is_the_same_is_not_sent_again(play: Play) -> None:
    """A bucket that is sent is full: neither a word nor a burst that comes to the same bucket sends one."""

    async def scenario(lab: Lab) -> None:
        for _ in range(3):
            await lab.daemon.looked()
        lab.daemon.set(msgspec.structs.replace(TEN, egress_burst=1_200_000))
        await lab.daemon.looked()
        lab.daemon.set(HUNDRED)
        await lab.has(100_000_000, 8_000_000)
        assert lab.patches() == ["eth0"]

    play(scenario)


def test_what_changed_before_anybody_listened_is_sent(play: Play, daemon: Played) -> None:
    """Between a port's making and the guest's start no word is heard, and none is needed."""
    daemon.limits["b" * 16] = HUNDRED

    async def scenario(lab: Lab) -> None:
        await lab.has(100_000_000, 8_000_000, "eth1")

    play(scenario)


def test_daemon_that_does_not_answer_is_asked_again(
    play: Play, daemon: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    """What changed while it was away or too slow is sent once it answers, without another word; that it was
    away is nothing to tell of, that it was slow is said once."""
    daemon.limits["a" * 16] = HUNDRED
    daemon.failures += [DaemonUnavailable("/run/x.sock", "connection refused")] * 5

    async def scenario(lab: Lab) -> None:
        await lab.has(100_000_000, 8_000_000)
        assert capsys.readouterr().err == ""
        daemon.failures += [RequestTimeout("port.show", 60.0)] * 3
        daemon.set(TEN)
        await lab.has(10_000_000, 0)

    play(scenario)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "portwright: guest 'g1': the daemon doesn't say its ports' limits, and is asked again: "
        f"{RequestTimeout('port.show', 60.0)}"
    )


def test_what_is_refused_once_is_asked_for_again(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    """And said."""

    async def scenario(lab: Lab) -> None:
        lab.server.faults[PATCH0] = Fault("refuse")
        lab.daemon.set(HUNDRED)
        await lab.has(100_000_000, 8_000_000)
        assert lab.patches() == ["eth0"]  # and the one that the fault took

    play(scenario)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "portwright: guest 'g1': eth0: Firecracker has not taken the port's new limits, it is asked again: "
        "Firecracker refused PATCH /network-interfaces/eth0 "
    )


@pytest.mark.parametrize("kind", ["refuse", "close", "garbage"])
def test_what_fails_again_and_again_ends(play: Play, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """After so many tries it is left until there is a word; the other NIC and the guest are not held up."""

    async def scenario(lab: Lab) -> None:
        lab.server.faults = Always({PATCH0: Fault(kind)})
        lab.daemon.limits["b" * 16] = Limits(egress_rate=5_000_000)
        lab.daemon.set(HUNDRED)
        await lab.has(5_000_000, 0, "eth1")
        lines = await lab.said(capsys, TRIES)
        assert ["it is asked again" in line for line in lines] == [True] * (TRIES - 1) + [False]
        assert "its buckets may stay as they were until those change again" in lines[-1]
        before = lab.daemon.asked
        lab.server.faults = {}
        assert lab.rates() == (10_000_000, 0)
        assert not lab.guest.gone.is_set()
        lab.daemon.set(HUNDRED)
        await lab.has(100_000_000, 8_000_000)
        assert lab.daemon.asked == before + 1  # nobody had asked meanwhile

    play(scenario)


def test_limits_that_no_bucket_has_are_said_once(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    """Beyond 64 bits: Firecracker isn't asked, and the next limits are sent."""

    async def scenario(lab: Lab) -> None:
        lab.daemon.set(Limits(egress_rate=2**63 - 1))
        (line,) = await lab.said(capsys, 1)
        assert "the smallest bucket of exactly this rate is beyond 64 bits" in line
        assert lab.patches() == []
        lab.daemon.set(HUNDRED)
        await lab.has(100_000_000, 8_000_000)

    play(scenario)


def test_deleted_port_is_left_alone(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    """Its NIC keeps what it has; the others are followed."""

    async def scenario(lab: Lab) -> None:
        del lab.daemon.limits["a" * 16]
        lab.daemon.set(HUNDRED, "b")
        await lab.has(100_000_000, 8_000_000, "eth1")
        assert lab.rates() == (10_000_000, 0)

    play(scenario)
    assert capsys.readouterr().err == ""


def test_server_that_is_gone(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    """Is said while its process lives; nothing is said where that has ended, which others tell of."""

    async def scenario(lab: Lab) -> None:
        lab.server.die()
        lab.daemon.set(HUNDRED)
        for line in await lab.said(capsys, TRIES):
            assert "no Firecracker on" in line
        assert not lab.guest.gone.is_set()
        os.kill(lab.guest.pid, signal.SIGKILL)
        lab.daemon.set(TEN)
        for _ in range(3):  # each begins when the one before it has ended
            await lab.daemon.looked()

    play(scenario)
    assert capsys.readouterr().err == ""


def test_following_ends_in_the_middle_of_a_request(play: Play, server: FirecrackerServer) -> None:
    """A guest's end does not wait for an answer of its API."""

    async def scenario(lab: Lab) -> None:
        lab.server.faults[PATCH0] = Fault("hang")
        lab.daemon.set(HUNDRED)
        await until(server.hanging.is_set, "the request")

    play(scenario)
