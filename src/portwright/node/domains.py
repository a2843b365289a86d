"""Egress by domain name: which ports' look-ups are proxied, and what their answers open, for how long.

An address is open to those whose rule asks for the name from the moment before the answer is passed on until
its TTL is over; after that as long as a connection to it lives, which is looked at every few seconds. What
is open is on record, so that a restart cuts nobody off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from portwright.dataplane import values
from portwright.domains.ledger import MAX_TTL, MOMENT, Entry, Ledger, TooMany
from portwright.domains.names import covers
from portwright.kernel.bpf import Map
from portwright.model.errors import KernelFailed, PortwrightError
from portwright.model.port import Port, PortMapping, PortState
from portwright.node import opening, steer
from portwright.node.core import Core
from portwright.node.dns_places import Load, Refused
from portwright.node.entries import proxy_look_ups
from portwright.node.switch import Switch

if TYPE_CHECKING:
    from portwright.domains.message import Query
    from portwright.node.dns_proxy import Client, DnsProxy

#: Seconds between two looks for connections to an address whose TTL is over, and between two tries to put
#: in force what failed once.
LINGER = 10.0
#: Words of ``Core.look_ups`` that somebody should look into.
TROUBLE = frozenset({"refused", "bad answers", "not opened", "unsent", "failed"})
_DNS = 53
#: Of the time, a look at all flows takes at most one part in so many and one.
_LOOK_SHARE = 10
#: At the start of a flow's key.
_BOTH_ADDRESSES = 32

log = logging.getLogger(__name__)


class _Client(NamedTuple):
    """A port whose rules name domains."""

    port: Port
    names: tuple[str, ...]

    @property
    def port_id(self) -> str:
        """The port's."""
        return self.port.port_id


