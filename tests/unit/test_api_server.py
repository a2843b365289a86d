from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import select
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portwright.api import connection, frames
from portwright.api.frames import FrameDecoder, encode
from portwright.api.request import Request
from portwright.api.server import Server
from portwright.model.errors import Conflict, InvalidInput
from tests.deadline import wait_until
from tests.fake_daemon import FakeDaemon, Loop, Running, serving


@contextlib.contextmanager
def connect(path: Path) -> Iterator[socket.socket]:
    """A plain socket to the server, with a deadline on everything."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        yield sock


def ask(request_id: int, method: str, **params: object) -> bytes:
    """Return the frame of a request."""
    body = {"v": 1, "id": request_id, "method": method, "params": params}
    return encode(frames.JSON_REQUEST, json.dumps(body).encode())


def read(sock: socket.socket, count: int) -> list[tuple[str, Any]]:
    """Read ``count`` frames: kind and content."""
    decoder = FrameDecoder(frames.REPLY_KINDS, frames.MAX_REPLY)
    found: list[frames.Frame] = []
    while len(found) < count:
        data = sock.recv(1 << 16)
        assert data, f"closed after {found}"
        found += decoder.feed(data)
    return [(chr(f.kind), f.payload if f.kind == frames.CNI_REPLY else json.loads(f.payload)) for f in found]


def read_to_end(sock: socket.socket) -> list[Any]:
    """Read until the server closes; return the JSON of the frames."""
    decoder = FrameDecoder(frames.REPLY_KINDS, frames.MAX_REPLY)
    found: list[Any] = []
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 16):
            found += [json.loads(frame.payload) for frame in decoder.feed(data)]
    return found


def open_fds() -> int:
    """Count this process's descriptors."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


class Gate:
    """A dispatch whose requests wait until the gate opens, counting how many are inside."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.inside = self.most = self.done = self.cancelled = 0

    async def __call__(self, request: Request) -> object:
        """Wait for the gate."""
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.inside -= 1
        self.done += 1
        return {"n": request.id}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.sock"


@pytest.fixture
def daemon(path: Path) -> Iterator[Running]:
    with serving(path, FakeDaemon().dispatch) as running:
        yield running


# --- the socket file ------------------------------------------------------------------------------


def test_the_socket_is_for_its_owner_only_and_gone_at_the_end(path: Path) -> None:
    """Mode 0600, whatever the umask; the path is removed when the server closes."""
    old = os.umask(0)
    try:
        with serving(path, FakeDaemon().dispatch):
            assert stat.filemode(path.stat().st_mode) == "srw-------"
    finally:
        os.umask(old)
    assert not path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["s.sock.lock"]


def test_a_socket_nobody_listens_on_is_replaced(path: Path) -> None:
    """What a killed daemon left behind is no obstacle."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(path, FakeDaemon().dispatch), connect(path) as sock:
        sock.sendall(ask(1, "network.list"))
        assert read(sock, 1)[0][1]["id"] == 1


def test_a_living_socket_and_a_file_are_left_alone(path: Path) -> None:
    """Conflict if a process listens there (ours or a stranger), or if it is no socket; nothing is touched."""
    loop = Loop()
    try:
        with serving(path, FakeDaemon().dispatch), pytest.raises(Conflict, match="another daemon serves it"):
            loop.run(Server(path, FakeDaemon().dispatch).start())
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.bind(str(path))
            stranger.listen(0)
            with pytest.raises(Conflict, match="another daemon listens"):
                loop.run(Server(path, FakeDaemon().dispatch).start())
            assert path.is_socket()
        path.unlink()
        path.write_text("precious")
        with pytest.raises(Conflict, match="is not a socket"):
            loop.run(Server(path, FakeDaemon().dispatch).start())
        assert path.read_text() == "precious"
    finally:
        loop.close()


