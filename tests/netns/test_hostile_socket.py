"""Hostile input on the daemon's socket (issue, "What must be shown", 5).

Whoever may connect is root or the daemon's user, and is treated as a stranger all the same: bytes that are no
frames, descriptors that are no namespaces, parameters of every wrong kind, and too much of everything.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portwright.api.methods import LimitsChange, NodeStatus
from portwright.api.registry import CONTRACT
from portwright.cni import wire
from portwright.model.port import PortMapping
from tests.deadline import wait_until
from tests.fix_daemon import Daemon
from tests.netns.hostile import CALM, Json, Target, fields, replaced, target

pytestmark = pytest.mark.netns

HEADER = struct.Struct(">IB")
LIMIT = (1 << 20) + (128 << 10)
IDLE = 30.0  # seconds after which the daemon gives a silent connection up


@pytest.fixture(scope="module")
def attacked() -> Iterator[Target]:
    """One target for all tests: what one breaks, the next one finds."""
    with target() as made:
        # What the daemon opens once, at the first use of a feature, is no leak.
        with made.daemon.client() as client:
            mapping = PortMapping(host_port=8088, container_port=80)
            made_port = client.port_create(CALM, made.victim.path, name="first", port_mappings=[mapping])
            client.port_delete(made_port.port_id)
            client.why("host", made.calm[0].ip4)
            client.doctor()
        yield made


def frame(payload: bytes, kind: bytes = b"J") -> bytes:
    """One frame."""
    return HEADER.pack(len(payload), kind[0]) + payload


def call(method: str, params: Any, number: int = 1) -> bytes:
    """The frame of a request."""
    return frame(json.dumps({"v": 1, "id": number, "method": method, "params": params}).encode())


@contextlib.contextmanager
def connection(attacked: Target, timeout: float = 60) -> Iterator[socket.socket]:
    """A raw connection to the daemon."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        sock.connect(str(attacked.daemon.run_dir / "portwright.sock"))
        yield sock


def everything(sock: socket.socket) -> bytes:
    """All that comes until the daemon closes."""
    chunks = []
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            chunks.append(data)
    return b"".join(chunks)


def answers(data: bytes) -> list[Json]:
    """The JSON answers in a stream; AssertionError if it is not whole frames of them."""
    found = []
    while data:
        length, kind = HEADER.unpack_from(data)
        assert kind in b"je", data[:100]
        body = data[HEADER.size : HEADER.size + length]
        assert len(body) == length, "a frame is cut off"
        found.append(json.loads(body))
        data = data[HEADER.size + length :]
    return found


def attack(attacked: Target, data: bytes, fds: Sequence[int] = ()) -> list[Json]:
    """Send bytes and descriptors, say that no more comes, and return what is answered."""
    with connection(attacked) as sock:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sent = sock.sendmsg([data], rights)
            sock.sendall(data[sent:])
            sock.shutdown(socket.SHUT_WR)
        return answers(everything(sock))


def ask(attacked: Target, method: str, params: Any, fds: Sequence[int] = ()) -> Json:
    """One request, one answer."""
    found = attack(attacked, call(method, params), fds)
    assert len(found) == 1, found
    return found[0]


def status(attacked: Target) -> NodeStatus:
    """The daemon's answer to somebody who asks politely."""
    with attacked.daemon.client() as client:
        return client.node_status()


# --- bytes ----------------------------------------------------------------------------------------

GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "one byte": b"\0",
    "half a header": b"\0\0\0",
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": bytes.fromhex("1603010200010001fc0303") + bytes(500),
    "all ones": b"\xff" * 5000,
    "4 GiB announced": HEADER.pack(2**32 - 1, ord("J")) + b"x" * 1000,
    "one byte over the limit": HEADER.pack(LIMIT + 1, ord("J")) + b"x" * 1000,
    "an unknown kind": frame(b"{}", b"Z"),
    "an answer's kind": frame(b"{}", b"j"),
    "an empty payload": frame(b""),
    "cut off": call("node.status", {})[:-3],
    "not JSON": frame(b"\xff\xfe"),
    "an array": frame(b"[]"),
    "deep": frame(b"[" * 500_000 + b"]" * 500_000),
    "deep parameters": call("node.status", {}).replace(b"{}", b'{"a":' * 30_000 + b"1" + b"}" * 30_000),
    "another protocol": frame(b'{"v":2,"id":1,"method":"node.status"}'),
    "no id": frame(b'{"v":1,"method":"node.status"}'),
    "an id of text": frame(b'{"v":1,"id":"x","method":"node.status"}'),
    "a huge id": frame(b'{"v":1,"id":' + b"9" * 5000 + b',"method":"node.status"}'),
    "an unknown key": frame(b'{"v":1,"id":1,"method":"node.status","sudo":true}'),
    "an unknown method": call("node.__init__", {}),
    "a method of 1 MiB": call("m" * (1 << 20), {}),
    "a method with a traversal": call("../node.stop", {}),
    "parameters that are a list": call("node.status", []),
    "a CNI frame without a header": frame(b"\0\0", b"C"),
    "a CNI frame that lies about its length": frame(struct.pack(">I", 2**31) + b"CNI_COMMAND=ADD\0", b"C"),
    "a CNI frame without equal signs": frame(struct.pack(">I", 4) + b"abc\0", b"C"),
}


@pytest.mark.parametrize("what", list(GARBAGE))
def test_bytes_that_are_no_request(attacked: Target, what: str) -> None:
    """They are answered by at most one error, never by silence and a crash, and the connection ends."""
    with attacked.unharmed(), connection(attacked) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(GARBAGE[what])
            sock.shutdown(socket.SHUT_WR)
        data = everything(sock)
        if what.startswith("a CNI frame"):
            assert json.loads(wire.decode_reply(data[HEADER.size :])[1])["code"] < 199
            return
        found = answers(data)
        assert len(found) <= 1
        assert all(one["error"]["code"] != "internal" for one in found), found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_generated_bytes(attacked: Target, data: st.DataObject) -> None:
    """Any bytes, whole frames, cut ones and mixtures, sent in pieces of any size: the daemon goes on."""
    piece = st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=100).map(frame),
        st.builds(frame, st.binary(max_size=50), st.sampled_from([b"C", b"J", b"e", b"\0"])),
        st.builds(call, st.sampled_from([*CONTRACT, "x"]).filter(lambda m: m != "node.stop"), st.just({})),
    )
    stream = b"".join(data.draw(st.lists(piece, max_size=8)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    with connection(attacked) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            sock.sendall(stream[begin:end])
        sock.shutdown(socket.SHUT_WR)
        # A stream (drops.follow) has no end of its own; we have sent ours.
        everything(sock)
    assert status(attacked).ready


def test_generated_bytes_left_nothing(attacked: Target) -> None:
    """After them the daemon has the descriptors, ports and memory that it had."""
    with attacked.unharmed():
        pass


# --- parameters -----------------------------------------------------------------------------------

WRONG: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**31, 2**63, 2**64, 1.5, 10**300),
    *(
        "",
        "x",
        "../..",
        "a\0b",
        "\ud800",
        "🦊" * 64,
        "x" * 200_000,
        "%s%n",
        "*",
        "10.0.0.0/33",
        "::/0",
        "fe80::1%lo",
    ),
    *([], {}, [None], [[]], ["x"], [{}], {"": None}, {"x": {"y": 1}}, ["10.99.0.9"] * 20_000),
)
#: Methods that a hostile value could make do what they are there for.
REAL: dict[str, Json] = {
    "network.create": {"name": "evil"},
    "network.show": {"name": CALM},
    "port.create": {"network": CALM, "netns": "evil"},
    "port.show": {"port": "evil"},
    "why": {"src": "host", "dst": "10.99.0.1"},
}


def parameters() -> list[tuple[str, str]]:
    """Every parameter of every method."""
    found = [
        (name, field)
        for name, method in sorted(CONTRACT.items())
        for field in method.params.__struct_fields__
    ]
    assert len(found) > 40
    return found


