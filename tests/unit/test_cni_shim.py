"""The real shim binary against a small daemon stand-in, and against none."""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from portwright.api.request import Request
from portwright.api.server import Server
from portwright.cni import wire
from portwright.cni.install import patched
from portwright.cni.version import SUPPORTED

SOURCE = Path(__file__).parents[2] / "src/portwright/cni/shim/portwright-cni.c"
CONF = b'{"cniVersion": "1.0.0", "name": "net"}'
ATTACHMENT = {"CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0"}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The shim as the Makefile builds it."""
    target = tmp_path_factory.mktemp("shim") / "portwright-cni"
    subprocess.run(
        ["cc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", str(target), str(SOURCE)], check=True
    )
    return target.read_bytes()


@dataclass
class Seen:
    """What the stand-in received, and the namespaces (st_dev, st_ino) that came with it."""

    payload: bytes = b""
    kind: int = 0
    spaces: list[tuple[int, int]] = field(default_factory=list)

    @property
    def call(self) -> tuple[dict[str, str], bytes]:
        return wire.decode_request(self.payload)


@dataclass
class Bench:
    """A shim patched to a socket and a spool of this test's own."""

    shim: Path
    path: Path
    spool: Path

    def run(
        self, command: str | None, stdin: bytes = CONF, /, **env: str
    ) -> subprocess.CompletedProcess[bytes]:
        """Run the shim with exactly these variables."""
        full = env if command is None else {"CNI_COMMAND": command, **env}
        return subprocess.run(
            [self.shim], input=stdin, env=full, capture_output=True, timeout=30, check=False
        )

    @contextmanager
    def daemon(self, answer: Callable[[socket.socket], None]) -> Iterator[Seen]:
        """Serve one call in a thread: read the request whole, then let ``answer`` speak."""
        seen = Seen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(20)
                data, control, _, _ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(16 * 4))
                fds = array.array("i")
                for _, _, raw in control:
                    fds.frombytes(raw)
                for fd in fds:
                    stat = os.fstat(fd)
                    seen.spaces.append((stat.st_dev, stat.st_ino))
                    os.close(fd)
                length, seen.kind = struct.unpack("!IB", data[:5])
                while len(data) < 5 + length:
                    chunk = connection.recv(1 << 16)
                    assert chunk
                    data += chunk
                seen.payload = data[5:]
                answer(connection)

        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(self.path))
            listener.listen(1)
            listener.settimeout(20)
            thread = threading.Thread(target=serve)
            thread.start()
            try:
                yield seen
            finally:
                thread.join()
                self.path.unlink()

    def spooled(self) -> list[Path]:
        return sorted(self.spool.iterdir()) if self.spool.exists() else []


@pytest.fixture
def bench(built: bytes, tmp_path: Path) -> Bench:
    """A patched shim; nothing listens, and the spool does not exist yet."""
    made = Bench(shim=tmp_path / "shim", path=tmp_path / "s", spool=tmp_path / "state" / "spool")
    made.shim.write_bytes(patched(built, socket=made.path, spool=made.spool))
    made.shim.chmod(0o755)
    return made


def reply(payload: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(struct.pack("!IB", len(payload), ord("c")) + payload)


def error_of(done: subprocess.CompletedProcess[bytes]) -> tuple[int, str]:
    """Return (code, msg) of the error object, having checked its form."""
    assert done.returncode == 1
    body = json.loads(done.stdout)
    assert set(body) == {"cniVersion", "code", "msg"}
    return body["code"], body["msg"]


@pytest.mark.parametrize("env", [{}, {"CNI_NETNS": "dummy", "CNI_IFNAME": "dummy", "CNI_CONTAINERID": ""}])
def test_01_02_version(bench: Bench, env: dict[str, str]) -> None:
    """Cases 1 and 2: VERSION is answered without a daemon, and stdin is not read."""
    with subprocess.Popen(
        [bench.shim], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"CNI_COMMAND": "VERSION", **env}
    ) as process:
        assert process.wait(10) == 0
        assert process.stdout is not None
        said = json.loads(process.stdout.read())

    assert said == json.loads(wire.version_json())
    assert said["supportedVersions"] == list(SUPPORTED)


