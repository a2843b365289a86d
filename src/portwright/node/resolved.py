"""The addresses that names opened: put in force, kept on record, and closed again in time.

An address is open until its TTL is over; after that as long as a connection to it lives, which is looked at
every few seconds. What is open is on record, so that a restart cuts nobody off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable

from portwright.dataplane import values
from portwright.domains.ledger import MAX_TTL, MOMENT, Entry, Ledger
from portwright.kernel.bpf import Map
from portwright.model.errors import PortwrightError
from portwright.model.port import Port
from portwright.node.core import Core
from portwright.node.dns_places import Refused

#: Seconds between two looks for connections to an address whose TTL is over, and between two tries to put
#: in force what failed once.
LINGER = 10.0
#: Of the time, a look at all flows takes at most one part in so many and one.
_LOOK_SHARE = 10
#: At the start of a flow's key.
_BOTH_ADDRESSES = 32

log = logging.getLogger(__name__)


class Resolved:
    """What is open now, on the loop's thread. ``port_of``: a port whose look-ups count, by its id."""

    def __init__(
        self, core: Core, loop: asyncio.AbstractEventLoop, port_of: Callable[[str], Port | None]
    ) -> None:
        self._core = core
        self._loop = loop
        self._port_of = port_of
        #: Of this loop's clock to unix time, which the record has.
        self._epoch = time.time() - loop.time()
        rows = core.store.resolved()
        # The clock may have been set back since: nothing lives longer than an answer of this moment could.
        latest = loop.time() + MAX_TTL + MOMENT
        #: for others to read; ``open`` and ``end`` change it
        self.ledger = Ledger(Entry(*row[:3], min(row[3] - self._epoch, latest)) for row in rows)
        #: policy takes no new addresses before: what takes long leaves others as much time
        self._rest_until = 0.0
        self._look_again = 0.0
        self._waiting: list[tuple[asyncio.Future[None], tuple[Entry, ...]]] = []
        self._touched: dict[tuple[str, str, str], Entry] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._expiring: asyncio.Task[None] | None = None

    async def open(
        self, port_id: str, patterns: tuple[str, ...], addresses: tuple[str, ...], ttl: int
    ) -> None:
        """Returns once these are open to the port. Raises TooMany or Refused, and then none of them is."""
        until = self._loop.time() + min(ttl, MAX_TTL) + MOMENT
        new = self.ledger.learn(port_id, patterns, addresses, until)
        for pattern in patterns:
            for address in addresses:
                known = self.ledger.entry(port_id, pattern, address)  # of an earlier answer, perhaps
                self._touched[known[:3]] = known
        if not new and not self._waiting:
            self._loop.call_soon(self._record)
            self.schedule(until)
            return
        # Answers of one moment are put in force together.
        if not self._waiting:
            self._loop.call_at(self._rest_until, self._install)
        installed = self._loop.create_future()
        self._waiting.append((installed, new))
        await installed

    def close(self) -> None:
        """Lets no more time pass. What is open stays so, on record."""
        if self._timer is not None:
            self._timer.cancel()
        if self._expiring is not None:
            self._expiring.cancel()
        self._record()

    def _install(self) -> None:
        """Puts in force what was learnt since the last time, then lets its answers go."""
        waiting, self._waiting = self._waiting, []
        why, began, failed = "policy could not take it", self._loop.time(), list[Entry]()
        try:
            self._core.policies.resolved(self.ledger.table())
            self._core.faults.at("dns:open")
            for future, _ in waiting:
                if not future.done():
                    future.set_result(None)
        except PortwrightError as error:
            why = str(error)
            failed = [entry for _, new in waiting for entry in new]
            self._forget(failed)
        finally:
            for future, _ in waiting:
                if not future.done():
                    future.set_exception(Refused(why))
            now = self._loop.time()
            self._rest_until = now + (now - began)
        self._record(failed)
        self.schedule()

    def _forget(self, entries: Iterable[Entry]) -> None:
        entries = tuple(entries)
        self.ledger.forget(entries)
        for entry in entries:
            self._touched.pop(entry[:3], None)

    def _record(self, gone: Iterable[Entry] = ()) -> None:
        """Writes what was learnt and what is gone; a power cut may lose it, a killed daemon not."""
        touched, self._touched = self._touched, {}
        rows = [(*entry[:3], entry.until + self._epoch) for entry in touched.values()]
        over = [entry[:3] for entry in gone]
        if not rows and not over:
            return
        try:
            self._core.store.note_resolved(rows, over)
        except PortwrightError as error:  # the next start knows less, or closes what is closed already
            self._core.alarm(f"addresses of names can't be recorded: {error}")

    def end(self, entries: Iterable[Entry]) -> None:
        """These are open no more. What can't be put in force is tried again, and an alarm."""
        entries = tuple(entries)
        self._forget(entries)
        try:
            self._core.policies.resolved(self.ledger.table())
        except PortwrightError as error:
            self._core.alarm(f"addresses of names whose time is over are still open: {error}")
            self.ledger.put_back(entries, self._loop.time() + LINGER)
        else:
            self._record(entries)

    def schedule(self, due: float | None = None) -> None:
        """Has what is due looked at in time. ``due``: of what was just learnt; else all of it is asked."""
        if self._expiring is not None:  # it comes here at its end
            return
        due = self.ledger.next_due() if due is None else due
        if due is None:
            return
        # Not more often than once a second: what ends together ends in one change. And where a look at all
        # flows takes long, nobody's short TTLs make it go on all the time.
        due = max(due, self._loop.time() + 1, self._look_again)
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._begin_to_expire)

    def _begin_to_expire(self) -> None:
        self._timer = None
        self._expiring = self._loop.create_task(self._expire(), name="domains")
        self._expiring.add_done_callback(self._expired)

    async def _expire(self) -> None:
        """Closes what has had its time, unless a connection of its port to it is open."""
        due = self.ledger.due(self._loop.time())
        if not due:  # what the timer was for has been prolonged
            return
        began = self._loop.time()
        used = await self._used(due)
        self._look_again = self._loop.time() + _LOOK_SHARE * (self._loop.time() - began)
        self.ledger.keep(used, self._loop.time() + LINGER)
        self._core.look_ups["kept for a connection"] += len(used)
        # What was asked for again meanwhile has a later end.
        over = set(due) & set(self.ledger.due(self._loop.time()))
        if over:
            self.end(over)

    def _expired(self, task: asyncio.Task[None]) -> None:
        self._expiring = None
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            log.error("closing the addresses of names failed, and is tried again: %r", error)
        self.schedule()

    async def _used(self, entries: Iterable[Entry]) -> set[Entry]:
        """Those to whose addresses their ports have a connection.

        One pass of each flow table, in a thread: a full one takes half a second.
        """
        wanted: dict[int, dict[bytes, list[Entry]]] = {}
        for entry in entries:
            port = self._port_of(entry.port_id)
            if port is None:
                continue
            other = values.address(entry.address)
            pairs = wanted.setdefault(port.host.cookie, {})
            for own in (values.address(a.address) for a in port.addresses):
                for pair in (own + other, other + own):
                    pairs.setdefault(pair, []).append(entry)
        found: set[Entry] = set()
        for cookie, pairs in wanted.items():
            switch = self._core.switches.get(cookie)
            if switch is not None:
                # Of the thread's own, which goes on when this is cancelled, and the switch closes its maps.
                flows = Map(os.dup(switch.maps["pw_conns"].fd))
                found |= await asyncio.to_thread(_with_flows, flows, pairs)
        return found


def _with_flows(flows: Map, pairs: dict[bytes, list[Entry]]) -> set[Entry]:
    found: set[Entry] = set()
    with contextlib.closing(flows):
        for key in flows.keys():  # noqa: SIM118 - a map is no dict
            found.update(pairs.get(key[:_BOTH_ADDRESSES], ()))
    return found
