"""The DNS proxy in one host namespace: queries go on to whom they were sent, answers back as from him.

A query is one question, passed on as it came but for its id, which is ours and by chance, from a socket of
its own: so an answer from elsewhere has 32 bits to guess. What an answer opens is open before the sandbox
hears it. Everything has a bound, for a port and for all; beyond it the answer is SERVFAIL, and counted.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Protocol

from portwright.domains.message import (
    HEADER,
    BadAnswer,
    NotServed,
    Query,
    addresses,
    is_answer,
    read_query,
    refused,
)
from portwright.kernel import netns, tproxy
from portwright.kernel.tproxy import Datagram, Where
from portwright.model.errors import KernelFailed
from portwright.node.dns_places import Load, Place, Places, Refused
from portwright.plan.steer import RATE

#: Seconds: for a resolver's answer, for a message of TCP once it has begun, and between two of them.
ANSWER_WITHIN, MESSAGE_WITHIN, IDLE = 5.0, 5.0, 10.0
_PORT = 53
#: Datagrams that are read before others have their turn.
_AT_ONCE = 32
_LENGTH = 2
#: Messages that are no answer to a query, until it is given up: whoever sends more would have the loop turn
#: for him alone, as what is there already is read without a pause.
_MAX_FALSE = 16
#: Seconds without accepting, where the kernel gives no descriptor.
_PAUSE = 1.0

log = logging.getLogger(__name__)


class Client(Protocol):
    """A port whose look-ups are served."""

    @property
    def port_id(self) -> str:
        """The port's."""


class Resolutions(Protocol):
    """Who is told of answers."""

    def wants(self, client: Client, query: Query) -> bool:
        """Whether a rule of the client's asks for this name."""

    def may_ask(self, client: Client, source: tuple[str, int], resolver: str, protocol: int) -> bool:
        """Whether the client may be brought to this resolver."""

    async def learn(self, client: Client, query: Query, found: tuple[str, ...], ttl: int) -> None:
        """Returns once these addresses are open to the client. Raises Refused."""


