"""One HTTP/1.1 request after another over Firecracker's Unix socket, each held against the API description.

HTTP is h11's, which has no input or output of its own: httpx does the same with five more packages, and its
timeouts are for each read, so that a server which sends a byte now and then is waited for without end.
Here one deadline covers the whole exchange, and an answer's size has a limit. Each request has a connection
of its own, so that nothing of an exchange that went wrong can be taken for the next one's answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any, TypeVar

import h11
import msgspec

from portwright.model.errors import InvalidInput
from portwright.vmm.firecracker.api import PatchMmds, PutMmds, Request
from portwright.vmm.firecracker.description import Description, Misfit, load
from portwright.vmm.firecracker.errors import (
    VmmLost,
    VmmProtocol,
    VmmRefused,
    VmmTimeout,
    VmmUnavailable,
)

T = TypeVar("T")
#: What Firecracker takes by default (--http-api-max-payload-size).
MAX_REQUEST = 51_200
MAX_ANSWER = 1 << 20
_MAX_HEAD = 16 << 10
_SHOWN = 300


class Client:
    """The API of one Firecracker process. One request at a time: its VMM serves them on one thread.

    ``timeout``: seconds for a whole exchange. ``max_answer``: bytes, its head with them. Belongs to the event
    loop that it is first used in.
    """

    def __init__(
        self,
        socket: Path | str,
        *,
        timeout: float = 5.0,
        max_request: int = MAX_REQUEST,
        max_answer: int = MAX_ANSWER,
        description: Description | None = None,
    ) -> None:
        self.socket = Path(socket)
        self._timeout = timeout
        self._max_request = max_request
        self._max_answer = max_answer
        self._description = description or load()
        self._turn = asyncio.Lock()

    async def ask(self, request: Request, answer: type[T], *, seconds: float | None = None) -> T:
        """Send a request and return its answer as ``answer``. Raises as ``send`` does."""
        body = await self.send(request, seconds=seconds)
        try:
            return msgspec.convert(body, answer)
        except msgspec.ValidationError as error:
            raise VmmProtocol(request.line, str(error)) from error

    async def send(self, request: Request, *, seconds: float | None = None) -> Any:
        """Send a request and return the JSON of its answer without its nulls; None for no body.

        ``seconds`` in place of the client's timeout. Raises InvalidInput for a request that the API does not
        allow, VmmUnavailable where nobody listens (nothing was sent in both cases), VmmRefused for an error
        of Firecracker's, and VmmLost, VmmTimeout and VmmProtocol where nobody knows whether it was done.
        """
        request.check()
        body = request.body
        self._description.check_request(request.METHOD, request.path, body)
        raw = b"" if body is None else msgspec.json.encode(body)
        if len(raw) > self._max_request:
            why = f"has {len(raw)} bytes as JSON; Firecracker takes {self._max_request}"
            raise InvalidInput("body", request.line, f"{why} (--http-api-max-payload-size)")
        seconds = self._timeout if seconds is None else seconds
        async with self._turn:
            try:
                async with asyncio.timeout(seconds):
                    status, found = await self._exchange(request, raw)
            except TimeoutError as error:
                raise VmmTimeout(request.line, seconds) from error
        return self._read(request, raw, status, found)

    async def _exchange(self, request: Request, raw: bytes) -> tuple[int, bytes]:
        try:
            reader, writer = await asyncio.open_unix_connection(self.socket)
        except OSError as error:
            raise VmmUnavailable(str(self.socket), error.strerror or str(error)) from error
        try:
            return await self._talk(request, raw, reader, writer)
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise VmmLost(request.line, error.strerror or str(error)) from error
        finally:
            # Not close(): that would wait for a peer that reads nothing.
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _talk(
        self, request: Request, raw: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[int, bytes]:
        """Status and body of the answer."""
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
        headers = [("Host", "localhost"), ("Accept", "application/json")]
        if raw:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(raw)))]
        sent = http.send(h11.Request(method=request.METHOD, target=request.path, headers=headers)) or b""
        if raw:
            sent += http.send(h11.Data(data=raw)) or b""
        writer.write(sent + (http.send(h11.EndOfMessage()) or b""))
        await writer.drain()
        status, body, received, ended = 0, b"", 0, False
        while True:
            try:
                event = http.next_event()
            except h11.RemoteProtocolError as error:
                if ended:
                    raise VmmLost(
                        request.line, "the answer ends in the middle" if received else "no answer"
                    ) from error
                raise VmmProtocol(request.line, f"no HTTP: {error}") from error
            if event is h11.NEED_DATA:
                data = await reader.read(1 << 16)
                ended = not data
                received += len(data)
                if received > self._max_answer:
                    raise VmmProtocol(request.line, f"has more than {self._max_answer} bytes")
                http.receive_data(data)
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return status, body
            elif isinstance(event, h11.ConnectionClosed):
                raise VmmLost(request.line, "no answer")

    def _read(self, request: Request, raw: bytes, status: int, found: bytes) -> Any:
        """The body of an answer, checked. Raises VmmRefused for an error's, VmmProtocol for a misfit."""
        try:
            body = msgspec.json.decode(found) if found else None
        except msgspec.DecodeError as error:
            if status < 400:
                raise VmmProtocol(request.line, f"no JSON: {error}") from error
            body = None
        if status >= 400:
            fault = body.get("fault_message") if isinstance(body, dict) else None
            if not isinstance(fault, str):
                # Still a refusal: what its HTTP layer says on its own has another shape.
                fault = found[:_SHOWN].decode(errors="replace").strip() or "without a reason"
            # What MMDS has may be secret, and errors are logged.
            hidden = isinstance(request, PutMmds | PatchMmds)
            asked = f"({len(raw)} bytes)" if hidden else raw[:_SHOWN].decode(errors="replace")
            raise VmmRefused(request.line, asked, status, fault[:_SHOWN])
        try:
            return self._description.check_answer(request.METHOD, request.path, status, body)
        except Misfit as error:
            raise VmmProtocol(request.line, str(error)) from error