@pytest.mark.parametrize("env", [{}, {"CNI_COMMAND": ""}])
def test_03_about(bench: Bench, env: dict[str, str]) -> None:
    """Case 3: without a command the shim talks about itself on stderr and exits 0."""
    done = bench.run(None, **env)

    assert (done.returncode, done.stdout) == (0, b"")
    assert ", ".join(SUPPORTED) in done.stderr.decode()
    assert str(bench.path) in done.stderr.decode()


def test_what_is_forwarded(bench: Bench) -> None:
    """CNI_* and the trace variables go, nothing else; stdin goes byte for byte; the answer comes back."""
    env = {**ATTACHMENT, "CNI_ARGS": "A=B;C=\u00e9", "TRACEPARENT": "00-1", "BAGGAGE": "x", "TRACESTATE": "y"}
    stdin = b'{"x":"\xff\x00"}\n'
    answer = wire.encode_reply(b'{"r":1}\n', status=3, stderr=b"log\n")
    with bench.daemon(reply(answer)) as seen:
        done = bench.run("ADD", stdin, **env, HOME="/root", XCNI_A="no")

    assert chr(seen.kind) == "C"
    assert seen.call == ({"CNI_COMMAND": "ADD", **env}, stdin)
    assert (done.returncode, done.stdout, done.stderr) == (3, b'{"r":1}\n', b"log\n")
    assert len(seen.spaces) == 1
    own = Path("/proc/self/ns/net").stat()
    assert seen.spaces[0] == (own.st_dev, own.st_ino)


def test_a_mebibyte_of_stdin_fits(bench: Bench) -> None:
    """The largest stdin arrives whole, and so does a large answer."""
    stdin = b"x" * (1 << 20)
    body = b"y" * (1 << 20)
    with bench.daemon(reply(wire.encode_reply(body))) as seen:
        done = bench.run("ADD", stdin, CNI_ARGS="a" * 100_000)

    assert seen.call[1] == stdin
    assert (done.returncode, done.stdout) == (0, body)


def test_one_byte_more_does_not(bench: Bench) -> None:
    """Larger stdin is code 6, a larger environment code 4, before anybody is called."""
    assert error_of(bench.run("DEL", b"x" * ((1 << 20) + 1), **ATTACHMENT))[0] == 6
    assert error_of(bench.run("DEL", CNI_A="x" * 70_000, CNI_B="x" * 70_000))[0] == 4
    assert bench.spooled() == []


@pytest.mark.netns
def test_21_both_namespaces_are_sent(bench: Bench) -> None:
    """Case 21: the shim's own namespace comes first, CNI_NETNS's second, though neither is ours."""
    names = [f"pwcni{side}{os.getpid()}" for side in "hc"]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        paths = [Path("/run/netns") / name for name in names]
        with bench.daemon(reply(wire.encode_reply())) as seen:
            subprocess.run(
                ["ip", "netns", "exec", names[0], bench.shim],
                input=CONF,
                env={"CNI_COMMAND": "ADD", "CNI_NETNS": str(paths[1]), "PATH": os.environ["PATH"]},
                check=True,
            )
        assert seen.spaces == [(one.stat().st_dev, one.stat().st_ino) for one in paths]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.parametrize("kind", ["absent", "file", "fifo", "empty"])
def test_what_is_no_namespace_is_not_sent(bench: Bench, tmp_path: Path, kind: str) -> None:
    """CNI_NETNS that is gone, a plain file or a FIFO leaves the daemon with our own descriptor only."""
    path = tmp_path / "ns"
    if kind == "file":
        path.touch()
    elif kind == "fifo":
        os.mkfifo(path)
    with bench.daemon(reply(wire.encode_reply())) as seen:
        assert bench.run("DEL", CNI_NETNS="" if kind == "empty" else str(path)).returncode == 0

    assert len(seen.spaces) == 1


