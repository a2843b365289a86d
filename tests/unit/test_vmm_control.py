from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from portwright.api import frames
from portwright.api.calls import Call
from portwright.api.registry import Registry
from portwright.api.request import Request
from portwright.api.server import Server
from portwright.model.errors import Conflict, DaemonUnavailable, InvalidInput, NotFound
from portwright.vmm import control
from portwright.vmm.agent import Agent
from portwright.vmm.contract import (
    CONTRACT,
    CardHeld,
    GuestLost,
    NicFacts,
    PlugParams,
    ShowParams,
    Started,
    UnplugParams,
)
from tests.deadline import wait_readable
from tests.fix_netns import open_fds

NIC = NicFacts(
    ifname="eth1",
    port_id="0123456789abcdef",
    rep="pw01234567",
    network="n1",
    tap="tap01234567",
    mac="02:00:00:00:00:01",
    mtu=1500,
    addresses=("10.0.0.2", "fd00::2"),
)
GUEST = Started(name="g1", pid=4711, accel="tcg", nics=(NIC,))
SHOW = Call("vm.show", ShowParams(), Started)


class Played:
    """A guest's methods, played; counts what reached them."""

    def __init__(self) -> None:
        self.plugged: list[PlugParams] = []
        self.unplugged: list[UnplugParams] = []
        self.hold = asyncio.Event()

    def __getattr__(self, name: str) -> Callable[[Any, Request], Awaitable[Any]]:
        if not name.startswith("vm_"):
            raise AttributeError(name)

        async def other(_params: Any, _request: Request) -> None:
            raise NotFound("method", name)

        return other

    async def vm_show(self, _params: ShowParams, _request: Request) -> Started:
        """Who it is."""
        return GUEST

    async def vm_plug(self, params: PlugParams, _request: Request) -> NicFacts:
        """Waits, for a network of that name."""
        self.plugged.append(params)
        if params.network == "slow":
            await self.hold.wait()
        return NIC

    async def vm_unplug(self, params: UnplugParams, _request: Request) -> NicFacts:
        """Refused."""
        self.unplugged.append(params)
        raise CardHeld("g1", params.ifname, params.patience)


