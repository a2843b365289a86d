"""Follows the kernel's link events: a device that went, a representor changed or moved.

The sandbox may delete its end at will (R1): the port is then detached, and its owner told. The
operator may change the representor with ``ip link`` (R8, R11): record, data path and sandbox follow.
Nobody may take it to another namespace (R13): it is brought back. And an address of the host may move to
another interface, with the host endpoint that it stands for.
"""

from __future__ import annotations

import asyncio
import logging

import msgspec

from portwright.kernel import rtnl
from portwright.kernel.monitor import AddressMonitor, LinkEvent, LinkMonitor, TableMonitor
from portwright.model.errors import InvalidInput, NotFound, PortwrightError
from portwright.model.network import GATEWAY_MAC
from portwright.model.port import Port, PortState
from portwright.node.changes import Changes
from portwright.node.core import Core
from portwright.node.ports import Ports
from portwright.node.switch import Switch
from portwright.node.watch_ends import EndsWatch

log = logging.getLogger(__name__)


class _News(msgspec.Struct):
    """What a burst of events said of one representor, besides what the kernel can be asked."""

    went_down: bool = False
    gone: bool = False
    moved_to: int | None = None
    moved_index: int = 0


class Watch:
    """One monitor a switch, served by the daemon's loop."""

    def __init__(self, core: Core, ports: Ports, changes: Changes, loop: asyncio.AbstractEventLoop) -> None:
        self._core = core
        self._ports = ports
        self._changes = changes
        self._loop = loop
        self._monitors: dict[int, LinkMonitor] = {}
        #: inside the sandboxes, once a port of theirs has a tap
        self._ends: dict[int, EndsWatch] = {}
        #: administrative state of each representor when it was last heard of
        self._up: dict[tuple[int, str], bool] = {}
        #: of our own namespace, for host endpoints that are found by an address
        self._addresses = AddressMonitor()
        self._loop.add_reader(self._addresses.fileno(), self._addresses_ready)
        #: of our own namespace, for the table of host endpoints: without it the host is open
        self._tables = TableMonitor()
        self._loop.add_reader(self._tables.fileno(), self._tables_ready)

    def sync(self) -> None:
        """Follows the switches that are there now. Cheap: call it after every change."""
        for cookie in set(self._monitors) - set(self._core.switches):
            self._stop(cookie)
        for cookie in set(self._core.switches) - set(self._monitors):
            switch = self._core.switches[cookie]
            monitor = LinkMonitor(switch.fd)
            self._monitors[cookie] = monitor
            self._loop.add_reader(monitor.fileno(), self._ready, cookie)
        for cookie in set(self._monitors) - set(self._ends) if self._ports.tapped else ():
            switch = self._core.switches[cookie]
            self._ends[cookie] = EndsWatch(self._core, switch, self._changes, self._loop)

    def catch_up(self) -> None:
        """Acts on what happened while nobody followed. Call it after ``sync``."""
        self._core.policies.addresses_changed()
        for cookie in self._monitors:
            self._compare_all(self._core.switches[cookie])
        for ends in self._ends.values():
            ends.compare_all()

    def close(self) -> None:
        """Ends every subscription."""
        for cookie in list(self._monitors):
            self._stop(cookie)
        for monitor in (self._addresses, self._tables):
            self._loop.remove_reader(monitor.fileno())
            monitor.close()

    def _addresses_ready(self) -> None:
        if self._addresses.drain():
            self._core.policies.addresses_changed()

    def _tables_ready(self) -> None:
        hosts = self._core.policies.hosts
        if not self._tables.drain() or hosts is None:
            return
        try:
            if hosts.mend():
                self._alarm("host endpoints: their nftables table was removed by someone else, and is back")
        except PortwrightError as error:
            hosts.error = f"host endpoints: their nftables table was removed: {error}"
            self._alarm(hosts.error)

    def _stop(self, cookie: int) -> None:
        if (ends := self._ends.pop(cookie, None)) is not None:
            ends.close()
        monitor = self._monitors.pop(cookie)
        self._loop.remove_reader(monitor.fileno())
        monitor.close()
        self._up = {key: up for key, up in self._up.items() if key[0] != cookie}

    def _ready(self, cookie: int) -> None:
        switch = self._core.switches.get(cookie)
        monitor = self._monitors.get(cookie)
        if switch is None or monitor is None:
            return
        events = monitor.read()
        if any(event.kind == "overflow" for event in events):
            log.warning("link events were lost: comparing every port with the kernel")
            self._compare_all(switch)
        # Once for each name however much happened: a sandbox can make its carrier flap at will.
        for rep, news in self._digest(cookie, events).items():
            self._compare(switch, rep, news)

    def _digest(self, cookie: int, events: list[LinkEvent]) -> dict[str, _News]:
        found: dict[str, _News] = {}
        for event in events:
            link = event.link
            name = _representor(link) if link is not None else ""
            if link is None or not name:
                continue
            news = found.setdefault(name, _News())
            key = (cookie, name)
            if event.kind == "del":
                self._up.pop(key, None)
                news.gone = True
                if link.new_netnsid is not None:
                    news.moved_to, news.moved_index = link.new_netnsid, link.new_index
                continue
            if self._up.get(key) and not link.up:
                news.went_down = True
            self._up[key] = link.up
        return found

    def _compare_all(self, switch: Switch) -> None:
        for port in list(self._core.store.ports(state=PortState.ATTACHED)):
            if port.host.cookie == switch.ref.cookie:
                self._compare(switch, port.rep_name, _News(went_down=True, gone=True))

    def _compare(self, switch: Switch, rep: str, news: _News) -> None:
        """Acts on what the kernel says now, not on the event: events may be old."""
        try:
            port = self._core.store.find_port(rep)
        except (NotFound, PortwrightError):
            return
        if port.state is not PortState.ATTACHED or port.host.cookie != switch.ref.cookie:
            return
        try:
            self._act(switch, port, news)
        except PortwrightError as error:
            log.error("port %s: %s", port.port_id, error)

    def _act(self, switch: Switch, port: Port, news: _News) -> None:
        if news.moved_to is not None:
            self._moved(switch, port, news.moved_to, news.moved_index)
            return
        link = rtnl.link_by_name(switch.rtnl, port.rep_name)
        if link is None or link.index != port.rep_ifindex:
            if not news.gone:
                return  # the news of its end is on its way, and says whether it was moved
            log.warning("port %s (%s): its device is gone, detached", port.port_id, port.rep_name)
            self._ports.device_gone(port)
            return
        self._up[switch.ref.cookie, port.rep_name] = link.up
        admin = "up" if link.up else "down"
        if admin != port.admin:
            log.info("port %s: %s is now %s", port.port_id, port.rep_name, admin)
            port = self._changes.admin_changed(port, admin)
        elif link.up and news.went_down:
            self._changes.refresh(port)
        if link.mac != GATEWAY_MAC and port.adopted is None:
            self._changes.keep_gateway(switch, port)
            what = f"port {port.port_id}: {port.rep_name}"
            self._core.alarm(f"{what} was given MAC {link.mac}, the gateway's is back")
        if link.mtu != port.mtu:
            self._follow_mtu(port, link.mtu)

    def _follow_mtu(self, port: Port, mtu: int) -> None:
        try:
            self._changes.mtu_changed(port, mtu)
            log.info("port %s: MTU of %s is now %d, the sandbox follows", port.port_id, port.rep_name, mtu)
        except InvalidInput as error:
            self._alarm(f"port {port.port_id}: {port.rep_name} was given an MTU that is put back: {error}")
            self._changes.keep_mtu(port)

    def _moved(self, switch: Switch, port: Port, moved_to: int, index: int) -> None:
        what = f"port {port.port_id}: its representor {port.rep_name} was moved to another namespace"
        why = "where it can't be found"
        try:
            if self._changes.bring_back(switch, port, moved_to, index) is not None:
                self._alarm(f"{what}, and is brought back")
                return
        except PortwrightError as error:
            why = f"and can't be brought back ({error})"
        self._alarm(f"{what}, {why}: the port is detached")
        self._ports.device_gone(port)

    def _alarm(self, sentence: str) -> None:
        log.error("%s", sentence)
        self._core.alarms.append(sentence)


def _representor(link: rtnl.LinkInfo) -> str:
    """The name by which a link may be a port's representor, '' for none: of an adopted one an altname."""
    return next((name for name in (link.name, *link.altnames) if name.startswith("pw")), "")
