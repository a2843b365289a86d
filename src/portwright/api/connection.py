"""One connection of the server: reads requests, runs them, writes answers, and bounds all three.

Bounds, so that no client can cost more than a known amount of memory or time:

- at most :data:`MAX_INFLIGHT` requests run at once; what is beyond waits unread in the socket,
  but for what the last chunk held;
- the large requests of all connections, from the header to the answer, are as few as there are slots;
- nothing more is read while :data:`WRITE_HIGH` bytes of answers wait to be written;
- a stream whose reader is :data:`STREAM_HIGH` bytes behind loses events; they are counted, and
  the reader is told where and how many;
- a frame that stays partial, answers that nobody reads, and a connection on which nothing
  happens are given up after ``idle_timeout`` seconds. A stream's reader may stall for ever.

A client that goes away ends its streams, but not its other requests: what was asked for is carried
out, and the record says so.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

from portwright.api import frames, payloads
from portwright.api.errors import Busy, ProtocolError
from portwright.api.frames import Frame, FrameDecoder, close_all
from portwright.api.registry import PROTOCOL
from portwright.api.request import Peer, Request, Slots
from portwright.model.errors import InternalError, PortwrightError

Dispatch = Callable[[Request], Awaitable[object]]
MAX_INFLIGHT: Final = 32
WRITE_HIGH: Final = 1 << 20
STREAM_HIGH: Final = 256 << 10

_log = logging.getLogger(__name__)


class Connection:
    """Serves ``sock``, which it owns and has to be non-blocking, until it closes.

    ``on_close`` is called once, when the socket is closed and no request of it runs any more.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: Peer,
        dispatch: Dispatch,
        *,
        idle_timeout: float,
        streams: Slots,
        large: Slots,
        on_close: Callable[[Connection], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._peer = peer
        self._dispatch = dispatch
        self._timeout = idle_timeout
        self._stream_slots, self._large_slots = streams, large
        self._large_begun = False  # a slot is taken for a large frame that is not whole
        self._on_close = on_close
        self._decoder = FrameDecoder()
        self._waiting: deque[Request] = deque()
        self._tasks: dict[asyncio.Task[None], Request] = {}
        self._streams: dict[asyncio.Task[None], int] = {}
        self._lost: dict[int, int] = {}  # by request id: events of a stream not told of yet
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0
        self._reading = False
        self._writing = False
        self._ending = False  # no more requests; close when all is answered and written
        self._closed = False
        self._told = False
        now = self._loop.time()
        self._last_active = self._partial_since = self._last_write = now
        self._timer = self._loop.call_later(idle_timeout / 4, self._tick)
        self._update()

    # --- lifetime ---------------------------------------------------------------------------------

    def end(self) -> None:
        """Take no more requests, end the streams, and close once the rest is answered and written.

        Requests that have not begun are dropped.
        """
        for request in self._waiting:
            request.close()
        self._waiting.clear()
        self._read_to_end()

    def _read_to_end(self) -> None:
        """The peer sends no more: as :meth:`end`, but what it sent is carried out."""
        self._ending = True
        for task in self._streams:
            task.cancel()
        self._update()

    def abort(self) -> None:
        """Close the socket now. Streams end; other requests run on, unanswered."""
        if not self._closed:
            self._closed = True
            self._timer.cancel()
            self._stop_reading()
            if self._writing:
                self._writing = False
                self._loop.remove_writer(self._sock)
            self._out.clear()
            self._out_bytes = 0
            close_all(self._decoder.abandon())
            if self._large_begun:
                self._large_slots.give_back()
            self._sock.close()
            self.end()

    def cancel(self) -> None:
        """Abort, and cancel every request that still runs."""
        self.abort()
        for task in self._tasks:
            task.cancel()

    def _fail(self, error: PortwrightError) -> None:
        """Tell the peer why, as far as it still reads, and close."""
        self._send(frames.JSON_REPLY, payloads.answer(None, error=error))
        self.end()

    def _update(self) -> None:
        """Start what may start, read if there is room, and close if all is done."""
        while self._waiting and self._room():
            self._start(self._waiting.popleft())
        room = self._room() and not self._waiting
        if not room or self._ending:
            self._stop_reading()
        elif not self._reading:
            self._reading = True
            self._partial_since = self._last_active = self._loop.time()  # the wait was ours
            self._loop.add_reader(self._sock, self._on_readable)
        if self._ending and not self._tasks and not self._waiting and not self._out:
            self.abort()
            if not self._told:
                self._told = True
                self._on_close(self)

    def _room(self) -> bool:
        return len(self._tasks) < MAX_INFLIGHT and self._out_bytes < WRITE_HIGH

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock)

    def _tick(self) -> None:
        """Look for what has taken too long."""
        old = self._loop.time() - self._timeout
        if self._reading and self._decoder.partial and self._partial_since <= old:
            self._fail(ProtocolError(f"a frame was not whole after {self._timeout:g} s"))
        elif self._out and not self._streams and self._last_write <= old:
            _log.info("closing the connection of pid %d: it does not read", self._peer.pid)
            self.abort()
        elif not self._out and not self._tasks and not self._decoder.partial and self._last_active <= old:
            self.end()
        if not self._closed:
            self._timer = self._loop.call_later(self._timeout / 4, self._tick)

    # --- requests ---------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        try:
            data, fds = frames.receive(self._sock)
        except (BlockingIOError, InterruptedError):
            return
        except ProtocolError as error:
            self._fail(error)
            return
        except OSError:
            self.abort()
            return
        if not data:
            close_all(fds)
            self._read_to_end()
            return
        was_partial = self._decoder.partial
        try:
            whole = self._decoder.feed(data, fds)
        except ProtocolError as error:
            self._fail(error)
            return
        finally:
            close_all(self._decoder.take_orphans())
        now = self._loop.time()
        if whole or not was_partial:
            self._partial_since = now
        self._last_active = now
        for frame in whole:
            self._accept(frame)
        if self._decoder.large and not self._large_begun and not self._ending:
            try:
                self._large_slots.take()
            except Busy as error:
                self._fail(error)
                return
            self._large_begun = True
        self._update()

    def _accept(self, frame: Frame) -> None:
        """Put the frame's request into the queue, or fail the connection."""
        if self._ending:
            close_all(frame.fds)
            return
        if frame.kind == frames.CNI_REQUEST:
            request = Request("C", self._peer, raw=frame.payload, fds=list(frame.fds))
            if self._tasks or self._waiting:  # its answer carries no id
                request.close()
                self._fail(ProtocolError("a CNI request has to be alone on its connection"))
                return
        else:
            request = Request("J", self._peer, fds=list(frame.fds))
            try:
                if frame.kind == frames.LARGE_REQUEST:
                    self._take_large(request)
                envelope = payloads.envelope(frame.payload)
            except (Busy, ProtocolError) as error:
                request.close()
                self._fail(error)
                return
            request.id, request.method, request.params = envelope.id, envelope.method, envelope.params
            running = any(r.id == envelope.id for r in (*self._tasks.values(), *self._waiting))
            if envelope.v != PROTOCOL or running:
                why = (
                    "its id is in use" if running else f"version {envelope.v}; this daemon speaks {PROTOCOL}"
                )
                request.close()
                self._send(frames.JSON_REPLY, payloads.answer(envelope.id, error=ProtocolError(why)))
                return
        self._waiting.append(request)

    def _take_large(self, request: Request) -> None:
        """Give a large request its slot: the one taken at its header, or its own if it came in one chunk."""
        if not self._large_begun:
            self._large_slots.take()
        self._large_begun = False
        request.slots = self._large_slots

    def _start(self, request: Request) -> None:
        task = self._loop.create_task(self._run(request))
        self._tasks[task] = request
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        request = self._tasks.pop(task)
        self._streams.pop(task, None)
        request.close()
        if not task.cancelled() and task.exception() is not None:
            _log.error("serving a request failed", exc_info=task.exception())
            self.abort()
        self._last_active = self._loop.time()
        self._update()

    async def _run(self, request: Request) -> None:
        """Serve one request: exactly one answer, unless the connection ends first."""
        try:
            result = await self._dispatch(request)
            if isinstance(result, AsyncIterator):
                result = await self._pump(request, result)
            if request.kind == "C":
                self._send(frames.CNI_REPLY, payloads.opaque(result))
            else:
                self._send(frames.JSON_REPLY, payloads.answer(request.id, result=result))
        except Exception as error:  # noqa: BLE001 - whatever a handler raises has to become an answer
            if not isinstance(error, PortwrightError) or isinstance(error, InternalError):
                _log.error("%s from pid %d failed", request.method or "CNI", self._peer.pid, exc_info=error)
            if request.kind == "C":  # the answer's form is the handler's affair: it has to make one
                self.abort()
            else:
                self._send(frames.JSON_REPLY, payloads.answer(request.id, error=error))

    async def _pump(self, request: Request, events: AsyncIterator[object]) -> dict[str, int]:
        """Forward a stream until it ends; return what its last answer says: the events lost at its end.

        Closes ``events`` if it can be closed. Raises Busy if there are streams enough.
        """
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine of ours runs in a task
        try:
            self._stream_slots.take()
            self._streams[task] = request.id
            self._lost[request.id] = 0
            try:
                if self._ending:  # it left, or we do, before the stream began
                    return {"lost": 0}
                async for event in events:
                    if self._out_bytes > STREAM_HIGH:
                        self._lost[request.id] += 1
                    else:
                        self._tell_lost(request.id)
                        self._send(frames.EVENT, payloads.encode({"id": request.id, "event": event}))
                    await asyncio.sleep(0)  # a source that is never empty must not starve the rest
                return {"lost": self._lost[request.id]}
            finally:
                self._stream_slots.give_back()
                self._lost.pop(request.id)
        finally:
            closer = getattr(events, "aclose", None)
            if closer is not None:
                await closer()

    def _tell_lost(self, request_id: int) -> None:
        lost, self._lost[request_id] = self._lost[request_id], 0
        if lost:
            self._send(frames.EVENT, payloads.encode({"id": request_id, "lost": lost}))

    # --- answers ----------------------------------------------------------------------------------

    def _send(self, kind: int, payload: bytes) -> None:
        """Write a frame, now or when there is room. Does nothing if the connection is closed."""
        if not self._closed:
            view = memoryview(frames.encode(kind, payload))
            self._out.append(view)
            self._out_bytes += len(view)
            if len(self._out) == 1:
                self._last_write = self._loop.time()
                self._flush()

    def _flush(self) -> None:
        """Write what the socket takes; go on when it takes more."""
        try:
            while self._out:
                view = self._out[0]
                sent = self._sock.send(view, socket.MSG_NOSIGNAL)
                self._out_bytes -= sent
                self._last_write = self._last_active = self._loop.time()
                if sent == len(view):
                    self._out.popleft()
                else:
                    self._out[0] = view[sent:]
        except (BlockingIOError, InterruptedError):
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._sock, self._flush)
            return
        except OSError:
            self.abort()
            return
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._sock)
            for request_id in self._lost:
                self._tell_lost(request_id)
            self._update()