def test_a_path_too_long_is_refused_by_name(tmp_path: Path) -> None:
    """sockaddr_un holds 107 bytes."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    loop = Loop()
    try:
        with pytest.raises(InvalidInput, match="run_dir: too long"):
            loop.run(Server(deep / "s.sock", FakeDaemon().dispatch).start())
    finally:
        loop.close()


def test_a_foreign_successor_at_the_path_survives_our_close(path: Path) -> None:
    """Only the inode that we made is removed."""
    with serving(path, FakeDaemon().dispatch):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_a_socket_passed_by_systemd_is_served_and_stays(path: Path) -> None:
    """LISTEN_FDS: the listening socket is taken from descriptor 3 and its path is not ours to remove."""
    code = """
import asyncio, os
from portwright.api.server import Server, passed_listener
os.environ["LISTEN_PID"] = str(os.getpid())
async def main():
    async def dispatch(request):
        done.set()
        return {"from": request.method}
    done = asyncio.Event()
    async with Server("/unused", dispatch, listener=passed_listener(os.environ)):
        await done.wait()
asyncio.run(main())
"""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        script = 'exec 3<&$FD; exec "$0" -c "$1"'
        child = subprocess.Popen(
            ["/bin/bash", "-c", script, sys.executable, code],
            pass_fds=[listener.fileno()],
            env={**os.environ, "LISTEN_FDS": "1", "FD": str(listener.fileno())},
        )
        with connect(path) as sock:
            sock.sendall(ask(5, "hello"))
            assert read(sock, 1) == [("j", {"id": 5, "result": {"from": "hello"}})]
        assert child.wait(10) == 0
        assert path.is_socket()


def test_a_refused_peer_is_told_and_closed(path: Path) -> None:
    """Who authorize refuses gets one error and nothing else."""
    with serving(path, FakeDaemon().dispatch, authorize=lambda peer: peer.pid != os.getpid()):
        with connect(path) as sock:
            (answer,) = read_to_end(sock)
        assert answer["error"]["code"] == "not-authorized"


# --- hostile and clumsy clients -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"\x7f\xff\xff\xffJ", "over the limit"),
        (b"\x01\x00\x00\x01L", "over the limit of 16777216"),
        (b"GET / HTTP/1.1\r\n\r\n", "not expected"),
        (encode(frames.JSON_REQUEST, b"{"), "not a request"),
        (encode(frames.JSON_REQUEST, b"\xff\xfe"), "not a request"),
        (encode(frames.JSON_REQUEST, b"[" * 5000), "not a request"),
        (encode(frames.JSON_REQUEST, b'{"v":1,"id":1,"method":"stats","more":1}'), "unknown field"),
        (encode(frames.JSON_REQUEST, b'{"v":1,"id":"1","method":"stats"}'), "Expected `int`"),
        (encode(frames.CNI_REQUEST, b"") * 2, "alone"),
    ],
)
def test_a_broken_envelope_is_answered_and_closed(daemon: Running, sent: bytes, why: str) -> None:
    """The peer is told what was wrong, with id null, and the connection ends; others are not disturbed."""
    with connect(daemon.path) as sock, connect(daemon.path) as other:
        sock.sendall(sent)
        (answer,) = read_to_end(sock)
        assert answer["id"] is None
        assert answer["error"]["code"] == "protocol"
        assert why in answer["error"]["message"]
        other.sendall(ask(1, "stats"))
        assert read(other, 1)


def test_a_wrong_request_leaves_the_connection_usable(daemon: Running) -> None:
    """Unknown method, other version, wrong parameters: an error for that id, and the next one works."""
    with connect(daemon.path) as sock:
        bad = encode(frames.JSON_REQUEST, b'{"v":2,"id":8,"method":"stats"}')
        sock.sendall(ask(7, "nope") + bad + ask(9, "port.show", port=1) + ask(10, "stats"))
        found = {content["id"]: content for _, content in read(sock, 4)}
    assert found[7]["error"]["code"] == "not-found"
    assert found[8]["error"]["code"] == "protocol"
    assert found[9]["error"]["facts"]["field"] == "port"
    assert found[10]["result"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.builds(encode, st.sampled_from(b"JLC"), st.binary(max_size=40)),
            st.builds(ask, st.integers(), st.sampled_from(["stats", "port.show", "drops.follow", "x"])),
        ),
        max_size=5,
    ),
    st.integers(0, 6),
)
def test_no_bytes_hurt_the_server(daemon: Running, chunks: list[bytes], descriptors: int) -> None:
    """Junk, half frames, descriptors: the server answers or closes, leaks nothing, and serves the next."""
    passed = os.memfd_create("api-hostile")
    try:
        with connect(daemon.path) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for chunk in chunks:
                if chunk:
                    frames.send_start(sock, chunk, [passed] * descriptors)
            sock.shutdown(socket.SHUT_WR)
            read_to_end(sock)
    finally:
        os.close(passed)
    with connect(daemon.path) as sock:
        sock.sendall(ask(1, "stats"))
        assert read(sock, 1)[0][1]["result"]
    wait_until(lambda: daemon.server.connections == 0, why="the connections' end")
    assert not any("api-hostile" in target for target in map(_target, os.listdir("/proc/self/fd")))  # noqa: PTH208


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
    except OSError:
        return ""


def test_a_frame_that_stays_partial_is_given_up(path: Path) -> None:
    """A peer that begins a frame and goes silent, or drips, is closed after the timeout, and told."""
    with serving(path, FakeDaemon().dispatch, idle_timeout=0.2), connect(path) as sock:
        sock.sendall(ask(1, "stats")[:9])
        (answer,) = read_to_end(sock)
        assert "not whole" in answer["error"]["message"]


def test_an_idle_connection_ends_but_a_busy_one_does_not(path: Path) -> None:
    """Idle means no request under way, however long one takes."""
    gate = Gate()
    with serving(path, gate, idle_timeout=0.1) as running, connect(path) as busy, connect(path) as idle:
        busy.sendall(ask(1, "long"))
        assert read_to_end(idle) == []
        wait_until(lambda: gate.inside == 1, why="the request")
        running.loop.run(_open(gate))
        assert read(busy, 1)[0][1] == {"id": 1, "result": {"n": 1}}


async def _open(gate: Gate) -> None:
    gate.open.set()


# --- bounds ---------------------------------------------------------------------------------------


def test_a_thousand_connections_are_served_a_few_at_a_time(path: Path) -> None:
    """No more than max_connections are served at once; the others wait their turn, and all get an answer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    most = 0
    try:
        with (
            serving(path, FakeDaemon().dispatch, max_connections=32) as running,
            contextlib.ExitStack() as stack,
        ):
            socks = [stack.enter_context(connect(path)) for _ in range(1000)]
            for number, sock in enumerate(socks):
                sock.sendall(ask(number, "stats"))
            for number, sock in enumerate(socks):
                assert read(sock, 1)[0][1]["id"] == number
                most = max(most, running.server.connections)
                sock.close()
            assert 0 < most <= 32
            wait_until(lambda: running.server.connections == 0, why="the connections' end")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_requests_in_flight_are_bounded_and_none_is_lost(path: Path) -> None:
    """A client may send at will: MAX_INFLIGHT run at once, and every one is answered."""
    gate = Gate()
    with serving(path, gate) as running, connect(path) as sock:
        sender = threading.Thread(target=sock.sendall, args=(b"".join(ask(n, "x") for n in range(3000)),))
        sender.start()
        wait_until(lambda: gate.inside == connection.MAX_INFLIGHT, why="the requests")
        running.loop.run(_open(gate))
        assert sorted(content["id"] for _, content in read(sock, 3000)) == list(range(3000))
        sender.join()
    assert gate.most == connection.MAX_INFLIGHT


