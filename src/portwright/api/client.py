"""The blocking client: ``portwright.Client``."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from portwright.api import calls, frames
from portwright.api.calls import Built, Call, P, R
from portwright.api.errors import ConnectionLost, ProtocolError, RequestTimeout
from portwright.api.frames import Frame, FrameDecoder, close_all, send_start
from portwright.api.paths import open_netns, socket_path
from portwright.api.wire import REUSE_WITHIN, Events, parse_reply, request_frame, result_of
from portwright.model.errors import DaemonUnavailable


class _Method(Built[P, R]):
    """Makes a method of :class:`Client` from a function of :mod:`portwright.api.calls`."""

    @overload
    def __get__(self, client: None, owner: type[Client]) -> Self: ...
    @overload
    def __get__(self, client: Client, owner: type[Client]) -> Callable[P, R]: ...
    def __get__(self, client: Client | None, owner: type[Client]) -> Self | Callable[P, R]:
        """Bind to a client."""
        if client is None:
            return self
        build = self._build

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return client.call(build(*args, **kwargs))

        call.__doc__, call.__name__ = build.__doc__, build.__name__
        return call


class _Stream(Built[P, R]):
    """As :class:`_Method`, for a stream."""

    @overload
    def __get__(self, client: None, owner: type[Client]) -> Self: ...
    @overload
    def __get__(self, client: Client, owner: type[Client]) -> Callable[P, Generator[R, None, None]]: ...
    def __get__(
        self, client: Client | None, owner: type[Client]
    ) -> Self | Callable[P, Generator[R, None, None]]:
        """Bind to a client."""
        if client is None:
            return self
        build = self._build

        def follow(*args: P.args, **kwargs: P.kwargs) -> Generator[R, None, None]:
            return client.follow(build(*args, **kwargs))

        follow.__doc__, follow.__name__ = build.__doc__, build.__name__
        return follow


class Client:
    """A connection to the daemon, made at the first call and again when it was closed between calls.

    ``socket`` is the daemon's (default: ``$PORTWRIGHT_RUN_DIR/portwright.sock``, else
    /run/portwright/portwright.sock); ``timeout`` seconds bound each call, None none. Threads may
    share a client: one call runs at a time. Not to be used in the child after a fork.

    Every method raises, besides its own errors, DaemonUnavailable if nothing answers (nothing was
    done then), RequestTimeout and ConnectionLost (it may have been done), ProtocolError.
    """

    def __init__(self, socket: str | os.PathLike[str] | None = None, *, timeout: float | None = 30.0) -> None:
        self._path = Path(socket) if socket is not None else socket_path()
        self._timeout = timeout
        self._lock = threading.Lock()
        self._link: _Link | None = None
        self._ids = itertools.count(1)

    def close(self) -> None:
        """Close the connection. The client can be used again."""
        with self._lock:
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def socket(self) -> Path:
        """The path of the daemon's socket."""
        return self._path

    def call(self, call: Call[R]) -> R:
        """Carry out a call of :mod:`portwright.api.calls`."""
        with self._lock:
            if self._link is not None and self._link.stale():
                self._drop()
            if self._link is None:
                self._link = _Link(self._path, self._timeout)
            try:
                self._link.send(next(self._ids), call, self._timeout)
                reply = parse_reply(self._link.receive(call.method))
            except BaseException:  # also ^C: an answer that comes later must not meet the next call
                self._drop()
                raise
            return result_of(reply, call)

    def follow(self, call: Call[R]) -> Generator[R, None, None]:
        """Iterate over the events of a stream call, on a connection of its own, until it ends.

        Close the iterator, or let it go, to end the stream.
        """
        link = _Link(self._path, self._timeout)
        try:
            events = Events(call)
            link.send(next(self._ids), call, None)
            while not events.ended:
                yield from events.take(parse_reply(link.receive(call.method)))
        finally:
            link.close()

    def wait_closed(self, timeout: float) -> bool:
        """Wait until the daemon closes the connection, as it does when it stops.

        Returns whether it did within ``timeout`` seconds. True if there is no connection.
        """
        with self._lock:
            if self._link is None:
                return True
            try:
                return self._link.wait_closed(timeout)
            finally:
                self._drop()

    def server_pid(self) -> int:
        """Return the process that listens on the socket, as SO_PEERCRED says; 0 without a connection."""
        with self._lock:
            return self._link.server_pid() if self._link is not None else 0

    def _drop(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    introspect = _Method(calls.introspect)
    node_status = _Method(calls.node_status)
    node_stop = _Method(calls.node_stop)
    network_create = _Method(calls.network_create)
    network_list = _Method(calls.network_list)
    network_show = _Method(calls.network_show)
    network_delete = _Method(calls.network_delete)
    port_create = _Method(calls.port_create)
    port_plan = _Method(calls.port_plan)
    port_list = _Method(calls.port_list)
    port_show = _Method(calls.port_show)
    port_link = _Method(calls.port_link)
    port_delete = _Method(calls.port_delete)
    port_set = _Method(calls.port_set)
    port_plug = _Method(calls.port_plug)
    port_unplug = _Method(calls.port_unplug)
    port_migrate = _Method(calls.port_migrate)
    stats = _Method(calls.stats)
    drops = _Method(calls.drops)
    drops_follow = _Stream(calls.drops_follow)
    why = _Method(calls.why)
    policy_apply = _Method(calls.policy_apply)
    policy_list = _Method(calls.policy_list)
    policy_delete = _Method(calls.policy_delete)
    policy_staged = _Method(calls.policy_staged)
    doctor = _Method(calls.doctor)


class _Link:
    """One connected socket, blocking, with one request at a time."""

    def __init__(self, path: Path, timeout: float | None) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._decoder = FrameDecoder(frames.REPLY_KINDS, frames.MAX_REPLY)
        self._whole: list[Frame] = []
        self._used = time.monotonic()
        self._deadline: float | None = None
        self._seconds = 0.0
        try:
            self._sock.settimeout(timeout)
            self._sock.connect(str(path))
        except OSError as error:
            self._sock.close()
            raise unavailable(path, error) from None

    def close(self) -> None:
        self._sock.close()

    def stale(self) -> bool:
        """Whether the daemon has closed this connection, or may be about to."""
        if time.monotonic() - self._used > REUSE_WITHIN:
            return True
        self._sock.settimeout(0)
        return frames.peek(self._sock) is not None  # the end, or bytes that nobody asked for

    def send(self, request_id: int, call: Call[Any], timeout: float | None) -> None:
        """Send the request with its namespaces; ``timeout`` seconds for it and its answer."""
        self._seconds = timeout or 0.0
        self._deadline = None if timeout is None else time.monotonic() + timeout
        data = request_frame(request_id, call.method, call.params)
        fds: list[int] = []
        try:
            for spec in call.netns:
                fds.append(open_netns(spec))
            self._arm(call.method)
            sent = send_start(self._sock, data, fds)
            self._arm(call.method)
            self._sock.sendall(data[sent:])
        except TimeoutError:
            raise RequestTimeout(call.method, self._seconds) from None
        except (BrokenPipeError, ConnectionResetError):
            pass  # the daemon may have said why before it closed: receive() looks
        except OSError as error:
            raise ConnectionLost(call.method, error.strerror or str(error)) from None
        finally:
            close_all(fds)

    def receive(self, method: str) -> Frame:
        """Return the next frame."""
        while not self._whole:
            self._arm(method)
            try:
                data = self._sock.recv(frames.CHUNK)
            except TimeoutError:
                raise RequestTimeout(method, self._seconds) from None
            except OSError as error:
                raise ConnectionLost(method, error.strerror or str(error)) from None
            if not data:
                raise ConnectionLost(method, "connection closed")
            self._whole = self._decoder.feed(data)
            self._used = time.monotonic()
        return self._whole.pop(0)

    def wait_closed(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        try:
            while (left := deadline - time.monotonic()) > 0:
                self._sock.settimeout(left)
                if not self._sock.recv(frames.CHUNK):
                    return True
        except TimeoutError:
            return False
        except OSError:
            return True
        return False

    def server_pid(self) -> int:
        pid, _uid, _gid = struct.unpack(
            "3i", self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        return int(pid)

    def _arm(self, method: str) -> None:
        """Give the next operation on the socket what is left of the time."""
        if self._deadline is None:
            self._sock.settimeout(None)
            return
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise RequestTimeout(method, self._seconds)
        self._sock.settimeout(left)


def unavailable(path: Path, error: OSError) -> DaemonUnavailable:
    """Return the error for a connect that failed."""
    if isinstance(error, PermissionError):
        return DaemonUnavailable(str(path), "permission denied: it is for root")
    return DaemonUnavailable(str(path), (error.strerror or str(error)).lower())


__all__ = ["Client", "ProtocolError", "unavailable"]
