"""What a start does with what the last run left: journal first, then record against kernel.

Forward or back, never half: an interrupted create is taken back, an interrupted delete is finished,
an interrupted plug or unplug ends detached. Then every port that the record calls attached is
compared with the kernel; one whose device is gone (a reboot, a dead sandbox) is detached.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

from portwright.kernel import rtnl
from portwright.model.errors import NotFound, PortwrightError
from portwright.model.network import GATEWAY_MAC
from portwright.model.port import Port, PortState
from portwright.node.core import Core
from portwright.node.ports import Ports
from portwright.node.switch import DIRECTIONS, Switch

log = logging.getLogger(__name__)


def recover(core: Core, ports: Ports) -> list[str]:
    """Brings record and kernel together; returns what it did, as sentences. Never raises for one port."""
    done: list[str] = []
    for entry in core.store.pending():
        try:
            port = core.store.get_port(entry.port_id)
        except NotFound:
            core.store.finish(entry.id, "failed")
            continue
        action: Callable[[Port, int], None] = {
            "add": ports.roll_back_create,
            "del": ports.finish_delete,
        }.get(entry.kind, ports.roll_back_plug)
        with _reported(done, f"{entry.kind} of {port.port_id} was cut short: {action.__name__}"):
            action(port, entry.id)
    attached = list(core.store.ports(state=PortState.ATTACHED))
    _open_switches(core, attached)
    for port in attached:
        with _reported(done, None):
            if not _present(core, port):
                ports.device_gone(port)
                done.append(f"port {port.port_id}: its device is gone, detached")
    for switch in list(core.switches.values()):
        _sweep(core, switch, done)
    return done


def _open_switches(core: Core, attached: list[Port]) -> None:
    """Opens every namespace that has ports and prepares their networks in it."""
    for port in attached:
        switch = core.switch_of(port)
        if switch is not None and port.network not in switch.prepared:
            with contextlib.suppress(NotFound):
                core.prepare(switch, core.store.get_network(port.network))


def _present(core: Core, port: Port) -> bool:
    switch = core.switch_of(port)
    if switch is None:
        return False
    link = rtnl.link_by_name(switch.rtnl, port.rep_name)
    return link is not None and link.index == port.rep_ifindex and link.mac == GATEWAY_MAC


def _sweep(core: Core, switch: Switch, done: list[str]) -> None:
    """Takes away pins and map entries of ours that no record accounts for."""
    known = {p.port_id for p in core.store.ports()}
    for port_id, pin in list(switch.port_links()):
        if port_id not in known:
            pin.unlink(missing_ok=True)
            done.append(f"link pin {pin.name}: no such port")
    numbers = {int(p, 16) for p in known}
    for name in ("pw_ports", "pw_addrs"):
        table = switch.maps[name]
        for key, value in list(table.items()):
            if int.from_bytes(value[:8], sys.byteorder) not in numbers:
                table.delete(key)
                done.append(f"{name}: entry of no port")
    counters = switch.maps["pw_counters"]
    for key in list(counters.keys()):
        if int.from_bytes(key, sys.byteorder) not in numbers:
            counters.delete(key)


def verify_attached(core: Core, port: Port) -> list[str]:
    """Which programs are missing on an attached port's representor; [] is well."""
    switch = core.switch_of(port)
    if switch is None:
        return ["the host's namespace is gone"]
    return [
        f"program {direction} is not attached to {port.rep_name}"
        for direction in DIRECTIONS
        if not switch.attached(port.port_id, port.rep_ifindex, direction)
    ]


@contextlib.contextmanager
def _reported(done: list[str], what: str | None) -> Iterator[None]:
    try:
        yield
        if what:
            done.append(what)
    except (PortwrightError, OSError) as error:
        log.error("recovery: %s", error)
        done.append(f"failed: {error}")