def test_what_was_sent_before_a_half_close_is_answered(path: Path) -> None:
    """A client may send, shut its side down and read: all answers come, then the end; streams don't begin."""

    async def dispatch(request: Request) -> object:
        async def silent() -> AsyncIterator[object]:
            await asyncio.Event().wait()
            yield 1

        return silent() if request.method == "follow" else request.id

    with serving(path, dispatch), connect(path) as sock:
        sock.sendall(ask(0, "follow") + b"".join(ask(number, "x") for number in range(1, 300)))
        sock.shutdown(socket.SHUT_WR)
        answered = {answer["id"] for answer in read_to_end(sock)}
    assert answered - {0} == set(range(1, 300))


def test_an_id_in_use_is_refused(path: Path) -> None:
    """Two answers under one id could not be told apart."""
    gate = Gate()
    with serving(path, gate) as running, connect(path) as sock:
        sock.sendall(ask(1, "x") + ask(1, "x"))
        assert "its id is in use" in read(sock, 1)[0][1]["error"]["message"]
        running.loop.run(_open(gate))
        assert read(sock, 1)[0][1] == {"id": 1, "result": {"n": 1}}


def test_a_client_that_does_not_read_answers_costs_bounded_memory_and_is_closed(path: Path) -> None:
    """Nothing is read while a mebibyte of answers waits: few more are made, and then it is closed."""
    served = 0

    async def big(request: Request) -> object:
        nonlocal served
        served += 1
        return "x" * 500_000

    with serving(path, big, idle_timeout=0.4) as running, connect(path) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for number in range(1000):
                sock.sendall(ask(number, "x"))
        wait_until(lambda: running.server.connections == 0, why="the connection's end")
    assert served <= connection.MAX_INFLIGHT + 3


