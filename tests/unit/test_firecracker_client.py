from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from portwright.model.errors import InvalidInput, PortwrightError
from portwright.vmm.firecracker.answers import Instance, Version
from portwright.vmm.firecracker.api import (
    GetConfig,
    GetInstance,
    GetVersion,
    PatchVm,
    PutBootSource,
    PutMmds,
    PutNetworkInterface,
    PutVsock,
    Request,
)
from portwright.vmm.firecracker.client import Client
from portwright.vmm.firecracker.errors import (
    VmmLost,
    VmmProtocol,
    VmmRefused,
    VmmTimeout,
    VmmUnavailable,
)
from tests.deadline import wait_until
from tests.firecracker_server import DeclaredTaps, Fault, FirecrackerServer

VERSION = ("GET", "/version")
SHORT = 0.3  # what the client waits for a server that never ends


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FirecrackerServer]:
    """A process that was just started."""
    with FirecrackerServer(tmp_path / "fc.sock", DeclaredTaps(tap0=False)) as running:
        yield running


def sent(server: FirecrackerServer, request: Request, **options: Any) -> Any:
    """The answer to one request of a fresh client."""
    return asyncio.run(Client(server.path, **options).send(request))


def open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_answers_come_as_values(server: FirecrackerServer) -> None:
    """GET / and /version are read into their structs, a PUT has no answer."""

    async def talk() -> None:
        client = Client(server.path)
        assert await client.ask(GetVersion(), Version) == Version(firecracker_version="1.16.1")
        assert (await client.ask(GetInstance(), Instance)).state == "Not started"
        assert await client.send(PutVsock(guest_cid=3, uds_path="v.sock")) is None

    asyncio.run(talk())

    assert server.requests[-1] == ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v.sock"})


def test_a_refusal_says_what_was_asked_and_why(server: FirecrackerServer) -> None:
    """400 becomes an error with the request, its body and Firecracker's own sentence."""
    with pytest.raises(VmmRefused) as caught:
        sent(server, PutNetworkInterface(iface_id="eth0", host_dev_name="other"))

    error = caught.value
    assert error.request == "PUT /network-interfaces/eth0"
    assert error.asked == '{"iface_id":"eth0","host_dev_name":"other"}'
    assert error.status == 400
    assert "other" in error.fault_message
    assert error.fault_message in str(error)


def test_a_refusal_of_metadata_does_not_repeat_it(server: FirecrackerServer) -> None:
    """Metadata may be secret, and errors are logged."""
    server.faults["PUT", "/mmds"] = Fault("refuse")

    with pytest.raises(VmmRefused) as caught:
        sent(server, PutMmds(contents={"password": "hunter2"}))

    assert "hunter2" not in str(caught.value) + repr(caught.value.facts())
    assert "as the test asked" in str(caught.value)


def test_a_refusal_in_another_shape_is_still_one(server: FirecrackerServer) -> None:
    """What Firecracker's HTTP layer says by itself has no fault_message; it was not done all the same."""
    server.faults[VERSION] = Fault("plain")

    with pytest.raises(VmmRefused, match="as the test asked"):
        sent(server, GetVersion())


@pytest.mark.parametrize(
    ("kind", "expected", "says"),
    [
        ("hang", VmmTimeout, "may still be carried out"),
        ("trickle", VmmTimeout, "GET /version"),
        ("close", VmmLost, "no answer"),
        ("cut", VmmLost, "in the middle"),
        ("garbage", VmmProtocol, "no HTTP"),
        ("no-json", VmmProtocol, "no JSON"),
        ("wrong", VmmProtocol, "firecracker_version"),
        ("huge", VmmProtocol, "more than"),
        ("endless", VmmProtocol, "no HTTP"),
    ],
)
def test_each_fault_is_one_error(
    server: FirecrackerServer, kind: str, expected: type[PortwrightError], says: str
) -> None:
    """Silence, a byte now and then, a closed socket, garbage and floods each end in an error of their own."""
    server.faults[VERSION] = Fault(kind)

    with pytest.raises(expected, match=says):
        sent(server, GetVersion(), timeout=SHORT if expected is VmmTimeout else 30)