class Domains:
    """One for the node, on the loop's thread. ``counts``: what happened to look-ups so far, by word."""

    def __init__(self, core: Core, loop: asyncio.AbstractEventLoop) -> None:
        self._core = core
        self._loop = loop
        #: Of this loop's clock to unix time, which the record has.
        self._epoch = time.time() - loop.time()
        rows = core.store.resolved()
        # The clock may have been set back since: nothing lives longer than an answer of this moment could.
        latest = loop.time() + MAX_TTL + MOMENT
        self._ledger = Ledger(Entry(*row[:3], min(row[3] - self._epoch, latest)) for row in rows)
        #: by namespace, what names did not open there when that was looked at last
        self._fences: dict[int, opening.Fence] = {}
        #: policy takes no new addresses before: what takes long leaves others as much time
        self._rest_until = 0.0
        self._look_again = 0.0
        self._proxies: dict[int, DnsProxy] = {}
        self._load = Load()
        self._ports: dict[int, int] = {}
        self._steered: dict[int, frozenset[str]] = {}
        #: namespaces in which nothing is steered, an earlier run's remains included
        self._quiet: set[int] = set()
        self._clients: dict[str, _Client] = {}
        #: the ports that the host's port 53 leads to
        self._behind: list[tuple[Port, PortMapping]] = []
        #: what was said of which port: a sandbox must not fill the log
        self._told: set[tuple[str, str]] = set()
        self._waiting: list[tuple[asyncio.Future[None], tuple[Entry, ...]]] = []
        self._touched: dict[tuple[str, str, str], Entry] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._expiring: asyncio.Task[None] | None = None
        self.counts = core.look_ups
        core.policies.changed = self.sync

    # -- who is proxied --------------------------------------------------------------------------

    def sync(self) -> None:
        """Follows the ports and policies that there are now. Call it after every change, before its answer.

        What can't be done is an alarm: the look-ups of these ports open nothing then.
        """
        asked = self._core.policies.asked()
        self._clients = {
            port.port_id: _Client(port, asked[port.port_id])
            for port in (self._core.store.ports(state=PortState.ATTACHED) if asked else ())
            if port.port_id in asked
        }
        self._behind = [
            (port, mapping)
            for port in (self._core.store.ports() if self._clients else ())
            for mapping in port.port_mappings
            if mapping.host_port == _DNS
        ]
        self._told = {(port_id, what) for port_id, what in self._told if port_id in self._clients}
        gone = {*self._ledger.unasked(asked), *self._fenced_off()}
        if gone:
            self._close(gone)
        for switch in list(self._core.switches.values()):
            try:
                self._sync_switch(switch)
            except PortwrightError as error:
                self._alarm(f"look-ups of domain names in namespace {switch.ref.cookie:x}: {error}")
        for cookie in self._proxies.keys() - self._core.switches.keys():
            self._end(cookie)
        self._quiet &= self._core.switches.keys()
        self._schedule()

    def _fenced_off(self) -> list[Entry]:
        """What no name opens any more: the host has addresses or networks now that it had not before."""
        if not len(self._ledger):
            return []
        ports = {client.port.host.cookie: client.port for client in self._clients.values()}
        try:
            fences = {cookie: opening.fence(self._core, port) for cookie, port in ports.items()}
        except PortwrightError as error:
            self._alarm(f"addresses of names can't be judged: {error}")
            return []
        others = {cookie for cookie, fence in fences.items() if self._fences.get(cookie) != fence}
        self._fences = fences
        return [
            entry
            for entry in (self._ledger if others else ())
            if (client := self._clients.get(entry.port_id)) is not None
            and client.port.host.cookie in others
            and not opening.openable(fences[client.port.host.cookie], (entry.address,))
        ]

    def _sync_switch(self, switch: Switch) -> None:
        cookie = switch.ref.cookie
        mine = [c for c in self._clients.values() if c.port.host.cookie == cookie]
        if not mine:
            if cookie not in self._quiet:
                steer.unsteer(self._core.store, switch, self._core.faults)
                proxy_look_ups(switch, ())
                self._end(cookie)
                self._quiet.add(cookie)
            return
        self._quiet.discard(cookie)
        proxy = self._proxies.get(cookie)
        if proxy is None:
            # Not before: dnspython takes a tenth of a daemon's start, and most policies name no domains.
            from portwright.node.dns_proxy import DnsProxy  # noqa: PLC0415 - see above

            proxy = DnsProxy(switch.fd, self, self.counts, self._load)
            self._ports[cookie] = proxy.start()
            self._proxies[cookie] = proxy
        proxy.serve({a.address: client for client in mine for a in client.port.addresses})
        proxy_look_ups(switch, (client.port for client in mine))
        reps = frozenset(client.port.rep_name for client in mine)
        steered = self._steered.get(cookie)
        if reps == steered:
            return
        whole = steered is None
        if steered is not None:
            try:
                steer.change(switch, added=reps - steered, removed=steered - reps)
            except KernelFailed:  # somebody flushed the ruleset
                whole = True
        if whole:
            steer.steer(self._core.store, switch, reps, self._ports[cookie], self._core.faults)
        self._core.faults.at("dns:steered")
        self._steered[cookie] = reps

    def _end(self, cookie: int) -> None:
        self._steered.pop(cookie, None)
        self._ports.pop(cookie, None)
        proxy = self._proxies.pop(cookie, None)
        if proxy is not None:
            proxy.close()

    def close(self) -> None:
        """Ends the proxies. What is steered stays so, as long as its ports: look-ups go nowhere meanwhile."""
        for cookie in list(self._proxies):
            self._end(cookie)
        if self._timer is not None:
            self._timer.cancel()
        if self._expiring is not None:
            self._expiring.cancel()
        self._record()

    # -- what the proxies ask --------------------------------------------------------------------

    def wants(self, client: Client, query: Query) -> bool:
        """Whether a rule of the client's asks for this name."""
        return bool(self._patterns(client.port_id, query))

    def may_ask(self, client: Client, source: tuple[str, int], resolver: str, protocol: int) -> bool:
        """Whether the client may be brought to this resolver; :func:`opening.may_ask`."""
        known = self._clients.get(client.port_id)  # None: its policy has changed since it asked
        return known is not None and opening.may_ask(
            self._core, known.port, self._behind, source=source, resolver=resolver, protocol=protocol
        )

    async def learn(self, client: Client, query: Query, found: tuple[str, ...], ttl: int) -> None:
        """Returns once these addresses are open to the client. Raises Refused, and then none of them is."""
        patterns = self._patterns(client.port_id, query)
        opened = self._open_to_names(self._clients[client.port_id].port, found) if patterns else ()
        if not opened:
            return
        until = self._loop.time() + min(ttl, MAX_TTL) + MOMENT
        try:
            new = self._ledger.learn(client.port_id, patterns, opened, until)
        except TooMany as error:
            self._tell(client.port_id, "refused", f"{query.name} is not opened: {error}")
            raise Refused(str(error)) from None
        for pattern in patterns:
            for address in opened:
                known = self._ledger.entry(client.port_id, pattern, address)  # of an earlier answer, perhaps
                self._touched[known[:3]] = known
        if not new and not self._waiting:
            self._loop.call_soon(self._record)
            self._schedule(until)
            return
        # Answers of one moment are put in force together.
        if not self._waiting:
            self._loop.call_at(self._rest_until, self._install)
        installed = self._loop.create_future()
        self._waiting.append((installed, new))
        await installed

    def _patterns(self, port_id: str, query: Query) -> tuple[str, ...]:
        client = self._clients.get(port_id)
        if client is None:
            return ()
        labels = query.labels
        return tuple(name for name in client.names if covers(name, labels))

    def _open_to_names(self, port: Port, found: tuple[str, ...]) -> tuple[str, ...]:
        opened = opening.openable(opening.fence(self._core, port), found)
        if closed := [address for address in found if address not in opened]:
            self.counts["not opened"] += len(closed)
            self._tell(port.port_id, "not opened", f"an answer names {closed[0]}, which no name opens")
        return opened

    # -- in force, on record ---------------------------------------------------------------------

    def _install(self) -> None:
        """Puts in force what was learnt since the last time, then lets its answers go."""
        waiting, self._waiting = self._waiting, []
        why, began, failed = "policy could not take it", self._loop.time(), list[Entry]()
        try:
            self._core.policies.resolved(self._ledger.table())
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
        self._schedule()

    def _forget(self, entries: Iterable[Entry]) -> None:
        entries = tuple(entries)
        self._ledger.forget(entries)
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
            self._alarm(f"addresses of names can't be recorded: {error}")

    def _close(self, entries: Iterable[Entry]) -> None:
        """These are open no more. What can't be put in force is tried again, and an alarm."""
        entries = tuple(entries)
        self._forget(entries)
        try:
            self._core.policies.resolved(self._ledger.table())
        except PortwrightError as error:
            self._alarm(f"addresses of names whose time is over are still open: {error}")
            self._ledger.put_back(entries, self._loop.time() + LINGER)
        else:
            self._record(entries)

    def _schedule(self, due: float | None = None) -> None:
        """Has what is due looked at in time. ``due``: of what was just learnt; else all of it is asked."""
        if self._expiring is not None:  # it comes here at its end
            return
        due = self._ledger.next_due() if due is None else due
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
        due = self._ledger.due(self._loop.time())
        if not due:  # what the timer was for has been prolonged
            return
        began = self._loop.time()
        used = await self._used(due)
        self._look_again = self._loop.time() + _LOOK_SHARE * (self._loop.time() - began)
        self._ledger.keep(used, self._loop.time() + LINGER)
        self._core.look_ups["kept for a connection"] += len(used)
        # What was asked for again meanwhile has a later end.
        over = set(due) & set(self._ledger.due(self._loop.time()))
        if over:
            self._close(over)

    def _expired(self, task: asyncio.Task[None]) -> None:
        self._expiring = None
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            log.error("closing the addresses of names failed, and is tried again: %r", error)
        self._schedule()

    async def _used(self, entries: Iterable[Entry]) -> set[Entry]:
        """Those to whose addresses their ports have a connection.

        One pass of each flow table, in a thread: a full one takes half a second.
        """
        wanted: dict[int, dict[bytes, list[Entry]]] = {}
        for entry in entries:
            client = self._clients.get(entry.port_id)
            if client is None:
                continue
            other = values.address(entry.address)
            pairs = wanted.setdefault(client.port.host.cookie, {})
            for own in (values.address(a.address) for a in client.port.addresses):
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

    def _tell(self, port_id: str, what: str, sentence: str) -> None:
        """One line in the log for each port and kind of thing; ``doctor`` has the count."""
        if (port_id, what) not in self._told:
            self._told.add((port_id, what))
            log.warning("port %s: %s (said once, `doctor` counts)", port_id, sentence)

    def _alarm(self, sentence: str) -> None:
        if sentence not in self._core.alarms:
            log.error("%s", sentence)
            self._core.alarms.append(sentence)


def _with_flows(flows: Map, pairs: dict[bytes, list[Entry]]) -> set[Entry]:
    found: set[Entry] = set()
    with contextlib.closing(flows):
        for key in flows.keys():  # noqa: SIM118 - a map is no dict
            found.update(pairs.get(key[:_BOTH_ADDRESSES], ()))
    return found


def summary(core: Core) -> str:
    """What doctor says of look-ups."""
    known = core.store.resolved()
    names = len({(port, pattern) for port, pattern, _, _ in known})
    said = ", ".join(f"{count} {word}" for word, count in sorted(core.look_ups.items()))
    return f"{len(known)} addresses open by {names} names; {said or 'no look-ups'}"