def test_a_slow_reader_of_a_stream_loses_events_and_is_told_how_many(path: Path) -> None:
    """The stream goes on, memory stays bounded, and events received plus events lost are all there were."""
    total, finished, most = 20_000, asyncio.Event(), 0

    async def stream(request: Request) -> AsyncIterator[object]:
        async def events() -> AsyncIterator[object]:
            nonlocal most
            for number in range(total):
                yield {"number": number, "padding": "x" * 200}
                (served,) = running.server._connections
                most = max(most, served._out_bytes)
            finished.set()

        return events()

    with serving(path, stream) as running, connect(path) as sock:
        sock.sendall(ask(1, "follow"))
        running.loop.run(asyncio.wait_for(finished.wait(), 20))
        got, lost, last, ended = 0, 0, -1, False
        decoder = FrameDecoder(frames.REPLY_KINDS, frames.MAX_REPLY)
        while not ended:
            for frame in decoder.feed(sock.recv(1 << 16)):
                content = json.loads(frame.payload)
                ended = frame.kind == frames.JSON_REPLY
                lost += content.get("lost", 0) + (content["result"]["lost"] if ended else 0)
                if "event" in content:
                    got += 1
                    assert content["event"]["number"] > last
                    last = content["event"]["number"]
    assert got + lost == total
    assert lost > 0
    assert most <= connection.STREAM_HIGH + 1000


def test_streams_leave_room_for_calls(path: Path) -> None:
    """A quarter of the connections may be streams; one more is refused as busy, and calls still work."""

    async def dispatch(request: Request) -> object:
        async def forever() -> AsyncIterator[object]:
            yield 1
            await asyncio.Event().wait()

        return forever() if request.method == "follow" else "answer"

    with serving(path, dispatch, max_connections=8), contextlib.ExitStack() as stack:
        for _ in range(2):
            sock = stack.enter_context(connect(path))
            sock.sendall(ask(1, "follow"))
            assert read(sock, 1)[0][0] == "e"
        sock = stack.enter_context(connect(path))
        sock.sendall(ask(1, "follow"))
        assert read(sock, 1)[0][1]["error"]["code"] == "busy"
        sock.sendall(ask(2, "call"))
        assert read(sock, 1)[0][1]["result"] == "answer"


def large(request_id: int, method: str, **params: object) -> bytes:
    """Return the frame of a large request."""
    return encode(frames.LARGE_REQUEST, ask(request_id, method, **params)[frames.HEADER.size :])