@pytest.mark.parametrize("kind", ["hang", "close", "cut", "garbage", "huge"])
def test_after_a_fault_the_next_request_is_served(server: FirecrackerServer, kind: str) -> None:
    """Nothing of an exchange that went wrong is taken for the next answer, and no descriptor is left."""
    before = open_fds()

    async def talk() -> None:
        client = Client(server.path, timeout=SHORT if kind == "hang" else 30)
        server.faults[VERSION] = Fault(kind)
        with pytest.raises(PortwrightError):
            await client.send(GetVersion())
        answer = await client.ask(GetInstance(), Instance, seconds=30)
        assert answer.vmm_version == "1.16.1"

    asyncio.run(talk())

    server.released.set()
    wait_until(lambda: open_fds() <= before, why="both ends to be closed")


def test_a_lost_answer_may_have_been_carried_out(server: FirecrackerServer) -> None:
    """The error after which one must look: the socket closed, and the thing is there."""
    server.faults["PUT", "/vsock"] = Fault("close", done=True)

    with pytest.raises(VmmLost, match="look before you repeat"):
        sent(server, PutVsock(guest_cid=3, uds_path="v.sock"))

    config = sent(server, GetConfig())
    assert config["vsock"] == {"guest_cid": 3, "uds_path": "v.sock"}


def test_nobody_listens(tmp_path: Path, server: FirecrackerServer) -> None:
    """No socket, one that nobody has open, a process that ended, a path too long: nothing was sent."""
    left = tmp_path / "left.sock"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as gone:
        gone.bind(str(left))
    server.die()

    for path in (tmp_path / "none.sock", left, server.path, tmp_path / ("x" * 200)):
        with pytest.raises(VmmUnavailable) as caught:
            asyncio.run(Client(path).send(GetVersion()))
        assert caught.value.socket == str(path)


def test_one_request_at_a_time(server: FirecrackerServer) -> None:
    """Three tasks ask at once, and the server, which waits for a second request, has one at any time."""
    server.linger = 0.1

    async def talk() -> None:
        client = Client(server.path, timeout=30)
        await asyncio.gather(*(client.send(GetInstance()) for _ in range(3)))

    asyncio.run(talk())

    assert len(server.requests) == 3
    assert server.at_once == 1


def test_what_is_not_in_the_api_is_never_sent(server: FirecrackerServer) -> None:
    """A request that the description, or a name's length, forbids does not reach the socket."""
    for wrong in (
        PutVsock(guest_cid=2, uds_path="v"),
        PutNetworkInterface(iface_id="eth0", host_dev_name="t" * 16),
        PutVsock(guest_cid=3, uds_path="v" * 108),
        PutNetworkInterface(iface_id="../vm", host_dev_name="tap0"),
        PatchVm(state="Stopped"),  # type: ignore[arg-type]
        PutMmds(contents={"much": "x" * 60_000}),
    ):
        with pytest.raises(InvalidInput):
            sent(server, wrong)

    assert server.requests == []


def test_a_caller_that_gives_up_frees_the_turn(server: FirecrackerServer) -> None:
    """A cancelled request closes its connection, and the next is served."""

    async def talk() -> None:
        client = Client(server.path, timeout=30)
        server.faults[VERSION] = Fault("hang")
        waiting = asyncio.create_task(client.send(GetVersion()))
        assert await asyncio.to_thread(server.hanging.wait, 10)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await client.send(PutBootSource(kernel_image_path="/vmlinux")) is None

    asyncio.run(talk())


def test_the_server_takes_any_client(server: FirecrackerServer) -> None:
    """It is a server of its own, not the client's other half: a few bytes by hand get an answer."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as raw:
        raw.connect(str(server.path))
        raw.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(4096), b""))

    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.endswith(b'{"firecracker_version": "1.16.1"}')
