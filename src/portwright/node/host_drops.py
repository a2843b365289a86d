"""What host endpoints drop, as it happens: packets by nftables' NFLOG, and what XDP dropped by its counters.

Only while somebody listens. A rule tells of so many packets a second (policy/host/render.py); how many it
kept to itself its counter says. XDP tells of none: once a second its counters are looked at.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from portwright.kernel import rtnl
from portwright.kernel.bpf import features
from portwright.kernel.nflog import PacketLog
from portwright.model.errors import PortwrightError
from portwright.node.core import Core
from portwright.node.hosts import Hosts
from portwright.observe.events import Drop, ip_summary
from portwright.policy.host.programs import Site
from portwright.policy.rules import Direction

#: Seconds from one look at the counters to the next; XDP's take no more than this part of the time.
LOOK_EVERY, _PART = 1.0, 1 / 20
#: At one look at most so many nets are told of, those with most packets.
MOST_NETS = 64
#: After so many packets at once none are read for so many seconds: 2,560 a second at most (monitor.READ_MAX).
_MANY, _PAUSE = 64, 0.1

log = logging.getLogger(__name__)


class HostDropFeed:
    """One for the node, between :meth:`start` and :meth:`stop`; ``publish`` gets what happens."""

    def __init__(self, core: Core, loop: asyncio.AbstractEventLoop, publish: Callable[[Drop], None]) -> None:
        self._core = core
        self._loop = loop
        self._publish = publish
        self._log: PacketLog | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._paused: asyncio.TimerHandle | None = None
        self._unseen = Unseen()
        self._early: dict[tuple[str, str], int] = {}
        #: of interfaces by number, for as long as one look
        self._names: dict[int, str] = {}

    @property
    def _hosts(self) -> Hosts | None:
        return self._core.policies.hosts

    def start(self) -> None:
        """Listens from now on; a second time does nothing. What can't be heard is in the log."""
        hosts = self._hosts
        if hosts is None or self._timer is not None:
            return
        try:
            if features.probe("nflog").supported:
                self._log = PacketLog(hosts.told_group(), self._core.switch_for().fd)
                self._loop.add_reader(self._log.fileno(), self._ready)
            self._unseen.begin(hosts.counted())
        except PortwrightError as error:
            log.warning("drops of host endpoints can't be followed packet by packet: %s", error)
        self._early = {(i, net): packets for _, i, net, packets, _ in hosts.dropped_early()}
        self._timer = self._loop.call_later(LOOK_EVERY, self._look)

    def stop(self) -> None:
        """Listens no more; a second time does nothing."""
        if self._paused is not None:
            self._paused.cancel()
            self._paused = None
        if self._log is not None:
            self._loop.remove_reader(self._log.fileno())
            self._log.close()
            self._log = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ready(self) -> None:
        hosts = self._hosts
        if self._log is None or hosts is None:
            return
        try:
            # The counters before the packets: so what is on its way is not taken for lost.
            counted = hosts.counted() if self._unseen.is_due(time.monotonic()) else None
            packets = self._log.read()
            if len(packets) >= _MANY:
                self._pause(self._log.fileno())
            for packet in packets:
                site = hosts.dropped_by(packet.prefix)
                self._unseen.tell(packet.prefix)
                if site is not None:
                    lost = self._unseen.lost(counted) if counted is not None else 0
                    counted = None
                    number = packet.outdev if site.direction is Direction.EGRESS else packet.indev
                    summary = ip_summary(packet.protocol, packet.payload)
                    self._publish(_event(site, self._name(number), summary, lost, number))
        except PortwrightError as error:
            log.warning("drops of host endpoints: %s", error)

    def _pause(self, fd: int) -> None:
        """Leaves the loop to others for a while: many rules drop much at once. What has no room is lost."""
        self._loop.remove_reader(fd)
        self._paused = self._loop.call_later(_PAUSE, self._loop.add_reader, fd, self._ready)

    def _name(self, number: int) -> str:
        name = self._names.get(number)
        if name is None:
            link = rtnl.link_by_index(self._core.switch_for().rtnl, number) if number else None
            name = self._names[number] = link.name if link is not None else f"#{number}"
        return name

    def _look(self) -> None:
        """What XDP has dropped since the last look."""
        self._names.clear()
        hosts, began = self._hosts, time.monotonic()
        grown: list[tuple[int, Site, str, str]] = []
        now: dict[tuple[str, str], int] = {}
        for site, interface, net, packets, _ in hosts.dropped_early() if hosts is not None else ():
            before = self._early.get((interface, net), 0)
            more = packets - before if packets >= before else packets  # its counters began anew
            now[interface, net] = packets
            if more:
                grown.append((more, site, interface, net))
        self._early = now
        grown.sort(key=lambda each: -each[0])
        left = sum(each[0] for each in grown[MOST_NETS:])
        for more, site, interface, net in grown[:MOST_NETS]:
            many = f"{more} packets" if more > 1 else "1 packet"
            self._publish(_event(site, interface, f"from {net}: {many}", more - 1 + left))
            left = 0
        took = time.monotonic() - began
        self._timer = self._loop.call_later(max(LOOK_EVERY, took / _PART), self._look)


class Unseen:
    """How many packets the rules dropped and told nobody of, by their counters.

    That is what their rate held back, and what the socket had no room for.
    """

    def __init__(self) -> None:
        self._next = 0.0
        self._base: dict[str, int] = {}
        self._told: dict[str, int] = {}
        self._reported: dict[str, int] = {}

    def begin(self, counted: dict[str, int]) -> None:
        """What was before doesn't count."""
        self._base, self._told, self._reported = counted, {}, {}

    def is_due(self, now: float) -> bool:
        """Whether the counters are to be looked at: at most once a second."""
        if now < self._next:
            return False
        self._next = now + LOOK_EVERY
        return True

    def tell(self, counter: str) -> None:
        """A packet of this one is told of."""
        self._told[counter] = self._told.get(counter, 0) + 1

    def lost(self, counted: dict[str, int]) -> int:
        """How many, since it was last asked."""
        found = 0
        for counter, packets in counted.items():
            if packets < self._base.get(counter, 0):  # a table that was put back counts anew
                self._base[counter] = self._told[counter] = self._reported[counter] = 0
            unseen = packets - self._base.get(counter, 0) - self._told.get(counter, 0)
            more = unseen - self._reported.get(counter, 0)
            if more > 0:
                found += more
                self._reported[counter] = unseen
        return found


def _event(site: Site, interface: str, summary: str, lost: int, number: int = 0) -> Drop:
    return Drop(
        time=time.time(),
        port_id=f"host:{interface}",
        ifindex=number,
        direction=site.direction.value,
        reason=f"host-{site.stage}",
        rule=site.rule,
        summary=summary,
        lost=lost,
        endpoint=site.endpoint,
    )