def test_the_daemons_own_server_understands(bench: Bench) -> None:
    """The shim's frame, a mebibyte and two descriptors, passes the real server, and the answer comes back."""
    stdin = b" " * (1 << 20)
    raw: list[tuple[bytes, int]] = []

    async def dispatch(request: Request) -> bytes:
        raw.append((request.raw, len(request.fds)))
        return wire.encode_reply(b"fine\n")

    async def both() -> subprocess.CompletedProcess[bytes]:
        async with Server(bench.path, dispatch):
            return await asyncio.to_thread(bench.run, "ADD", stdin, CNI_NETNS="/proc/self/ns/net")

    done = asyncio.run(both())
    assert (done.returncode, done.stdout) == (0, b"fine\n")
    assert raw == [(wire.encode_request({"CNI_COMMAND": "ADD", "CNI_NETNS": "/proc/self/ns/net"}, stdin), 2)]


def close(_: socket.socket) -> None:
    """Say nothing."""


@pytest.mark.parametrize(
    "answer",
    [
        close,
        lambda connection: connection.sendall(b"\0\0"),
        lambda connection: connection.sendall(struct.pack("!IB", 50, ord("c")) + b"\0"),
        lambda connection: connection.sendall(struct.pack("!IB", 6, ord("j")) + b"\0" * 6),
        lambda connection: connection.sendall(struct.pack("!IB", 4, ord("c")) + b"\0" * 4),
        lambda connection: connection.sendall(struct.pack("!IB", 1 << 31, ord("c"))),
        lambda connection: connection.sendall(struct.pack("!IB", 5, ord("c")) + b"\0\0\0\0\1"),
    ],
    ids=["nothing", "half a head", "half a body", "other kind", "too short", "too long", "lying length"],
)
@pytest.mark.parametrize(("command", "code"), [("ADD", 11), ("DEL", 11), ("STATUS", 50)])
def test_a_broken_answer(
    bench: Bench, answer: Callable[[socket.socket], None], command: str, code: int
) -> None:
    """A daemon that dies or talks nonsense is code 11 (STATUS: 50), never a crash; DEL is not spooled."""
    with bench.daemon(answer):
        done = bench.run(command, **ATTACHMENT)

    assert error_of(done)[0] == code
    assert bench.spooled() == []


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(
    ("command", "code"), [("ADD", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50), ('F"\n\\', 4)]
)
def test_14_daemon_away(bench: Bench, command: str, code: int, stale: bool) -> None:
    """Case 14: no socket, or one that nobody serves: the error comes at once and nothing is spooled."""
    if stale:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(bench.path))
    began = time.monotonic()
    done = bench.run(command, **ATTACHMENT)

    assert error_of(done)[0] == code
    assert json.loads(done.stdout)["cniVersion"] == "1.0.0"
    assert time.monotonic() - began < 5
    assert bench.spooled() == []
    if code == 4:
        assert error_of(done)[1] == f"unknown CNI_COMMAND: {command}"


@pytest.mark.parametrize(
    ("stdin", "version"),
    [
        (b'{"CNIVersion"\n:\t"0.4.0"}', "0.4.0"),
        (b'{"cniVersion":"0.4.0', "0.4.0"),
        (b'{"cniVersion":"\\"}', "1.1.0"),
        (b'{"cniVersion":5}', "1.1.0"),
        (b'{"cniVersion"', "1.1.0"),
        (b"", "1.1.0"),
        (b'{"cniVersion":"' + b"1" * 100 + b'"}', "1" * 15),
    ],
)
def test_the_errors_version(bench: Bench, stdin: bytes, version: str) -> None:
    """The error object carries stdin's cniVersion where it can be found, and stays JSON where not."""
    assert json.loads(bench.run("ADD", stdin).stdout)["cniVersion"] == version