@contextlib.asynccontextmanager
async def playing(run_dir: Path, listener: socket.socket) -> Any:
    """The guest behind that listener."""
    played = Played()
    registry = Registry(played, version="0", contract=CONTRACT)
    async with Server("", registry.dispatch, listener=listener, max_connections=4, idle_timeout=2):
        yield played


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run directory, of which nothing may be left but the folder of sockets."""
    yield tmp_path
    assert [path.name for path in tmp_path.iterdir()] in ([], ["vm"])
    assert list(tmp_path.glob("vm/*")) == []


def test_a_guest_is_asked(run_dir: Path) -> None:
    """A guest is found by its name while it listens, is asked, and its errors are those that it raised; its
    socket is for nobody else, and gone at its end."""

    async def check() -> None:
        with control.claimed(run_dir, "g1") as listener:
            mode = control.path(run_dir, "g1").stat().st_mode
            assert (stat.S_IMODE(mode), stat.S_ISSOCK(mode)) == (0o600, True)
            assert stat.S_IMODE(control.folder(run_dir).stat().st_mode) == 0o700
            async with playing(run_dir, listener) as played:
                assert await control.ask(run_dir, "g1", SHOW, within=5) == GUEST
                assert await control.show_all(run_dir) == ([GUEST], [])
                plug = Call("vm.plug", PlugParams(network="n1", queues=2, labels={"a": "b"}), NicFacts)
                assert await control.ask(run_dir, "g1", plug, within=5) == NIC
                assert played.plugged == [PlugParams(network="n1", queues=2, labels={"a": "b"})]
                unplug = Call("vm.unplug", UnplugParams(ifname="eth1", patience=3), NicFacts)
                with pytest.raises(CardHeld, match="did not let go of eth1 within 3 s") as caught:
                    await control.ask(run_dir, "g1", unplug, within=5)
                assert caught.value.facts() == {"guest": "g1", "ifname": "eth1", "seconds": 3}
                with pytest.raises(NotFound, match="guest 'g2' does not exist"):
                    await control.ask(run_dir, "g2", SHOW, within=5)
                with pytest.raises(NotFound):
                    await control.ask(run_dir, "../vm/g1", SHOW, within=5)
        assert control.names(run_dir) == []

    asyncio.run(check())


def test_slow_guest_is_named(run_dir: Path) -> None:
    """A guest that does not answer in time, or goes away, is an error that names it, and hides no other."""

    async def check() -> None:
        with control.claimed(run_dir, "g1") as listener, control.claimed(run_dir, "g2"):
            async with playing(run_dir, listener) as played:
                slow = Call("vm.plug", PlugParams(network="slow"), NicFacts)
                with pytest.raises(GuestLost, match=r"guest 'g1' has not answered vm\.plug"):
                    await control.ask(run_dir, "g1", slow, within=0.05)
                assert len(played.plugged) == 1
                control_shown = await control.show_all(run_dir)  # g2 only listens
                assert control_shown[0] == [GUEST]
                (problem,) = control_shown[1]
                assert problem.startswith("guest 'g2' has not answered vm.show (within ")
                played.hold.set()

    before, control._SHOW_WITHIN = control._SHOW_WITHIN, 0.2  # type: ignore[misc]  # less to wait for
    try:
        asyncio.run(check())
    finally:
        control._SHOW_WITHIN = before  # type: ignore[misc]  # as it was


@pytest.mark.parametrize(
    ("method", "params", "field"),
    [
        ("vm.plug", {"queues": 0}, "queues"),
        ("vm.plug", {"queues": 257}, "queues"),
        ("vm.plug", {"queues": True}, "queues"),
        ("vm.plug", {"network": ""}, "network"),
        ("vm.plug", {"labels": {"a": 1}}, "labels[...]"),
        ("vm.plug", {"netns": "x"}, "netns"),
        ("vm.unplug", {}, "ifname"),
        ("vm.unplug", {"ifname": "eth1/../lo"}, "ifname"),
        ("vm.unplug", {"ifname": "eth1", "patience": -1}, "patience"),
        ("vm.unplug", {"ifname": "eth1", "patience": 1e9}, "patience"),
    ],
)
def test_wrong_requests_reach_nobody(
    run_dir: Path, method: str, params: dict[str, object], field: str
) -> None:
    """A request with a wrong parameter is refused by the parameter's name before anything is done."""

    async def check() -> None:
        with control.claimed(run_dir, "g1") as listener:
            async with playing(run_dir, listener) as played:
                call: Call[Any] = Call(method, params, NicFacts)  # type: ignore[arg-type]  # hostile
                with pytest.raises(InvalidInput) as caught:
                    await control.ask(run_dir, "g1", call, within=5)
                assert caught.value.field == field
                assert played.plugged == played.unplugged == []

    asyncio.run(check())


def test_hostile_bytes(run_dir: Path) -> None:
    """Bytes that are no frames, frames that are too large, methods of the daemon and descriptors are refused;
    connections that say nothing are dropped; no descriptor stays, and the guest answers as before."""

    async def check() -> None:
        with control.claimed(run_dir, "g1") as listener:
            async with playing(run_dir, listener) as played:
                for data in (
                    os.urandom(4096),
                    frames.HEADER.pack(frames.MAX_REQUEST + 1, frames.JSON_REQUEST),
                    frames.encode(frames.JSON_REQUEST, b"{"),
                    frames.encode(frames.JSON_REQUEST, b'{"v":1,"id":1,"method":"node.stop","params":{}}'),
                    frames.encode(frames.CNI_REQUEST, b"x"),
                    frames.encode(frames.JSON_REQUEST, b"[" * 100_000),
                    b"\0",  # and no more
                ):
                    reader, writer = await asyncio.open_unix_connection(control.path(run_dir, "g1"))
                    sock = writer.get_extra_info("socket")
                    with socket.socket(fileno=os.dup(sock.fileno())) as raw:
                        socket.send_fds(raw, [data[:1]], [0, 1])
                    writer.write(data[1:])
                    with contextlib.suppress(ConnectionError):
                        await writer.drain()
                        writer.write_eof()
                        await asyncio.wait_for(reader.read(), 10)
                    writer.close()
                    with contextlib.suppress(ConnectionError):
                        await writer.wait_closed()
                assert await control.ask(run_dir, "g1", SHOW, within=5) == GUEST
                assert played.plugged == played.unplugged == []

    before = open_fds()
    asyncio.run(check())
    assert open_fds() == before


