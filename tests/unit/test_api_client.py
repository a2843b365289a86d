from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import portwright
from portwright.api import calls, frames
from portwright.api.methods import DropEvent, LimitsChange
from portwright.api.paths import NetnsSpec, netns_path, socket_path
from portwright.api.request import Request
from portwright.model.errors import DaemonUnavailable, InvalidInput, NotFound
from tests.fake_daemon import BLUE, PORT_ID, FakeDaemon, make_port, serving


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.sock"


@pytest.fixture
def daemon(path: Path) -> Iterator[FakeDaemon]:
    fake = FakeDaemon()
    with serving(path, fake.dispatch):
        yield fake


@contextlib.contextmanager
def scripted(path: Path, *replies: bytes) -> Iterator[None]:
    """A server of one connection that sends ``replies`` after the first request, then closes."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1 << 16)
                for reply in replies:
                    sock.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            thread.join(10)


def reply(content: object, kind: int = frames.JSON_REPLY) -> bytes:
    """Return the frame of an answer."""
    return frames.encode(kind, json.dumps(content).encode())


def test_every_call_gives_a_typed_result(path: Path, daemon: FakeDaemon) -> None:
    """The result is the model's value, whatever the wire left out."""
    with portwright.Client(path) as client:
        assert client.network_list()[0] == BLUE
        assert client.network_show("blue").usage[0].resting == 1
        assert client.port_list(state="attached")[0] == make_port()
        assert client.port_show("web").labels == {"tier": "front"}
        assert client.stats()[0].from_port.total.packets == 10
        assert client.drops()[0].reason == "spoof-ip"
        assert client.why("web", "10.1.0.3", dport=80).verdict == "allow"
        assert client.doctor().features[0].name == "tcx"
        assert client.node_status().ports == {"attached": 2, "detached": 1}
        client.port_set("web", limits=LimitsChange(egress_rate=5), labels={"a": None})
    changed = daemon.calls[-1]
    assert (changed.limits.egress_rate, changed.limits.ingress_rate, changed.labels) == (5, None, {"a": None})


def test_errors_are_the_daemons(path: Path, daemon: FakeDaemon) -> None:
    """A refused call raises the class that the daemon raised, and the client goes on."""
    with portwright.Client(path) as client:
        with pytest.raises(NotFound) as caught:
            client.port_show("nope")
        assert caught.value.facts() == {"kind": "port", "name": "nope"}
        with pytest.raises(InvalidInput, match="state"):
            client.port_list(state="sideways")
        assert client.port_show("web").port_id == PORT_ID


@pytest.mark.parametrize("form", ["path", "pid", "descriptor", "pathlike"])
def test_the_sandboxes_namespace_is_passed_as_a_descriptor(path: Path, daemon: FakeDaemon, form: str) -> None:
    """However it is named, the daemon gets an open descriptor of that namespace; a caller's stays open."""
    own = "/proc/self/ns/net"
    fd = os.open(own, os.O_RDONLY)
    try:
        by_pid = f"pid:{os.getpid()}"
        forms: dict[str, NetnsSpec] = {"path": own, "pid": by_pid, "descriptor": fd, "pathlike": Path(own)}
        spec = forms[form]
        with portwright.Client(path) as client:
            client.port_create("blue", spec)
            client.port_plug("web", spec)
            assert client.port_plan("blue", spec).plan[0].op == "CreateVeth"
        found = os.fstat(fd)
    finally:
        os.close(fd)
    assert daemon.namespaces == [(found.st_dev, found.st_ino)] * 3
    assert daemon.calls[0].netns in (own, f"/proc/{os.getpid()}/ns/net", os.readlink(own))  # noqa: PTH115


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("s1", "/run/netns/s1"),
        ("./s1", "./s1"),
        ("/a/b", "/a/b"),
        ("pid:7", "/proc/7/ns/net"),
    ],
)
def test_a_namespaces_name_is_written_out(spec: str, path: str) -> None:
    """A slash makes it a path, pid: a process, anything else a name of ip netns."""
    assert netns_path(spec) == path