@pytest.mark.parametrize(("method", "field"), parameters(), ids=lambda value: value)
def test_every_parameter_with_every_value(
    attacked: Target, method: str, field: str, record_property: Callable[[str, object], None]
) -> None:
    """A wrong value is refused by an error that is no bug of ours, or means what it says."""
    base = REAL.get(method, {"port": attacked.calm[0].port.port_id} if method != "network.delete" else {})
    base = {key: value for key, value in base.items() if key in CONTRACT[method].params.__struct_fields__}
    with attacked.unharmed():
        for value in WRONG:
            fds = [os.dup(attacked.victim.fd)]
            try:
                answer = _first(attacked, call(method, {**base, field: value}), fds)
            finally:
                os.close(fds[0])
            if "error" in answer:
                error = answer["error"]
                assert error["code"] not in {"internal", "kernel"}, (value, error)
                assert len(error["message"]) < 5_000, (value, len(error["message"]))
            _undo(attacked, method, answer)
    record_property("hostile_values", len(WRONG))


def _first(attacked: Target, data: bytes, fds: Sequence[int]) -> Json:
    """The first answer; the write side is shut, which ends a stream."""
    found = attack(attacked, data, fds)
    # A stream has no answer but its events.
    return found[0] if found else {}


def _undo(attacked: Target, method: str, answer: Json) -> None:
    """Take back what a harmless value did."""
    with attacked.daemon.client() as client:
        calm = attacked.calm[0].port
        if method == "port.create" and "port_id" in answer.get("result", {}):
            client.port_delete(answer["result"]["port_id"])
        elif method == "network.create" and "result" in answer:
            client.network_delete(answer["result"]["name"])
        elif method == "port.set" and "result" in answer:
            client.port_set(calm.port_id, admin="up", mtu=calm.mtu, limits=_NO_LIMITS)


_NO_LIMITS = LimitsChange(egress_rate=0, egress_burst=0, ingress_rate=0, ingress_burst=0)


#: Good parameters with structure; everything below their first level is attacked too.
NESTED: dict[str, Json] = {
    "network.create": {
        "name": "evil",
        "ranges": [
            [{"subnet": "10.98.0.0/24", "start": "10.98.0.3", "end": "10.98.0.9", "gateway": "10.98.0.1"}]
        ],
        "routes": [
            {"dst": "0.0.0.0/0", "gw": "10.98.0.1", "mtu": 1400, "advmss": 1360}
            | {"priority": 1, "table": 254, "scope": 0}
        ],
        "dns": {"nameservers": ["192.0.2.53"], "domain": "d", "search": ["s"], "options": ["o"]},
        "reserved": ["10.98.0.4"],
        "reach": [CALM],
    },
    "port.create": {
        "network": CALM,
        "netns": "evil",
        "name": "evil",
        "ips": ["10.99.0.77"],
        "labels": {"k": "v"},
        "port_mappings": [
            {"host_port": 8088, "container_port": 80, "protocol": "tcp", "host_ip": "192.0.2.2"}
        ],
        "limits": {
            "egress_rate": 10**9,
            "egress_burst": 10**9,
            "ingress_rate": 10**9,
            "ingress_burst": 10**9,
        },
    },
}


@pytest.mark.parametrize(
    ("method", "path"),
    [(method, path) for method, base in NESTED.items() for path in fields(base) if len(path) > 1],
    ids=lambda value: value if isinstance(value, str) else ".".join(map(str, value)),
)
def test_every_nested_parameter_with_every_value(
    attacked: Target,
    method: str,
    path: tuple[str | int, ...],
    record_property: Callable[[str, object], None],
) -> None:
    """The same below the first level; and who joins a network that was accepted is served, or told why."""
    with attacked.unharmed():
        for value in WRONG:
            fds = [os.dup(attacked.victim.fd)]
            try:
                answer = _first(attacked, call(method, replaced(NESTED[method], path, value)), fds)
                if method == "network.create" and "result" in answer:
                    joined = {"network": answer["result"]["name"], "netns": "evil", "name": "evil"}
                    port = _first(attacked, call("port.create", joined), fds)
                    assert port.get("error", {}).get("code") not in {"internal", "kernel"}, (value, port)
                    _undo(attacked, "port.create", port)
            finally:
                os.close(fds[0])
            if "error" in answer:
                code, text = answer["error"]["code"], answer["error"]["message"].lower()
                assert code not in {"internal", "kernel", "netlink"}, (value, answer)
                # The CNI's spelling of a word will do (hostPort); what is no JSON has no fields.
                names = {str(key).replace("_", "") for key in path if isinstance(key, str)}
                assert code == "protocol" or any(name in text.replace("_", "") for name in names), answer
            _undo(attacked, method, answer)
    record_property("hostile_values", len(WRONG))