def test_name_is_one_guest(run_dir: Path) -> None:
    """A name that runs is refused to another guest, what runs stays; what was killed is nobody's name."""
    with control.claimed(run_dir, "g1"):
        with pytest.raises(Conflict, match="guest 'g1': is running; choose another --name"):
            control.claimed(run_dir, "g1").__enter__()
        assert control.names(run_dir) == ["g1"]
        control.sweep(run_dir, "g1")
        assert control.names(run_dir) == ["g1"]
    code = (
        "import os, signal, sys, pathlib; from portwright.vmm import control\n"
        "with control.claimed(pathlib.Path(sys.argv[1]), 'g1'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    for remove in (lambda: control.sweep(run_dir, "g1"), lambda: control.names(run_dir)):
        subprocess.run([sys.executable, "-c", code, str(run_dir)], check=False)
        assert control.path(run_dir, "g1").is_socket()
        remove()
        assert list(control.folder(run_dir).iterdir()) == []
    subprocess.run([sys.executable, "-c", code, str(run_dir)], check=False)
    with control.claimed(run_dir, "g1"):
        assert control.names(run_dir) == ["g1"]


def test_many_claim_one_name(run_dir: Path) -> None:
    """Of many that claim a name at once, with a stale socket there, one gets it, the others are refused."""
    control.folder(run_dir).mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(control.path(run_dir, "g1")))
    got: list[str] = []
    held, start = threading.Event(), threading.Barrier(8)

    def claim() -> None:
        start.wait()
        try:
            with control.claimed(run_dir, "g1"):
                got.append("it")
                held.wait(10)
        except Conflict:
            got.append("no")
            if got.count("no") == 7:
                held.set()

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == ["it", *["no"] * 7]


def test_places_that_hold_no_socket(tmp_path: Path) -> None:
    """A path too long for a socket is refused by the name; what is no socket is never removed; without a run
    directory there is no daemon, and no guest."""
    with pytest.raises(InvalidInput, match="longer than a Unix socket's 107 bytes"):
        control.claimed(tmp_path, "g" * 100).__enter__()
    with pytest.raises(DaemonUnavailable):
        control.claimed(tmp_path / "none", "g1").__enter__()
    assert control.names(tmp_path / "none") == []
    control.folder(tmp_path).mkdir()
    control.path(tmp_path, "g1").write_text("precious")
    with pytest.raises(Conflict):
        control.claimed(tmp_path, "g1").__enter__()
    control.sweep(tmp_path, "g1")
    assert control.names(tmp_path) == ["g1"]
    assert asyncio.run(control.show_all(tmp_path)) == ([], [])
    assert control.path(tmp_path, "g1").read_text() == "precious"


def test_words_wait_for_the_guest() -> None:
    """Lines that the guest has not read wait in order, as many as are bounded; what is beyond is refused
    whole; and at the hypervisor's end nothing breaks."""

    async def check() -> None:
        with contextlib.closing(Agent()) as agent:
            told = 0
            while agent.tell(f"portwright.nic=eth{told} {'x' * 1000}"):
                told += 1
                assert told < 10_000
            heard = b""
            agent.far.setblocking(False)
            for _ in range(2):  # what its socket held, and what waited here
                with contextlib.suppress(BlockingIOError):
                    while data := agent.far.recv(1 << 20):
                        heard += data
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            lines = heard.split(b"\n")
            assert [line.split()[0] for line in lines[:-1]] == [
                f"portwright.nic=eth{number}".encode() for number in range(told)
            ]
            assert agent.tell("again")
            wait_readable(agent.far.fileno())
            agent.far.close()
            assert agent.tell("to nobody")

    asyncio.run(check())