@pytest.mark.parametrize("spec", ["", "..", "pid:", "pid:0", "pid:-1", "pid:x", "pid:٣", "/no/such/place"])
def test_a_wrong_namespace_is_refused_before_anything_is_sent(
    path: Path, daemon: FakeDaemon, spec: str
) -> None:
    """InvalidInput names it; the connection is not spoilt."""
    with portwright.Client(path) as client:
        with pytest.raises(InvalidInput, match="netns"):
            client.port_create("blue", spec)
        assert client.network_list()
    assert daemon.calls == []


def test_no_daemon_is_said_with_the_way_out(path: Path) -> None:
    """Nothing there, or nobody listens: DaemonUnavailable from both clients, on calls and streams."""
    with pytest.raises(DaemonUnavailable, match="no such file"):
        portwright.Client(path).node_status()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(DaemonUnavailable, match="connection refused"):
        next(portwright.Client(path).drops_follow())

    async def ask() -> None:
        with pytest.raises(DaemonUnavailable, match="connection refused"):
            await portwright.AsyncClient(path).node_status()

    asyncio.run(ask())


def test_a_client_survives_the_daemons_restart(path: Path) -> None:
    """A connection that was closed between two calls is made again; both clients."""

    async def both() -> None:
        async with portwright.AsyncClient(path) as aio:
            with portwright.Client(path) as client:
                for _ in range(2):
                    with serving(path, FakeDaemon().dispatch):
                        # First, so that its loop has had no turn since the restart to see the end of before.
                        assert await aio.network_list()
                        assert await asyncio.to_thread(client.network_list)
                    with pytest.raises(DaemonUnavailable):
                        client.network_list()

    asyncio.run(both())


def test_a_timeout_does_not_confuse_the_next_answer(path: Path) -> None:
    """RequestTimeout after the given seconds; the late answer is never taken for another call's."""

    async def dispatch(request: Request) -> object:
        if request.method == "stats":
            await asyncio.Event().wait()
        return []

    async def ask() -> None:
        async with portwright.AsyncClient(path, timeout=0.1) as client:
            with pytest.raises(portwright.RequestTimeout, match=r"stats within 0\.1 s"):
                await client.stats()
            assert await client.network_list() == ()

    with serving(path, dispatch):
        with portwright.Client(path, timeout=0.1) as client:
            with pytest.raises(portwright.RequestTimeout, match=r"stats within 0\.1 s"):
                client.stats()
            assert client.network_list() == ()
        asyncio.run(ask())


@pytest.mark.parametrize(
    ("replies", "error"),
    [
        ([], portwright.ConnectionLost),
        ([reply({"id": 1, "result": []})[:8]], portwright.ConnectionLost),
        ([reply({"id": 1})], portwright.ProtocolError),
        ([reply({"id": 1, "result": {"wrong": 1}})], portwright.ProtocolError),
        ([frames.encode(frames.JSON_REPLY, b"nonsense")], portwright.ProtocolError),
        ([frames.encode(frames.CNI_REPLY, b"")], portwright.ProtocolError),
        ([b"HTTP/1.1 400 Bad Request"], portwright.ProtocolError),
        ([reply({"id": None, "error": {"code": "busy", "message": "full"}})], portwright.Busy),
    ],
)
def test_a_broken_answer_is_one_clear_error(
    path: Path, replies: list[bytes], error: type[portwright.PortwrightError]
) -> None:
    """Whatever the other side does, both clients raise an error of ours, and none waits for ever."""

    async def ask() -> None:
        async with portwright.AsyncClient(path, timeout=10) as client:
            with pytest.raises(error):
                await client.stats()

    with scripted(path, *replies), portwright.Client(path, timeout=10) as client, pytest.raises(error):
        client.stats()
    path.unlink()
    with scripted(path, *replies):
        asyncio.run(ask())


def test_a_stream_yields_events_and_its_error(path: Path, daemon: FakeDaemon) -> None:
    """Events are typed and in order; the stream's end ends the iterator, in both clients alike."""

    async def follow() -> list[DropEvent]:
        async with portwright.AsyncClient(path) as client:
            return [event async for event in client.drops_follow()]

    events = list(portwright.Client(path).drops_follow("web"))
    assert [event.lost for event in events] == [0, 1, 2]
    assert asyncio.run(follow()) == events