def test_a_large_request_is_for_the_methods_that_take_it(path: Path) -> None:
    """3 MB of manifests arrive whole; another method's are refused by name, and the connection goes on."""
    files = [{"name": f"{number}.yaml", "text": "x" * 100_000} for number in range(30)]
    fake = FakeDaemon()
    with serving(path, fake.dispatch), connect(path) as sock:
        sock.sendall(large(1, "policy.apply", files=files))
        assert read(sock, 1)[0][1]["result"]
        assert list(msgspec.to_builtins(fake.calls[-1])["files"]) == files
        sock.sendall(large(2, "stats") + ask(3, "stats"))
        refused, fine = (content for _, content in sorted(read(sock, 2), key=lambda one: one[1]["id"]))
        assert refused["error"]["message"].endswith(
            ": stats takes no large request; send it as one of kind J"
        )
        assert fine["result"]


def test_large_requests_are_few_at_once(path: Path) -> None:
    """From the header on, each has one of two slots: the next one is busy before its payload is read, calls
    go on, and a slot is free again when its connection ends, its request is answered, or it was none."""
    gate = Gate()
    held = large(1, "policy.apply", files=[])[:9]
    with serving(path, gate) as running, contextlib.ExitStack() as stack:
        slots = running.server.large_slots
        sock = stack.enter_context(connect(path))
        sock.sendall(large(1, "policy.apply", files=[]))
        wait_until(lambda: gate.inside == 1, why="the first to run")
        with connect(path) as half:
            half.sendall(held)
            wait_until(lambda: slots.used == 2, why="the second's header")
            with connect(path) as third:
                third.sendall(encode(frames.LARGE_REQUEST, b"x" * frames.MAX_LARGE)[:70_000])
                (answer,) = read_to_end(third)
            assert (answer["error"]["code"], answer["error"]["facts"]["limit"]) == ("busy", 2)
            half.sendall(b"\0" * 1000)  # no JSON
            (answer,) = read_to_end(half)
            assert answer["error"]["code"] == "protocol"
        wait_until(lambda: slots.used == 1, why="the second's slot")
        with connect(path) as half:
            half.sendall(held)
            wait_until(lambda: slots.used == 2, why="the next header")
        wait_until(lambda: slots.used == 1, why="the slot of one that left")
        sock.sendall(large(1, "policy.apply", files=[]))  # an id in use
        assert read(sock, 1)[0][1]["error"]["code"] == "protocol"
        assert slots.used == 1
        running.loop.run(_open(gate))
        assert read(sock, 1)[0][1]["result"]
        wait_until(lambda: slots.used == 0, why="the first's slot")


# --- descriptors, endings, CNI --------------------------------------------------------------------


def test_descriptors_belong_to_the_request_and_are_closed_after_it(path: Path) -> None:
    """Those passed are open during dispatch and closed after it, but for one that was taken."""
    kept: list[int] = []

    async def dispatch(request: Request) -> object:
        for fd in request.fds:
            os.fstat(fd)
        if not request.fds:
            return 0
        kept.append(request.take(0))
        with pytest.raises(IndexError):
            request.take(0)
        return len(request.fds)

    with serving(path, dispatch), connect(path) as sock, open(os.devnull, "rb") as passed:  # noqa: PTH123
        sock.sendall(ask(1, "x"))
        assert read(sock, 1)[0][1]["result"] == 0
        before = open_fds()
        frames.send_start(sock, ask(2, "x"), [passed.fileno()] * 3)
        assert read(sock, 1)[0][1]["result"] == 3
        assert wait_until(lambda: open_fds() == before + 1, why="the others' close")
        os.close(kept[0])