# --- descriptors ----------------------------------------------------------------------------------


def _wrong_descriptors(attacked: Target) -> Iterator[tuple[str, int]]:
    """Descriptors that are no network namespace, with a name for each."""
    base = str(attacked.daemon.base)
    yield "a regular file", os.open(f"{base}/log", os.O_RDONLY)
    yield "a folder", os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    yield "O_PATH of a namespace", os.open(attacked.victim.path, os.O_PATH)
    yield "a pipe", os.pipe2(os.O_CLOEXEC)[0]
    yield "/dev/null", os.open("/dev/null", os.O_RDONLY)
    yield "a socket", socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()
    yield "a netlink socket", socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).detach()
    for kind in ("mnt", "uts", "ipc", "user", "cgroup", "pid"):
        yield f"a {kind} namespace", os.open(f"/proc/self/ns/{kind}", os.O_RDONLY)
    yield "a memfd", os.memfd_create("evil")
    yield "an eventfd", os.eventfd(0)
    process = subprocess.Popen(["/bin/true"])
    yield "a pidfd", os.pidfd_open(process.pid)
    process.wait()


def test_descriptors_of_the_wrong_kind(attacked: Target) -> None:
    """Each is refused as no network namespace, by every method that takes one, and closed."""
    with attacked.unharmed():
        for what, fd in _wrong_descriptors(attacked):
            try:
                for method, params in (
                    ("port.create", {"network": CALM, "netns": "evil", "name": "evil"}),
                    ("port.create", {"network": CALM, "netns": "evil", "dry_run": True}),
                    ("port.plug", {"port": attacked.calm[0].port.port_id, "netns": "evil"}),
                ):
                    error = ask(attacked, method, params, [fd])["error"]
                    wanted = {"invalid"} if method == "port.create" else {"invalid", "port-state"}
                    assert error["code"] in wanted, (what, method, error)
                stdin = json.dumps({"cniVersion": "1.1.0", "name": "evil", "network": CALM}).encode()
                for fds in ([attacked.host.fd, fd], [fd, attacked.victim.fd], [fd, fd]):
                    env = {
                        "CNI_COMMAND": "ADD",
                        "CNI_CONTAINERID": "evil",
                        "CNI_IFNAME": "eth0",
                        "CNI_NETNS": "/x",
                    }
                    reply = _cni(attacked, wire.encode_request(env, stdin), fds)
                    assert reply["code"] == 8, (what, reply)
            finally:
                os.close(fd)


def _cni(attacked: Target, payload: bytes, fds: Sequence[int]) -> Json:
    with connection(attacked) as sock:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        data = frame(payload, b"C")
        sent = sock.sendmsg([data], rights)
        sock.sendall(data[sent:])
        sock.shutdown(socket.SHUT_WR)
        body = everything(sock)
    _, stdout, _ = wire.decode_reply(body[HEADER.size :])
    found: Json = json.loads(stdout)
    return found


def test_a_sandbox_that_died_while_its_descriptor_travelled(attacked: Target) -> None:
    """A namespace that only our descriptor keeps alive gets a port, and all of it goes when it is deleted."""
    dead = attacked.namespace()
    fd = os.dup(dead.fd)
    dead.close()
    with attacked.unharmed():
        try:
            answer = ask(attacked, "port.create", {"network": CALM, "netns": dead.path, "name": "dead"}, [fd])
        finally:
            os.close(fd)
        if "result" in answer:
            with attacked.daemon.client() as client:
                client.port_delete(answer["result"]["port_id"])


