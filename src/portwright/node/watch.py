"""Follows the kernel's link events: a device that went, an MTU that changed, a representor moved.

The sandbox may delete its end at will (R1): the port is then detached, and its owner told. The
operator may change the representor's MTU with ``ip link`` (R11): the sandbox's end follows.
"""

from __future__ import annotations

import asyncio
import logging

from portwright.kernel import rtnl
from portwright.kernel.monitor import LinkMonitor
from portwright.model.errors import NotFound, PortwrightError
from portwright.model.port import Port, PortState
from portwright.node.core import Core
from portwright.node.ports import Ports
from portwright.node.switch import Switch

log = logging.getLogger(__name__)


class Watch:
    """One monitor a switch, served by the daemon's loop."""

    def __init__(self, core: Core, ports: Ports, loop: asyncio.AbstractEventLoop) -> None:
        self._core = core
        self._ports = ports
        self._loop = loop
        self._monitors: dict[int, LinkMonitor] = {}

    def sync(self) -> None:
        """Follows the switches that are there now. Cheap: call it after every change."""
        for cookie in set(self._monitors) - set(self._core.switches):
            self._stop(cookie)
        for cookie in set(self._core.switches) - set(self._monitors):
            switch = self._core.switches[cookie]
            monitor = LinkMonitor(switch.fd)
            self._monitors[cookie] = monitor
            self._loop.add_reader(monitor.fileno(), self._ready, cookie)

    def close(self) -> None:
        for cookie in list(self._monitors):
            self._stop(cookie)

    def _stop(self, cookie: int) -> None:
        monitor = self._monitors.pop(cookie)
        self._loop.remove_reader(monitor.fileno())
        monitor.close()

    def _ready(self, cookie: int) -> None:
        switch = self._core.switches.get(cookie)
        monitor = self._monitors.get(cookie)
        if switch is None or monitor is None:
            return
        for event in monitor.read():
            if event.kind == "overflow":
                log.warning("link events were lost: comparing every port with the kernel")
                self._compare_all(switch)
            elif event.link is not None and event.link.name.startswith("pw"):
                self._compare(switch, event.link.name)

    def _compare_all(self, switch: Switch) -> None:
        for port in list(self._core.store.ports(state=PortState.ATTACHED)):
            if port.host.cookie == switch.ref.cookie:
                self._compare(switch, port.rep_name)

    def _compare(self, switch: Switch, rep: str) -> None:
        """Acts on what the kernel says now, not on the event: events may be old."""
        try:
            port = self._core.store.find_port(rep)
        except (NotFound, PortwrightError):
            return
        if port.state is not PortState.ATTACHED or port.host.cookie != switch.ref.cookie:
            return
        try:
            self._act(switch, port)
        except PortwrightError as error:
            log.error("port %s: %s", port.port_id, error)

    def _act(self, switch: Switch, port: Port) -> None:
        link = rtnl.link_by_name(switch.rtnl, port.rep_name)
        if link is None or link.index != port.rep_ifindex:
            log.warning("port %s (%s): its device is gone, detached", port.port_id, port.rep_name)
            self._ports.device_gone(port)
            return
        if link.mtu != port.mtu:
            log.info(
                "port %s: MTU of %s is now %d, the sandbox follows", port.port_id, port.rep_name, link.mtu
            )
            self._ports.mtu_changed(port, link.mtu)
