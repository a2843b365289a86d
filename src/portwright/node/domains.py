"""Egress by domain name: which ports' look-ups are proxied, and what their answers open.

An address is open to those whose rule asks for the name from the moment before the answer is passed on;
``node.resolved`` says for how long.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, NamedTuple

from portwright.domains.ledger import Entry, TooMany
from portwright.domains.names import covers
from portwright.model.errors import KernelFailed, PortwrightError
from portwright.model.port import Port, PortMapping, PortState
from portwright.node import opening, steer
from portwright.node.core import Core
from portwright.node.dns_places import Load, Refused
from portwright.node.entries import proxy_look_ups
from portwright.node.resolved import Resolved
from portwright.node.switch import Switch

if TYPE_CHECKING:
    from portwright.domains.message import Query
    from portwright.node.dns_proxy import Client, DnsProxy

#: Words of ``Core.look_ups`` that somebody should look into.
TROUBLE = frozenset({"refused", "bad answers", "not opened", "unsent", "failed"})
_DNS = 53

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
        self._resolved = Resolved(core, loop, self._port_of)
        #: by namespace, what names did not open there when that was looked at last
        self._fences: dict[int, opening.Fence] = {}
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
        gone = {*self._resolved.ledger.unasked(asked), *self._fenced_off()}
        if gone:
            self._resolved.end(gone)
        for switch in list(self._core.switches.values()):
            try:
                self._sync_switch(switch)
            except PortwrightError as error:
                self._core.alarm(f"look-ups of domain names in namespace {switch.ref.cookie:x}: {error}")
        for cookie in self._proxies.keys() - self._core.switches.keys():
            self._end(cookie)
        self._quiet &= self._core.switches.keys()
        self._resolved.schedule()

    def _fenced_off(self) -> list[Entry]:
        """What no name opens any more: the host has addresses or networks now that it had not before."""
        if not len(self._resolved.ledger):
            return []
        ports = {client.port.host.cookie: client.port for client in self._clients.values()}
        try:
            fences = {cookie: opening.fence(self._core, port) for cookie, port in ports.items()}
        except PortwrightError as error:
            self._core.alarm(f"addresses of names can't be judged: {error}")
            return []
        others = {cookie for cookie, fence in fences.items() if self._fences.get(cookie) != fence}
        self._fences = fences
        return [
            entry
            for entry in (self._resolved.ledger if others else ())
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
        self._resolved.close()

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
        try:
            await self._resolved.open(client.port_id, patterns, opened, ttl)
        except TooMany as error:
            self._tell(client.port_id, "refused", f"{query.name} is not opened: {error}")
            raise Refused(str(error)) from None

    def _port_of(self, port_id: str) -> Port | None:
        client = self._clients.get(port_id)
        return None if client is None else client.port

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

    def _tell(self, port_id: str, what: str, sentence: str) -> None:
        """One line in the log for each port and kind of thing; ``doctor`` has the count."""
        if (port_id, what) not in self._told:
            self._told.add((port_id, what))
            log.warning("port %s: %s (said once, `doctor` counts)", port_id, sentence)


def summary(core: Core) -> str:
    """What doctor says of look-ups."""
    known = core.store.resolved()
    names = len({(port, pattern) for port, pattern, _, _ in known})
    said = ", ".join(f"{count} {word}" for word, count in sorted(core.look_ups.items()))
    return f"{len(known)} addresses open by {names} names; {said or 'no look-ups'}"