def test_del_is_spooled(bench: Bench) -> None:
    """DEL without a daemon: exit 0, silence, and one private file that is exactly the request's payload."""
    before = time.time_ns()
    done = bench.run("DEL", **ATTACHMENT, CNI_NETNS="/gone", TRACEPARENT="t", HOME="/")
    after = time.time_ns()

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    (file,) = bench.spooled()
    stamp, _, pid = file.name.partition("-")
    assert len(stamp) == 20
    assert before <= int(stamp) <= after
    assert pid.isdigit()
    assert wire.decode_request(file.read_bytes()) == (
        {"CNI_COMMAND": "DEL", **ATTACHMENT, "CNI_NETNS": "/gone", "TRACEPARENT": "t"},
        CONF,
    )
    assert file.stat().st_mode == 0o100600
    assert bench.spool.stat().st_mode == 0o040700


def test_the_spool_keeps_the_order(bench: Bench) -> None:
    """Sorted by name, the files are in the order of the calls."""
    for number in range(5):
        assert bench.run("DEL", CNI_CONTAINERID=f"c{number}", CNI_IFNAME="eth0").returncode == 0

    calls = [wire.decode_request(one.read_bytes())[0]["CNI_CONTAINERID"] for one in bench.spooled()]
    assert calls == ["c0", "c1", "c2", "c3", "c4"]


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({}, "CNI_CONTAINERID,CNI_IFNAME"),
        ({"CNI_CONTAINERID": ""}, "CNI_CONTAINERID,CNI_IFNAME"),
        ({"CNI_IFNAME": "eth0"}, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": "c"}, "CNI_IFNAME"),
    ],
)
def test_a_del_of_nothing_is_not_promised(bench: Bench, env: dict[str, str], named: str) -> None:
    """A DEL that names no attachment is code 4 with every missing variable, not a file."""
    assert error_of(bench.run("DEL", **env)) == (4, f"required env variables [{named}] missing")
    assert error_of(bench.run("DEL", b"", **ATTACHMENT))[0] == 6
    assert bench.spooled() == []


def test_the_spool_is_bounded(bench: Bench) -> None:
    """At 10,000 files DEL is code 11 and nothing is added; half-written files don't count."""
    bench.spool.mkdir(parents=True, mode=0o700)
    for number in range(9_999):
        (bench.spool / f"{number:020}-1").touch()
    (bench.spool / ".half.tmp").touch()

    assert bench.run("DEL", **ATTACHMENT).returncode == 0
    assert error_of(bench.run("DEL", **ATTACHMENT))[0] == 11
    assert len(bench.spooled()) == 10_001


def test_a_spool_that_others_may_write_is_refused(bench: Bench) -> None:
    """Requests are replayed by root, so a directory that others may write to is not used."""
    bench.spool.mkdir(parents=True)
    bench.spool.chmod(0o777)

    assert error_of(bench.run("DEL", **ATTACHMENT))[0] == 5
    assert bench.spooled() == []


def test_a_spool_that_is_a_file(bench: Bench) -> None:
    """What is in the way of the spool is an error and stays."""
    bench.spool.parent.mkdir()
    bench.spool.write_text("mine")

    assert error_of(bench.run("DEL", **ATTACHMENT))[0] == 5
    assert bench.spool.read_text() == "mine"


def test_closed_standard_streams(bench: Bench) -> None:
    """With 0, 1 and 2 closed the socket does not become one of them, and the call still arrives."""
    with bench.daemon(reply(wire.encode_reply(b"out", stderr=b"err"))) as seen:
        done = subprocess.run(
            ["sh", "-c", f"exec {bench.shim} <&- >&- 2>&-"], env={"CNI_COMMAND": "ADD"}, check=False
        )

    assert done.returncode == 0
    assert seen.call == ({"CNI_COMMAND": "ADD"}, b"")


def test_nobody_reads_the_answer(bench: Bench) -> None:
    """A closed pipe for stdout is exit 1, not death by SIGPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    with bench.daemon(reply(wire.encode_reply(b"out"))):
        done = subprocess.run(
            [bench.shim], stdin=subprocess.DEVNULL, stdout=writing, env={"CNI_COMMAND": "ADD"}, check=False
        )
    os.close(writing)

    assert done.returncode == 1
