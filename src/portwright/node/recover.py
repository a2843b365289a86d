"""What a start does with what the last run left: journal first, then record against kernel.

Forward or back, never half: an interrupted create is taken back, an interrupted delete is finished,
an interrupted plug or unplug ends detached, an interrupted change of settings is finished. Then every
port that the record calls attached is compared with the kernel: one whose device is gone (a reboot, a
dead sandbox) is detached, one whose device lacks programs, map entries or published ports, or is held to
other settings than the record's, gets them back. What no record accounts for goes.

Every step may be repeated, so a start that is killed here is finished by the next one.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial

from portwright.attach import veth
from portwright.dataplane import values
from portwright.kernel import rtnl
from portwright.model.errors import NotFound, PortwrightError
from portwright.model.network import GATEWAY_MAC
from portwright.model.port import Port, PortState, rep_name
from portwright.node import clones, nat
from portwright.node.apply import Applier, direction_of
from portwright.node.changes import HEARD, SET, Changes
from portwright.node.core import Core
from portwright.node.entries import Entries, port_key
from portwright.node.migrate import MIGRATE, Migration
from portwright.node.ports import Ports, publication
from portwright.node.switch import Switch
from portwright.plan.operations import Operation
from portwright.plan.path_operations import AttachProgram, RemovePort

log = logging.getLogger(__name__)


def recover(core: Core, ports: Ports, changes: Changes) -> list[str]:
    """Brings record and kernel together; returns what it did, as sentences. Never raises for one port."""
    core.faults.stage = "recover-"
    done: list[str] = []
    try:
        _finish_journal(core, ports, changes, done)
        _compare(core, ports, done)
        for switch in list(core.switches.values()):
            with _reported(done, None):
                _sweep(core, switch, done)
        for cookie in core.remembered() - {core.own_cookie}:
            with _reported(done, None):
                done += filter(None, [core.drop_remains(cookie)])
    finally:
        core.faults.stage = ""
    return done


def _finish_journal(core: Core, ports: Ports, changes: Changes, done: list[str]) -> None:
    actions: dict[str, tuple[str, Callable[[Port, int], None]]] = {
        "add": ("taken back", ports.roll_back_create),
        "del": ("finished", ports.finish_delete),
        MIGRATE: ("taken back", Migration(core).roll_back),
        SET: ("finished", partial(changes.finish, SET)),
        HEARD: ("finished", partial(changes.finish, HEARD)),
    }
    for entry in core.store.pending():
        try:
            port = core.store.get_port(entry.port_id)
        except NotFound:
            core.store.finish(entry.id, "failed")
            continue
        outcome, action = actions.get(entry.kind, ("detached", ports.roll_back_plug))
        with _reported(done, f"{entry.kind} of {port.port_id} was cut short: {outcome}"):
            action(port, entry.id)
    for port in list(core.store.ports(state=PortState.DELETING)):
        # Its DEL had taken the device, or was about to, and waited for a foreign IPAM plugin.
        with _reported(done, f"port {port.port_id} was being deleted: its device is removed"):
            ports.clear(port)


def _compare(core: Core, ports: Ports, done: list[str]) -> None:
    attached = list(core.store.ports(state=PortState.ATTACHED))
    _open_switches(core, attached)
    maps: dict[int, Entries] = {}
    for port in attached:
        with _reported(done, None):
            if not _present(core, port):
                ports.device_gone(port)
                done.append(f"port {port.port_id}: its device is gone, detached")
            elif lacked := _repair(core, port, maps):
                done.append(f"port {port.port_id}: {lacked}, restored")


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
    if link is None or link.index != port.rep_ifindex:
        return False
    # Its MAC may have been changed by hand; it is put back.
    return port.adopted is not None or link.mac == GATEWAY_MAC or f"port-{port.port_id}" in link.altnames


def _repair(core: Core, port: Port, maps: dict[int, Entries]) -> str:
    """Gives back what the data path of a port lacks whose device is there; says what, '' if nothing."""
    switch = core.switch_of(port)
    if switch is None:
        return ""
    entries = maps.get(switch.ref.cookie) or maps.setdefault(switch.ref.cookie, Entries(switch))

    def there(operation: Operation) -> bool:
        return isinstance(operation, AttachProgram) and switch.attached(
            port.port_id, port.rep_ifindex, direction_of(operation.direction)
        )

    plan = [o for o in veth.restore(port) if not isinstance(o, RemovePort) and not there(o)]
    lacked = "its data path was not whole"
    if entries.know(port) and not any(isinstance(o, AttachProgram) for o in plan):
        if entries.agree(port):
            return ""
        lacked = "it was not held to the settings on record"
        plan = [veth.entry(port), veth.targets(port)]
    with Applier(switch, None, core.faults) as applier:
        applier.apply(plan, "restore", undo=False)
    return lacked


def _sweep(core: Core, switch: Switch, done: list[str]) -> None:
    """Brings pins, map entries and published ports to what the record accounts for."""
    known = list(core.store.ports())
    here = [p for p in known if p.state is PortState.ATTACHED and _holds(switch, p)]
    attached = {p.port_id for p in here}
    for port_id, pin in list(switch.port_links()):
        if port_id not in attached:
            pin.unlink(missing_ok=True)
            done.append(f"link pin {pin.name}: no such port")
    wanted = {
        "pw_ports": {port_key(p.rep_ifindex): p.port_id for p in here},
        "pw_addrs": {values.address(a.address): p.port_id for p in here for a in p.addresses},
    }
    if clones.MAP in switch.maps:
        wanted[clones.MAP] = {clones.key(p.clone): p.port_id for p in here if p.clone}
    for name, entries in wanted.items():
        table = switch.maps[name]
        for key, value in list(table.items()):
            port_id = values.port_text(value)
            if entries.get(key) == port_id:
                continue
            if name == "pw_ports":
                _delete_stray(switch, int.from_bytes(key, sys.byteorder), port_id)
            table.delete(key)
            done.append(f"{name}: entry of port {port_id}, which is not there")
    numbers = {int(p.port_id, 16) for p in known}
    for name in ("pw_counters", "pw_drops", "pw_limits"):
        table = switch.maps[name]
        for key in list(table.keys()):
            if int.from_bytes(key[:8], sys.byteorder) not in numbers:
                table.delete(key)
    if nat.repair(switch, (publication(p) for p in here if p.port_mappings)):
        done.append("published ports were not those of the record, restored")


def _holds(switch: Switch, port: Port) -> bool:
    return (port.host.cookie, port.host.boot_id) == (switch.ref.cookie, switch.ref.boot_id)


def _delete_stray(switch: Switch, ifindex: int, port_id: str) -> None:
    """Removes a representor of ours that has no record: our map knows it, and it has the name."""
    link = rtnl.link_by_index(switch.rtnl, ifindex)
    if link is not None and (link.name, link.mac) == (rep_name(port_id), GATEWAY_MAC):
        switch.reaper.delete(ifindex)


@contextlib.contextmanager
def _reported(done: list[str], what: str | None) -> Iterator[None]:
    try:
        yield
        if what:
            done.append(what)
    except (PortwrightError, OSError) as error:
        log.error("recovery: %s", error)
        done.append(f"failed: {error}")