def test_lost_events_are_added_to_the_next(path: Path) -> None:
    """What the server could not deliver is counted in the event's own ``lost``."""
    event = {"time": 1, "port_id": "a", "rep": "b", "direction": "to_port", "reason": "r", "lost": 2}
    replies = [
        reply({"id": 1, "lost": 3}, frames.EVENT),
        reply({"id": 1, "lost": 4}, frames.EVENT),
        reply({"id": 1, "event": event}, frames.EVENT),
        reply({"id": 1, "event": event}, frames.EVENT),
        reply({"id": 1, "error": {"code": "not-found", "message": "port 'a' does not exist"}}),
    ]
    with scripted(path, *replies):
        stream = portwright.Client(path).drops_follow()
        assert [next(stream).lost, next(stream).lost] == [9, 2]
        with pytest.raises(NotFound):
            next(stream)


def test_letting_go_of_a_stream_ends_it_at_the_daemon(path: Path) -> None:
    """Closing the iterator closes its connection, and the source is closed."""
    ended = threading.Event()

    async def dispatch(request: Request) -> object:
        async def events() -> AsyncIterator[object]:
            try:
                while True:
                    yield {"time": 1, "port_id": "a", "rep": "b", "direction": "to_port", "reason": "r"}
                    await asyncio.sleep(0)
            finally:
                ended.set()

        return events()

    async def follow() -> None:
        async with contextlib.aclosing(portwright.AsyncClient(path).drops_follow()) as stream:
            assert (await anext(stream)).rep == "b"

    with serving(path, dispatch):
        stream = portwright.Client(path).drops_follow()
        assert next(stream).rep == "b"
        stream.close()
        assert ended.wait(10)
        ended.clear()
        asyncio.run(follow())
        assert ended.wait(10)


def test_calls_of_an_async_client_run_at_once(path: Path) -> None:
    """Concurrent calls share a connection and don't wait for each other; a cancelled one disturbs none."""
    release = asyncio.Event()

    async def dispatch(request: Request) -> object:
        if request.params.get("port") == "slow":
            await release.wait()
        else:
            release.set()
        return []

    async def ask() -> None:
        async with portwright.AsyncClient(path) as client:
            cancelled = asyncio.ensure_future(client.stats("slow"))
            slow = asyncio.ensure_future(client.stats("slow"))
            await asyncio.sleep(0)
            cancelled.cancel()
            many = await asyncio.gather(slow, *(client.stats() for _ in range(200)))
            assert many == [()] * 201

    with serving(path, dispatch) as running:
        asyncio.run(ask())
        assert running.server.connections <= 1


def test_threads_may_share_a_client(path: Path, daemon: FakeDaemon) -> None:
    """Each gets its own answer."""
    failures: list[str] = []

    def ask(number: int) -> None:
        for _ in range(20):
            made = client.network_create(f"n{number}")
            if made.name != f"n{number}":
                failures.append(made.name)

    with portwright.Client(path) as client:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert len(daemon.calls) == 160


def test_a_request_over_the_limit_is_refused_here(path: Path, daemon: FakeDaemon) -> None:
    """Not sent, and the client goes on."""
    with portwright.Client(path) as client:
        with pytest.raises(portwright.ProtocolError, match="over the limit"):
            client.port_show("x" * frames.MAX_REQUEST)
        with pytest.raises(portwright.ProtocolError, match=r"a policy\.apply request .* limit of 16777216"):
            client.policy_apply([("a.yaml", "x" * frames.MAX_LARGE)])
        assert client.network_list()


def test_manifests_may_be_more_than_other_requests(path: Path, daemon: FakeDaemon) -> None:
    """Both clients send them as a large request, and only those that are."""
    files = [(f"{number}.yaml", "x" * 100_000) for number in range(30)]
    with portwright.Client(path) as client:
        client.policy_apply(files)

    async def apply() -> None:
        async with portwright.AsyncClient(path) as client:
            await client.policy_apply(files)

    asyncio.run(apply())
    assert daemon.calls == [calls.policy_apply(files).params] * 2


def test_the_default_socket_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """$PORTWRIGHT_RUN_DIR, else /run/portwright."""
    monkeypatch.delenv("PORTWRIGHT_RUN_DIR", raising=False)
    assert socket_path() == Path("/run/portwright/portwright.sock")
    monkeypatch.setenv("PORTWRIGHT_RUN_DIR", "/run/other")
    assert portwright.Client().socket == Path("/run/other/portwright.sock")