def test_too_many_descriptors(attacked: Target) -> None:
    """More than four with one message end the connection; those with no frame, or a short one, are closed."""
    with attacked.unharmed():
        fds = [os.dup(attacked.victim.fd) for _ in range(200)]
        try:
            for count in (5, 20, 200):
                found = attack(attacked, call("node.status", {}), fds[:count])
                assert [one["error"]["code"] for one in found] == ["protocol"], count
            # Four that nobody asked for are closed with the request.
            for _ in range(100):
                assert "result" in ask(attacked, "node.status", {}, fds[:4])
            # Descriptors with every byte of a frame that is never whole.
            with connection(attacked) as sock:
                for byte in call("node.status", {})[:60]:
                    rights = array.array("i", fds[:4])
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        sock.sendmsg([bytes([byte])], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        finally:
            for fd in fds:
                os.close(fd)


# --- too much, too slow ---------------------------------------------------------------------------


def test_300_connections_that_say_nothing(attacked: Target) -> None:
    """Beyond 256 the next ones wait; once some of them go everybody is served. No descriptor stays."""
    with attacked.unharmed(), contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connection(attacked))
        wait_until(lambda: attacked.fds() > 250, 10, "the daemon to have accepted what it takes")
        assert attacked.fds() < 350
        stack.close()
        assert status(attacked).ready


def test_a_slow_sender_holds_nobody_up(attacked: Target) -> None:
    """A hundred frames that come a byte at a time cost others nothing that they would notice."""
    data = call("node.status", {})
    with attacked.unharmed(), contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connection(attacked)) for _ in range(100)]
        worst = 0.0
        for byte in data[:40]:
            for sock in slow:
                sock.send(bytes([byte]))
            began = time.monotonic()
            assert status(attacked).ready
            worst = max(worst, time.monotonic() - began)
        assert worst < 2.0, worst


@pytest.mark.slow
def test_a_frame_that_never_ends_is_given_up(attacked: Target) -> None:
    """After 30 s without the rest its connection is closed, with the reason."""
    with attacked.unharmed(), connection(attacked, timeout=2 * IDLE) as sock:
        sock.sendall(call("node.status", {})[:-1])
        found = answers(everything(sock))
        assert [one["error"]["code"] for one in found] == ["protocol"]
        assert "not whole" in found[0]["error"]["message"]


def test_a_reader_that_does_not_read(attacked: Target) -> None:
    """Requests whose answers nobody reads stop being read themselves: memory stays bounded."""
    request = b"".join(call("introspect", {}, number) for number in range(200))
    with attacked.unharmed(), connection(attacked) as sock:
        sock.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 50 << 20:
                sent += sock.send(request)
        assert sent < 20 << 20, "the daemon took everything"
        assert status(attacked).ready