class DnsProxy:
    """Serves from ``start`` to ``close``, on the loop's thread, those that ``serve`` names."""

    def __init__(self, netns_fd: int, resolutions: Resolutions, counts: Counter[str], load: Load) -> None:
        """``netns_fd`` stays the caller's."""
        self._given, self._fd = netns_fd, -1
        self._resolutions = resolutions
        self.counts = counts
        self._load = load
        self._clients: Mapping[str, Client] = {}
        #: by port, when its next message by TCP may be served
        self._turns: dict[str, float] = {}
        self._loop = asyncio.get_running_loop()
        self._listeners: tproxy.Listeners | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> int:
        """Opens the listeners; returns their port. Raises KernelFailed."""
        self._listeners = tproxy.listen(self._given)
        try:
            # Our own: a query under way must not follow a number that is another namespace's by then.
            self._fd = os.dup(self._given)
        except OSError as error:
            self._listeners.close()
            self._listeners = None
            raise KernelFailed(error.errno or errno.EIO, "DNS proxy") from error
        for sock in self._listeners.udp:
            self._loop.add_reader(sock, self._read, sock)
        self._accept_again()
        return self._listeners.port

    def _accept_again(self) -> None:
        for sock in self._listeners.tcp if self._listeners is not None else ():
            self._loop.add_reader(sock, self._accept, sock)

    def serve(self, clients: Mapping[str, Client]) -> None:
        """Serves these from now on, by the sandbox's address, and nobody else."""
        self._clients = clients
        known = {client.port_id for client in clients.values()}
        self._turns = {port_id: turn for port_id, turn in self._turns.items() if port_id in known}

    def close(self) -> None:
        """Ends everything under way; nobody is answered any more."""
        if self._listeners is not None:
            for sock in (*self._listeners.udp, *self._listeners.tcp):
                self._loop.remove_reader(sock)
            self._listeners.close()
            self._listeners = None
        for task in self._tasks:
            task.cancel()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # -- UDP -------------------------------------------------------------------------------------

    def _read(self, sock: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                datagram = tproxy.receive(sock)
            except OSError:
                return
            if datagram is not None:
                client = self._client(datagram.source, datagram.destination)
                if client is not None:
                    self._serve_datagram(client, datagram)
            else:
                self.counts["unreadable"] += 1

    def _serve_datagram(self, client: Client, datagram: Datagram) -> None:
        """A task for what is to be asked; what can be said at once needs none."""
        try:
            query = read_query(datagram.payload)
        except NotServed as answer:
            self.counts["unreadable"] += 1
            if answer.reply is not None:
                self._reply(datagram, answer.reply)
            return
        place = self._take(self._load.queries, client)
        if place is None:
            self._reply(datagram, refused(query))
            return
        work = self._answer_datagram(client, datagram, query)
        place.task = self._begin(work, partial(self._load.queries.free, place))

    async def _answer_datagram(self, client: Client, datagram: Datagram, query: Query) -> None:
        self._reply(
            datagram,
            await self._answer(client, query, datagram.source, datagram.destination, socket.IPPROTO_UDP),
        )

    def _reply(self, datagram: Datagram, payload: bytes) -> None:
        try:
            tproxy.answer(self._fd, datagram, payload)
        except OSError as error:
            self.counts["unsent"] += 1
            log.debug("an answer to %s is lost: %s", datagram.source[0], error)

    # -- TCP -------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, source = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # EMFILE: it stays readable, and the loop would turn for nothing else
            log.error("no connection for a look-up can be accepted: %s", error)
            self._loop.remove_reader(listener)
            self._loop.call_later(_PAUSE, self._accept_again)
            return
        try:
            sock.setblocking(False)
            # An accepted connection's own address is what the sandbox dialled.
            resolver = sock.getsockname()[:2]
        except OSError:
            sock.close()
            return
        client = self._client(source[:2], resolver)
        if client is None:
            sock.close()
            return
        place = self._take(self._load.connections, client)
        if place is None:
            sock.close()
            return
        work = self._serve_stream(client, sock, source[:2], resolver)
        place.task = self._begin(work, partial(self._end_stream, place, sock))

    def _end_stream(self, place: Place, sock: socket.socket) -> None:
        sock.close()
        self._load.connections.free(place)

    async def _serve_stream(
        self, client: Client, sock: socket.socket, source: Where, resolver: Where
    ) -> None:
        """One query after the other, until the sandbox ends it, or is too slow at it."""
        try:
            while True:
                async with asyncio.timeout(IDLE):
                    first = await self._loop.sock_recv(sock, 1)
                if not first:
                    return
                async with asyncio.timeout(MESSAGE_WITHIN):
                    head = first + await self._exactly(sock, _LENGTH - 1)
                    size = int.from_bytes(head, "big")
                    if size > tproxy.MAX_QUERY:
                        self.counts["unreadable"] += 1
                        return
                    wire = await self._exactly(sock, size)
                await asyncio.sleep(self._until_its_turn(client))
                reply, more = await self._answer_stream(client, wire, source, resolver)
                if reply is not None:
                    async with asyncio.timeout(MESSAGE_WITHIN):
                        await self._loop.sock_sendall(sock, len(reply).to_bytes(_LENGTH, "big") + reply)
                if not more:
                    return
        except (OSError, EOFError):  # a TimeoutError is an OSError
            return

    def _until_its_turn(self, client: Client) -> float:
        """Seconds until a port's next message by TCP is served: so many a second, as of its packets.

        A packet of TCP may have thousands of messages. What has come is read without a pause, so without
        one here nobody else would have a turn.
        """
        now = self._loop.time()
        turn = max(self._turns.get(client.port_id, now), now)
        self._turns[client.port_id] = turn + 1 / RATE
        return turn - now

    async def _answer_stream(
        self, client: Client, wire: bytes, source: Where, resolver: Where
    ) -> tuple[bytes | None, bool]:
        """What to say to a message of a stream (None: nothing), and whether the stream goes on."""
        try:
            query = read_query(wire)
        except NotServed as answer:
            self.counts["unreadable"] += 1
            return answer.reply, False
        place = self._take(self._load.queries, client)
        if place is None:
            return refused(query), True
        place.task = asyncio.current_task()
        try:
            return await self._answer(client, query, source, resolver, socket.IPPROTO_TCP), True
        finally:
            self._load.queries.free(place)

    async def _exactly(self, sock: socket.socket, size: int) -> bytes:
        """So many bytes; raises EOFError when the other side ends first."""
        found = bytearray()
        while len(found) < size:
            part = await self._loop.sock_recv(sock, size - len(found))
            if not part:
                raise EOFError
            found += part
        return bytes(found)

    # -- both ------------------------------------------------------------------------------------

    def _client(self, source: Where, destination: Where) -> Client | None:
        """Whose look-up it is; None for what was not steered here, which is nobody's business."""
        client = self._clients.get(source[0])
        if client is None or destination[1] != _PORT:
            self.counts["strangers"] += 1
            return None
        return client

    def _take(self, places: Places, client: Client) -> Place | None:
        """A place, to be given back; None, and counted, if there is none."""
        place = places.take(client.port_id)
        if place is None:
            self.counts["refused"] += 1
        return place

    async def _answer(
        self, client: Client, query: Query, source: Where, resolver: Where, protocol: int
    ) -> bytes:
        """The answer to pass on, once what it opens is open."""
        ask = self._ask_by_udp if protocol == socket.IPPROTO_UDP else self._ask_by_tcp
        self.counts["queries"] += 1
        try:
            if not self._resolutions.may_ask(client, source[:2], resolver[0], protocol):
                self.counts["refused"] += 1
                return refused(query)
            async with asyncio.timeout(ANSWER_WITHIN):
                answer = await ask(query, resolver[0])
            if query.for_addresses and self._resolutions.wants(client, query):
                found, ttl = addresses(query, answer)
                if found:
                    await self._resolutions.learn(client, query, found, ttl)
        except (OSError, EOFError):  # no way there, refused, or no answer in time
            self.counts["unanswered"] += 1
            return refused(query)
        except BadAnswer as error:
            self.counts["bad answers"] += 1
            log.debug("port %s: an answer for %s can't be read: %s", client.port_id, query.name, error)
            return refused(query)
        except Refused as error:
            self.counts["refused"] += 1
            log.debug("port %s: %s is not opened: %s", client.port_id, query.name, error)
            return refused(query)
        return query.answered(answer)

    async def _ask_by_udp(self, query: Query, resolver: str) -> bytes:
        identity = secrets.randbelow(1 << 16)
        with self._socket(resolver, socket.SOCK_DGRAM) as sock:
            sock.connect((resolver, _PORT))  # at once: it sends nothing, and sets whose answers arrive
            await self._loop.sock_sendall(sock, query.sent_as(identity))
            for _ in range(_MAX_FALSE):
                answer = await self._loop.sock_recv(sock, tproxy.MAX_PAYLOAD)
                if is_answer(query, identity, answer):
                    return answer
                self.counts["bad answers"] += 1
        raise BadAnswer(f"{_MAX_FALSE} messages came that answer something else")

    async def _ask_by_tcp(self, query: Query, resolver: str) -> bytes:
        identity = secrets.randbelow(1 << 16)
        with self._socket(resolver, socket.SOCK_STREAM) as sock:
            await self._loop.sock_connect(sock, (resolver, _PORT))
            wire = query.sent_as(identity)
            await self._loop.sock_sendall(sock, len(wire).to_bytes(_LENGTH, "big") + wire)
            size = int.from_bytes(await self._exactly(sock, _LENGTH), "big")
            answer = await self._exactly(sock, size)
        if size < HEADER or not is_answer(query, identity, answer):
            raise BadAnswer("it answers something else")
        return answer

    def _socket(self, address: str, kind: int) -> socket.socket:
        with netns.entered(self._fd):
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        sock.setblocking(False)
        return sock

    def _begin(self, work: Coroutine[None, None, None], at_its_end: Callable[[], None]) -> asyncio.Task[None]:
        """A task that is kept until its end, which comes even if it never ran."""
        task = self._loop.create_task(work, name="dns")
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, at_its_end))
        return task

    def _ended(self, at_its_end: Callable[[], None], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        at_its_end()
        if not task.cancelled() and (error := task.exception()) is not None:
            if not self.counts["failed"]:  # a sandbox must not fill the log
                log.error("a look-up failed: %r (said once, `doctor` counts)", error)
            self.counts["failed"] += 1
