"""Follows the rings of drop events, and the host's own drops, and hands each to whoever listens.

Bounded at every end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from portwright.kernel.bpf import RingBuffer
from portwright.node.core import Core
from portwright.node.host_drops import HostDropFeed
from portwright.observe.events import Drop, parse

#: Drops kept for a listener that does not keep up; older ones are counted as lost.
QUEUE = 1024


class DropFeed:
    """One ring a switch. With nobody listening the ring is not read, and the kernel counts the loss."""

    def __init__(self, core: Core, loop: asyncio.AbstractEventLoop) -> None:
        self._core = core
        self._loop = loop
        self._rings: dict[int, RingBuffer] = {}
        self._listeners: dict[asyncio.Queue[Drop], list[int]] = {}
        self._host = HostDropFeed(core, loop, self._hand_out)

    def sync(self) -> None:
        """Reads the rings of the switches that are there now, if anybody listens."""
        wanted = set(self._core.switches) if self._listeners else set()
        if self._listeners:
            self._host.start()
        else:
            self._host.stop()
        for cookie in set(self._rings) - wanted:
            self._stop(cookie)
        for cookie in wanted - set(self._rings):
            ring = RingBuffer(self._core.switches[cookie].maps["pw_events"])
            self._rings[cookie] = ring
            self._loop.add_reader(ring.epoll_fd, self._ready, cookie)

    def close(self) -> None:
        """Stops reading; the kernel goes on to fill the rings."""
        self._host.stop()
        for cookie in list(self._rings):
            self._stop(cookie)

    def _stop(self, cookie: int) -> None:
        ring = self._rings.pop(cookie)
        self._loop.remove_reader(ring.epoll_fd)
        ring.close()

    def _ready(self, cookie: int) -> None:
        ring = self._rings.get(cookie)
        if ring is not None:
            ring.consume(self._publish)

    def _publish(self, record: bytes) -> None:
        drop = parse(record, self._core.policies.rule_title)
        if drop is not None:
            self._hand_out(drop)

    def _hand_out(self, drop: Drop) -> None:
        for queue, lost in self._listeners.items():
            try:
                queue.put_nowait(drop._replace(lost=drop.lost + lost[0]))
                lost[0] = 0
            except asyncio.QueueFull:
                lost[0] += 1

    async def follow(self, port_id: str | None, *, logged: bool = False) -> AsyncIterator[Drop]:
        """Drops as they happen, of every port or of one, until the caller stops.

        ``logged``: and the connections that pass and that a policy's rule logs.
        """
        queue: asyncio.Queue[Drop] = asyncio.Queue(QUEUE)
        first = not self._listeners
        self._listeners[queue] = [0]
        self.sync()
        if first:
            # What the ring held from before anybody listened is old news.
            for ring in self._rings.values():
                with contextlib.suppress(Exception):
                    ring.consume(lambda _record: None)
        try:
            while True:
                drop = await queue.get()
                if port_id in {None, drop.port_id} and (logged or drop.reason != "logged"):
                    yield drop
        finally:
            del self._listeners[queue]
            self.sync()