def test_many_requests_at_once(attacked: Target) -> None:
    """A thousand requests on each of ten connections are all answered, each once."""

    request = b"".join(call("port.list", {}, number) for number in range(1000))

    def send(sock: socket.socket) -> None:
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)

    def worker(counts: list[int]) -> None:
        with connection(attacked) as sock:
            sender = threading.Thread(target=send, args=(sock,))
            sender.start()
            found = answers(everything(sock))
            sender.join()
        counts.append(len({one["id"] for one in found if "result" in one}))

    with attacked.unharmed():
        counts: list[int] = []
        threads = [threading.Thread(target=worker, args=(counts,)) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counts == [1000] * 10


def test_connections_that_break_in_every_place(attacked: Target) -> None:
    """A caller that goes away, with or without a reset, after any byte of a request leaves nothing behind."""
    data = call("port.create", {"network": CALM, "netns": "evil", "name": "evil", "dry_run": True})
    with attacked.unharmed():
        for end in range(0, len(data) + 1, 3):
            with connection(attacked) as sock:
                rights = array.array("i", [attacked.victim.fd])
                sock.sendmsg([data[:end] or b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                if end % 2:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_streams_that_nobody_reads(attacked: Target) -> None:
    """Followers that stall lose events and cost a bounded amount; more than their share are refused."""
    with attacked.unharmed(), contextlib.ExitStack() as stack:
        refused = 0
        for _ in range(80):
            sock = stack.enter_context(connection(attacked))
            sock.sendall(call("drops.follow", {}))
        for _ in range(2):
            sock = stack.enter_context(connection(attacked))
            sock.sendall(call("drops.follow", {}))
            sock.settimeout(5)
            header = sock.recv(HEADER.size, socket.MSG_WAITALL)
            body = json.loads(sock.recv(HEADER.unpack(header)[0], socket.MSG_WAITALL))
            refused += body["error"]["code"] == "busy"
        assert refused == 2
        a, b = attacked.calm
        a.run(["ip", "addr", "add", "10.99.0.250/32", "dev", "eth0"])
        a.run(["ping", "-q", "-f", "-c", "300", "-W", "1", "-I", "10.99.0.250", b.ip4], check=False)
        a.run(["ip", "addr", "del", "10.99.0.250/32", "dev", "eth0"])
        assert status(attacked).ready


# --- who may --------------------------------------------------------------------------------------


def test_a_stranger_is_refused_by_name(attacked: Target) -> None:
    """The socket is 0600; even where it were not, another user's uid is refused, and told so."""
    path = attacked.daemon.run_dir / "portwright.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    script = (
        "import os,socket,sys\n"
        "s=socket.socket(socket.AF_UNIX)\n"
        "s.connect(sys.argv[1]) if sys.argv[2]=='open' else None\n"
        "os.setgid(65534) or os.setuid(65534)\n"
        "s=socket.socket(socket.AF_UNIX)\n"
        "s.connect(sys.argv[1])\n"
        "print(s.recv(4096)[5:].decode())\n"
    )
    with attacked.unharmed():
        done = _python(script, str(path), "closed")
        assert "PermissionError" in done.stderr
        opened = [path, path.parent, path.parent.parent]
        modes = [one.stat().st_mode for one in opened]
        for one in opened:
            one.chmod(0o777)
        try:
            done = _python(script, str(path), "closed")
        finally:
            for one, mode in zip(opened, modes, strict=True):
                one.chmod(mode)
        assert json.loads(done.stdout)["error"]["code"] == "not-authorized", done


def _python(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/usr/bin/python3", "-I", "-c", script, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )


# --- files ----------------------------------------------------------------------------------------


SPOOLED: dict[str, bytes] = {
    "1-1": b"",
    "2-2": b"\xff" * 100,
    "3-3": wire.encode_request({"CNI_COMMAND": "DEL"}, b"{}"),
    "4-4": wire.encode_request(
        {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c", "CNI_IFNAME": "eth0", "CNI_NETNS": "/x"},
        b'{"cniVersion":"1.1.0","name":"evil"}',
    ),
    "..-..": b"x",
    "x": b"y",
}


def _fill(spool: Path) -> None:
    spool.mkdir(exist_ok=True)
    for name, data in SPOOLED.items():
        (spool / name).write_bytes(data)
    (spool / "5-5").symlink_to("/etc/passwd")
    (spool / "6-6").mkdir()


def _check_and_empty(spool: Path) -> None:
    names = {path.name for path in spool.iterdir()}
    assert not {"1-1", "2-2", "3-3", "4-4", "5-5", "6-6"} & names, names
    assert Path("/etc/passwd").exists()
    for path in spool.iterdir():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_hostile_files_in_the_spool(attacked: Target) -> None:
    """What lies in the spool and is no DEL of ours is set aside with a word in the log, and stops no ADD."""
    spool = attacked.daemon.state_dir / "spool"
    _fill(spool)
    with attacked.unharmed():
        conf = {"cniVersion": "1.1.0", "name": "spooled", "network": CALM}
        answer = attacked.add(conf)
        assert answer.status == 0, answer
        assert attacked.delete(conf).status == 0
        _check_and_empty(spool)


def test_hostile_files_in_the_spool_stop_no_start(daemon: Daemon) -> None:
    """A daemon starts with the same files there, and has set them aside when it is ready."""
    daemon.kill()
    _fill(daemon.state_dir / "spool")
    daemon.start()
    _check_and_empty(daemon.state_dir / "spool")
