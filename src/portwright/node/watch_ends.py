"""Follows what is set on the ends of microVM ports inside their namespaces: a new MTU is the port's (R11).

A new MAC is put back: the guest is held to the one on record, and can't be told another (R12).

One socket a switch hears all namespaces that the switch has a number for, as it has for every veth's other
end. A socket in each would hold the namespace: it would outlive its sandbox, and the port never be detached.
So containers are heard too, and what comes is taken at a pace that none of them sets.
"""

from __future__ import annotations

import asyncio
import logging
import os

from portwright.attach import macvtap, tcfilter
from portwright.kernel import ifreq, rtnl
from portwright.kernel.monitor import LinkEvent, SandboxMonitor
from portwright.kernel.netlink import NetlinkSocket
from portwright.model.errors import InvalidInput, PortwrightError
from portwright.model.port import Port, PortState
from portwright.node.changes import Changes
from portwright.node.core import Core
from portwright.node.switch import Switch

#: Seconds between two looks at READ_MAX datagrams each, or so many times what the last one took if that is
#: more. What does not find room until then is lost, and all ports are compared.
PACE, SHARE = 0.05, 20
_MODELS = (tcfilter.MODEL, macvtap.MODEL)

log = logging.getLogger(__name__)


class EndsWatch:
    """Of one switch, served by the daemon's loop; events are of its ports' devices and taps alone."""

    def __init__(self, core: Core, switch: Switch, changes: Changes, loop: asyncio.AbstractEventLoop) -> None:
        self._core = core
        self._cookie = switch.ref.cookie
        self._changes = changes
        self._loop = loop
        self._monitor = SandboxMonitor(switch.fd)
        self._timer: asyncio.TimerHandle | None = None
        self._took = 0.0
        loop.add_reader(self._monitor.fileno(), self._ready)

    def close(self) -> None:
        """Ends the subscription."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._monitor.fileno())
        self._monitor.close()

    def compare_all(self) -> None:
        """As if every port's ends had just been set."""
        switch = self._core.switches.get(self._cookie)
        if switch is not None:
            for port in list(self._core.store.ports(state=PortState.ATTACHED)):
                self._compare(switch, port)

    def _ready(self) -> None:
        self._loop.remove_reader(self._monitor.fileno())
        self._timer = self._loop.call_later(max(PACE, SHARE * self._took), self._look)

    def _look(self) -> None:
        self._timer = None
        self._loop.add_reader(self._monitor.fileno(), self._ready)
        begun = self._loop.time()
        self._heed(self._monitor.read())
        self._took = self._loop.time() - begun

    def _heed(self, events: list[LinkEvent]) -> None:
        switch = self._core.switches.get(self._cookie)
        if switch is None:
            return
        if any(event.kind == "overflow" for event in events):
            self.compare_all()
            return
        links = [event.link for event in events if event.link is not None]
        names = {_identity(link): link for link in links}
        reps = {identity: _representor(switch, link) for identity, link in names.items()}
        heard = {(reps[_identity(link)], link.mtu, _mac(link)) for link in links}
        for rep in {name for name, *_ in heard if name}:
            try:
                port = self._core.store.find_port(rep)
            except PortwrightError:
                continue
            if any(n == rep and (mtu != port.mtu or mac not in ("", port.mac)) for n, mtu, mac in heard):
                self._compare(switch, port)

    def _compare(self, switch: Switch, port: Port) -> None:
        here = port.host.cookie == self._cookie and port.state is PortState.ATTACHED
        if not here or port.model not in _MODELS:
            return
        try:
            ends = self._ends(switch, port)
            for name, link in ends.items():
                if link.mtu != port.mtu:
                    self._follow(port, name, link.mtu)
                    break
            if others := {name: link.mac for name, link in ends.items() if link.mac != port.mac}:
                self._keep_mac(port, others)
        except PortwrightError as error:
            log.error("port %s: %s", port.port_id, error)

    def _ends(self, switch: Switch, port: Port) -> dict[str, rtnl.LinkInfo]:
        """Device and tap as they are now, by their names on record: those that are there and the port's."""
        rep = rtnl.link_by_name(switch.rtnl, port.rep_name)
        fd = self._core.sandbox_fd(port) if rep is not None else None
        if rep is None or fd is None:
            return {}
        try:
            with NetlinkSocket(netns_fd=fd) as sock:
                device, tap = rtnl.link_by_index(sock, rep.link_index), rtnl.link_by_name(sock, port.tap)
        finally:
            os.close(fd)
        found = {}
        if device is not None and (device.kind, device.link_index) == ("veth", rep.index):
            found[port.ifname] = device
        if tap is not None:
            found[port.tap] = tap
        return found

    def _follow(self, port: Port, name: str, mtu: int) -> None:
        try:
            changed = self._changes.set(port, mtu=mtu)
            if changed.admin == "up":  # the routes that another MTU may have cost
                self._changes.refresh(changed)
            log.info("port %s: MTU of %s is now %d, its other ends follow", port.port_id, name, mtu)
        except InvalidInput as error:
            self._core.alarm(f"port {port.port_id}: {name} was given an MTU that is put back", str(error))
            self._changes.keep_mtu(port)

    def _keep_mac(self, port: Port, others: dict[str, str]) -> None:
        self._changes.keep_mac(port)
        if port.ifname in others:
            sentence = f"port {port.port_id}: {port.ifname} was given another MAC than its guest's, put back"
            self._core.alarm(sentence, others[port.ifname])
        else:  # nobody looks at a tap's, and releases that made one left it to the kernel
            log.info("port %s: %s has MAC %s again", port.port_id, port.tap, port.mac)


def _identity(link: rtnl.LinkInfo) -> tuple[str, str, int]:
    """What :func:`_representor` goes by."""
    return link.kind, link.name, link.link_index


def _mac(link: rtnl.LinkInfo) -> str:
    """Of a tap that is down none: it gets ours after it was made, and then is set up."""
    return link.mac if link.up or link.kind != "tun" else ""


def _representor(switch: Switch, link: rtnl.LinkInfo) -> str:
    """Of the port whose device or tap it may be, '' for none: anybody may make a link that looks so."""
    name: str | None = ""
    if link.kind in ("tun", macvtap.MODEL) and link.name.startswith("tap") and len(link.name) <= 12:
        name = "pw" + link.name.removeprefix("tap")
        # Asked of the kernel first: the record's answer to a name that it has not costs a look at all ports.
        name = name if ifreq.mtu(switch.rtnl, name) is not None else ""
    elif link.kind == "veth" and link.link_index:
        name = ifreq.name(switch.rtnl, link.link_index)
    return name if name and name.startswith("pw") else ""
