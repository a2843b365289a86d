"""The asyncio client: ``portwright.AsyncClient``."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from portwright.api import calls, frames
from portwright.api.calls import Built, Call, P, R
from portwright.api.client import unavailable
from portwright.api.errors import ConnectionLost, RequestTimeout, error_from_wire
from portwright.api.errors import WireError as _WireError
from portwright.api.frames import FrameDecoder, close_all, send_start
from portwright.api.paths import open_netns, socket_path
from portwright.api.wire import REUSE_WITHIN, Events, Reply, parse_reply, request_frame, result_of
from portwright.model.errors import PortwrightError


class _Method(Built[P, R]):
    """Makes a method of :class:`AsyncClient` from a function of :mod:`portwright.api.calls`."""

    @overload
    def __get__(self, client: None, owner: type[AsyncClient]) -> Self: ...
    @overload
    def __get__(
        self, client: AsyncClient, owner: type[AsyncClient]
    ) -> Callable[P, Coroutine[Any, Any, R]]: ...
    def __get__(
        self, client: AsyncClient | None, owner: type[AsyncClient]
    ) -> Self | Callable[P, Coroutine[Any, Any, R]]:
        """Bind to a client."""
        if client is None:
            return self
        build = self._build

        async def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return await client.call(build(*args, **kwargs))

        call.__doc__, call.__name__ = build.__doc__, build.__name__
        return call


class _Stream(Built[P, R]):
    """As :class:`_Method`, for a stream."""

    @overload
    def __get__(self, client: None, owner: type[AsyncClient]) -> Self: ...
    @overload
    def __get__(
        self, client: AsyncClient, owner: type[AsyncClient]
    ) -> Callable[P, AsyncGenerator[R, None]]: ...
    def __get__(
        self, client: AsyncClient | None, owner: type[AsyncClient]
    ) -> Self | Callable[P, AsyncGenerator[R, None]]:
        """Bind to a client."""
        if client is None:
            return self
        build = self._build

        def follow(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[R, None]:
            return client.follow(build(*args, **kwargs))

        follow.__doc__, follow.__name__ = build.__doc__, build.__name__
        return follow


class AsyncClient:
    """As :class:`portwright.Client`, for asyncio: calls run concurrently over one connection.

    A call that is cancelled or times out may still be carried out; others are not disturbed.
    Belongs to the loop in which it is first used.
    """

    def __init__(self, socket: str | os.PathLike[str] | None = None, *, timeout: float | None = 30.0) -> None:
        self._path = Path(socket) if socket is not None else socket_path()
        self._timeout = timeout
        self._ids = itertools.count(1)
        self._channel: _Channel | None = None
        self._connecting = asyncio.Lock()

    async def close(self) -> None:
        """Close the connection; calls that wait raise ConnectionLost. The client can be used again."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def call(self, call: Call[R]) -> R:
        """Carry out a call of :mod:`portwright.api.calls`."""
        try:
            async with asyncio.timeout(self._timeout):
                channel = await self._connected()
                reply = await channel.request(next(self._ids), call)
        except TimeoutError:
            raise RequestTimeout(call.method, self._timeout or 0.0) from None
        return result_of(reply, call)

    async def follow(self, call: Call[R]) -> AsyncGenerator[R, None]:
        """Iterate over the events of a stream call, on a connection of its own, until it ends."""
        sock = await _connect(self._path)
        try:
            events = Events(call)
            decoder = FrameDecoder(frames.REPLY_KINDS, frames.MAX_REPLY)
            await _send(sock, next(self._ids), call)
            while not events.ended:
                for frame in decoder.feed(await _receive(sock, call.method)):
                    for event in events.take(parse_reply(frame)):
                        yield event
        finally:
            sock.close()

    async def _connected(self) -> _Channel:
        async with self._connecting:
            if self._channel is not None and self._channel.stale():
                await self._channel.close()
                self._channel = None
            if self._channel is None:
                self._channel = _Channel(await _connect(self._path))
            return self._channel

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


class _Channel:
    """One connection with a task that reads: requests wait for their answers by id."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, tuple[str, asyncio.Future[Reply]]] = {}
        self._sending = asyncio.Lock()
        self._used = self._loop.time()
        self._reader = self._loop.create_task(self._read())

    def stale(self) -> bool:
        """Whether the daemon has closed this connection, or may be about to."""
        if self._reader.done() or (not self._waiting and self._loop.time() - self._used > REUSE_WITHIN):
            return True
        return frames.peek(self._sock) == b""  # the reader may not have had its turn since

    async def close(self) -> None:
        self._reader.cancel()
        await asyncio.wait([self._reader])
        self._sock.close()

    async def request(self, request_id: int, call: Call[Any]) -> Reply:
        answer: asyncio.Future[Reply] = self._loop.create_future()
        self._waiting[request_id] = (call.method, answer)
        try:
            async with self._sending:
                # Once begun, a frame is sent whole: half of one would spoil the connection for the others.
                await asyncio.shield(self._loop.create_task(_send(self._sock, request_id, call)))
            self._used = self._loop.time()
            return await answer
        finally:
            del self._waiting[request_id]

    async def _read(self) -> None:
        decoder = FrameDecoder(frames.REPLY_KINDS, frames.MAX_REPLY)
        why = "connection closed"
        refusal: PortwrightError | None = None
        try:
            while refusal is None:
                for frame in decoder.feed(await _receive(self._sock, "")):
                    reply = parse_reply(frame)
                    self._used = self._loop.time()
                    if reply.id is None and isinstance(reply.error, _WireError):
                        refusal = error_from_wire(reply.error)
                    elif reply.id in self._waiting and not self._waiting[reply.id][1].done():
                        self._waiting[reply.id][1].set_result(reply)
        except ConnectionLost as error:
            why = error.why
        except PortwrightError as error:
            refusal = error
        finally:
            for method, answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(refusal or ConnectionLost(method, why))


async def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        while True:
            try:
                await asyncio.get_running_loop().sock_connect(sock, str(path))
            except BlockingIOError:
                await asyncio.sleep(0.01)  # a full backlog: AF_UNIX has no event for room in it
            else:
                return sock
    except OSError as error:
        sock.close()
        raise unavailable(path, error) from None
    except BaseException:
        sock.close()
        raise


async def _send(sock: socket.socket, request_id: int, call: Call[Any]) -> None:
    """Send a request with its namespaces, whole. A peer that is gone is for the receiver to notice."""
    loop = asyncio.get_running_loop()
    data = request_frame(request_id, call.method, call.params)
    fds: list[int] = []
    try:
        for spec in call.netns:
            fds.append(open_netns(spec))
        sent = await _send_start(sock, data, fds)
        await loop.sock_sendall(sock, data[sent:])
    except OSError:
        pass
    finally:
        close_all(fds)


async def _send_start(sock: socket.socket, data: bytes, fds: Sequence[int]) -> int:
    loop = asyncio.get_running_loop()
    while True:
        try:
            return send_start(sock, data, fds)
        except (BlockingIOError, InterruptedError):
            writable: asyncio.Future[None] = loop.create_future()
            loop.add_writer(sock, _wake, writable)
            try:
                await writable
            finally:
                loop.remove_writer(sock)


def _wake(writable: asyncio.Future[None]) -> None:
    if not writable.done():
        writable.set_result(None)


async def _receive(sock: socket.socket, method: str) -> bytes:
    try:
        data = await asyncio.get_running_loop().sock_recv(sock, frames.CHUNK)
    except OSError as error:
        raise ConnectionLost(method, error.strerror or str(error)) from None
    if not data:
        raise ConnectionLost(method, "connection closed")
    return data