def test_a_client_that_goes_away_ends_its_stream_but_not_its_request(path: Path) -> None:
    """What was asked for is carried out; what was only listened to is not kept up."""
    gate, streaming, ended = Gate(), asyncio.Event(), asyncio.Event()

    async def dispatch(request: Request) -> object:
        async def events() -> AsyncIterator[object]:
            try:
                streaming.set()
                yield 1
                await asyncio.Event().wait()
            finally:
                ended.set()

        return events() if request.method == "follow" else await gate(request)

    with serving(path, dispatch) as running:
        with connect(path) as sock:
            sock.sendall(ask(1, "create") + ask(2, "follow"))
            running.loop.run(asyncio.wait_for(streaming.wait(), 10))
        running.loop.run(asyncio.wait_for(ended.wait(), 10))
        assert (gate.inside, gate.cancelled) == (1, 0)
        running.loop.run(_open(gate))
        wait_until(lambda: gate.done == 1, why="the request's end")
        wait_until(lambda: running.server.connections == 0, why="the connection's end")


def test_close_finishes_what_runs_and_cancels_what_does_not_end(path: Path) -> None:
    """Within the grace an answer still arrives; after it the handler is cancelled, and close returns."""
    loop, gate = Loop(), Gate()
    server = Server(path, gate)
    try:
        loop.run(server.start())
        with connect(path) as sock:
            sock.sendall(ask(1, "x"))
            wait_until(lambda: gate.inside == 1, why="the request")
            closing = threading.Thread(target=loop.run, args=(server.close(10),))
            closing.start()
            wait_until(lambda: not path.exists(), why="the socket's end")
            loop.run(_open(gate))
            assert read(sock, 1)[0][1]["result"] == {"n": 1}
            assert sock.recv(1) == b""
            closing.join()
        stuck = Gate()
        server = Server(path, stuck)
        loop.run(server.start())
        with connect(path) as sock:
            sock.sendall(ask(1, "x"))
            wait_until(lambda: stuck.inside == 1, why="the request")
            loop.run(server.close(0.05))
            assert stuck.cancelled == 1
    finally:
        loop.close()


def test_cni_is_opaque_and_answered_in_kind(path: Path) -> None:
    """The payload of a C arrives as it is, with its descriptors; the bytes returned go back as a c."""

    async def dispatch(request: Request) -> object:
        assert (request.kind, len(request.fds), request.peer.uid) == ("C", 2, os.getuid())
        return request.raw[::-1]

    with serving(path, dispatch), connect(path) as sock, open(os.devnull, "rb") as passed:  # noqa: PTH123
        payload = bytes(range(256)) * 4096
        data = encode(frames.CNI_REQUEST, payload)
        sent = frames.send_start(sock, data, [passed.fileno()] * 2)
        sock.sendall(data[sent:])
        assert read(sock, 1) == [("c", payload[::-1])]


def test_an_unencodable_answer_and_a_bug_become_internal_errors(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The client always gets an answer; the log gets the traceback, the client does not."""

    async def dispatch(request: Request) -> object:
        if request.method == "surrogate":
            return "\udc80"
        raise ZeroDivisionError("secret of the house")

    with serving(path, dispatch), connect(path) as sock:
        sock.sendall(ask(1, "surrogate"))
        assert read(sock, 1)[0][1]["error"]["code"] == "internal"
        sock.sendall(ask(2, "bug"))
        error = read(sock, 1)[0][1]["error"]
        assert error["code"] == "internal"
        assert "Traceback" not in error["message"]
    assert "ZeroDivisionError" in caplog.text


def test_out_of_descriptors_accepting_pauses_and_comes_back(path: Path) -> None:
    """EMFILE on accept neither spins nor ends the server: it goes on once there are descriptors again."""
    code = """
import asyncio, concurrent.futures.thread, os, resource, sys
from portwright.api.server import Server
async def main():
    async def dispatch(request):
        return "served"
    async with Server(sys.argv[1], dispatch):
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, 4096))
        print("full", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
asyncio.run(main())
"""
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "full\n"
        with connect(path) as sock:
            sock.sendall(ask(1, "x"))
            select.select([child.stderr], [], [], 10)
            assert "accept" in child.stderr.readline()
            child.stdin.write("go on\n")
            child.stdin.flush()
            assert read(sock, 1)[0][1]["result"] == "served"
        child.communicate("end\n", timeout=10)
    assert child.returncode == 0
