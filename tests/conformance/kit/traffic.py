"""Real packets: echo servers inside a namespace, and clients that ask them from another."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from .netns import Netns
from .observe import family_of

_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


class Server:
    """A socket server in a thread. TCP echoes; UDP answers ``tag`` + what was asked, and keeps what it got.

    A context manager; leaving it closes every socket and ends the thread.
    """

    def __init__(self, ns: Netns, address: str, port: int, *, udp: bool = False, tag: bytes = b"") -> None:
        family = _FAMILY[family_of(address)]
        kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
        self._socket = ns.call(lambda: socket.socket(family, kind))
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((address, port))
            if not udp:
                self._socket.listen(64)
        except OSError:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[1]
        self.tag = tag
        self.received: list[tuple[bytes, str]] = []
        self._udp = udp
        self._arrival = threading.Condition()
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name=f"echo-{port}")
        self._thread.start()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as clients:
            selector.register(self._socket, selectors.EVENT_READ, self._datagram if self._udp else None)
            selector.register(self._wake, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._wake:
                        return
                    if key.fileobj is self._socket and not self._udp:
                        client, peer = self._socket.accept()
                        clients.enter_context(client)
                        with self._arrival:
                            self.received.append((b"", peer[0]))
                            self._arrival.notify_all()
                        selector.register(client, selectors.EVENT_READ)
                    elif key.fileobj is self._socket:
                        self._datagram()
                    elif isinstance(key.fileobj, socket.socket) and not self._echo(key.fileobj):
                        selector.unregister(key.fileobj)

    def _datagram(self) -> None:
        data, peer = self._socket.recvfrom(65535)
        with self._arrival:
            self.received.append((data, peer[0]))
            self._arrival.notify_all()
        with contextlib.suppress(OSError):
            self._socket.sendto(self.tag + data, peer)

    def _echo(self, client: socket.socket) -> bool:
        try:
            data = client.recv(65536)
            if data:
                client.sendall(data)
                return True
        except OSError:
            pass
        client.close()
        return False

    def wait_for(self, wanted: Callable[[bytes, str], bool], timeout: float = 5) -> bool:
        """True once something has arrived for which ``wanted(data, peer)``; False after ``timeout``."""
        with self._arrival:
            return self._arrival.wait_for(lambda: any(wanted(*one) for one in self.received), timeout)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waker.close()
        self._thread.join()
        self._wake.close()
        self._socket.close()


def tcp_ask(
    ns: Netns, address: str, port: int, payload: bytes = b"hello", *, timeout: float = 5, source: str = ""
) -> bytes:
    """Connect from ``ns``, send, return as much as was sent. OSError if it takes too long."""

    def ask() -> bytes:
        deadline = time.monotonic() + timeout
        with socket.socket(_FAMILY[family_of(address)], socket.SOCK_STREAM) as client:
            client.settimeout(timeout)
            if source:
                client.bind((source, 0))
            client.connect((address, port))
            sender = threading.Thread(target=client.sendall, args=(payload,))
            sender.start()
            try:
                answer = bytearray()
                while len(answer) < len(payload):
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{len(answer)} of {len(payload)} bytes in {timeout} s")
                    data = client.recv(65536)
                    if not data:
                        raise ConnectionResetError(f"closed after {len(answer)} bytes")
                    answer += data
            except BaseException:
                client.shutdown(socket.SHUT_RDWR)
                raise
            finally:
                sender.join()
            return bytes(answer)

    return ns.call(ask)


def tcp_refused(ns: Netns, address: str, port: int, *, timeout: float = 0.7) -> bool:
    """True if a connection from ``ns`` is refused, unreachable or unanswered for ``timeout`` seconds."""
    try:
        tcp_ask(ns, address, port, b"?", timeout=timeout)
    except OSError:
        return True
    return False


def udp_ask(
    ns: Netns, address: str, port: int, payload: bytes = b"hello", *, source_port: int = 0, timeout: float = 5
) -> bytes:
    """Send a datagram from ``ns`` (again each 0.3 s), return the answer. TimeoutError after ``timeout``."""

    def ask() -> bytes:
        with socket.socket(_FAMILY[family_of(address)], socket.SOCK_DGRAM) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind(("", source_port))
            client.connect((address, port))
            client.settimeout(0.3)
            deadline = time.monotonic() + timeout
            while time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError, ConnectionRefusedError):
                    client.send(payload)
                    return client.recv(65535)
        raise TimeoutError(f"no answer from {address}:{port} in {timeout} s")

    return ns.call(ask)


def ping(ns: Netns, address: str, *, timeout: float = 3, device: str = "") -> bool:
    """True once one of a few echo requests from ``ns`` is answered within ``timeout`` seconds."""
    target = f"{address}%{device}" if device and address.startswith("fe80") else address
    command = [
        "timeout",
        str(timeout),
        "ping",
        "-n",
        "-q",
        "-c",
        "1",
        "-i",
        "0.2",
        "-w",
        str(int(timeout)),
        target,
    ]
    try:
        ns.run(command)
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def echo(ns: Netns, address: str, port: int = 0, *, udp: bool = False, tag: bytes = b"") -> Iterator[Server]:
    """A server for the length of a ``with`` block."""
    with Server(ns, address, port, udp=udp, tag=tag) as server:
        yield server


def send_frame(ns: Netns, ifname: str, frame: bytes) -> None:
    """Put a raw Ethernet frame on a link of ``ns``."""

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind((ifname, 0))
            raw.send(frame)

    ns.call(send)
