"""The life of a port: create, delete, plug, unplug.

Each verb is one journal entry. The intent - the port's record, its addresses and the plan - is
committed durably before the kernel is touched; the outcome is committed after. Whatever happens in
between, ``node.recover`` finds the intent and finishes or takes back, with the record alone.
"""

from __future__ import annotations

import contextlib
import time

import msgspec

from portwright.attach import models
from portwright.model.errors import Conflict, InvalidInput, PortStateError
from portwright.model.port import Port, PortState
from portwright.node import draft
from portwright.node.apply import Applier
from portwright.node.clones import Numbers
from portwright.node.core import Core
from portwright.node.draft import PortSpec
from portwright.node.sandbox import Sandbox
from portwright.node.switch import Switch
from portwright.plan.operations import Operation, encode
from portwright.plan.publish import HostPorts, Publication


class Ports:
    """The one writer of ports."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._store = core.store
        ports = list(core.store.ports())
        self._host_ports = HostPorts(publication(p) for p in ports if p.port_mappings)
        self._clones = Numbers(p.clone for p in ports)
        #: whether there is a port with a tap, or was
        self.tapped = any(p.tap for p in ports)

    # -- create ----------------------------------------------------------------------------------

    def create(self, spec: PortSpec, sandbox_fd: int, host_fd: int | None = None) -> Port:
        """Makes the port and its device; returns once packets flow under the guard.

        On any failure nothing is left, addresses are free again, and the error names the cause.
        """
        owner = spec.owner.key()
        if self._store.port_by_owner(owner) is not None:
            raise Conflict(
                "port", owner, "it exists already, duplicate allocation is not allowed; DEL it first"
            )
        with Sandbox(sandbox_fd, spec.netns) as sandbox:
            return self._create(spec, sandbox, host_fd)

    def _create(self, spec: PortSpec, sandbox: Sandbox, host_fd: int | None) -> Port:
        switch, port = self._draft(spec, sandbox, host_fd)
        try:
            self._core.prepare(switch, spec.network)
            with self._store.transaction(durable=True):
                port = draft.addressed(self._store, port, spec, sandbox)
                plan = models.attach(port)
                self._store.put_port(port)
                entry = self._store.begin(port.port_id, "add", encode(plan))
                if port.port_mappings:
                    self._host_ports.claim(publication(port))
                self._clones.take(port.clone)
                self.tapped |= bool(port.tap)
        except BaseException:
            self._host_ports.release(port.port_id)
            self._clones.release(port.clone)
            self._core.drop_idle_switch(switch)
            raise
        self._core.faults.at("add:intent")
        try:
            self._core.admit(switch, port)
            with Applier(switch, sandbox, self._core.faults) as applier:
                applier.apply(plan, "add")
                port = msgspec.structs.replace(
                    port, state=PortState.ATTACHED, rep_ifindex=applier.rep_ifindex
                )
        except BaseException:
            self._abandon(switch, port, entry)
            raise
        with self._store.transaction(durable=False):
            self._store.put_port(port)
            self._store.finish(entry, "done")
        self._core.faults.at("add:commit")
        return port

    def dry_run(self, spec: PortSpec, sandbox_fd: int, host_fd: int | None = None) -> tuple[Operation, ...]:
        """The plan that ``create`` would apply; the record and the kernel stay as they are."""
        with Sandbox(sandbox_fd, spec.netns) as sandbox:
            return self._planned(spec, sandbox, host_fd)

    def _planned(self, spec: PortSpec, sandbox: Sandbox, host_fd: int | None) -> tuple[Operation, ...]:
        switch, port = self._draft(spec, sandbox, host_fd)

        class _RollBack(Exception):
            pass

        plan: tuple[Operation, ...] = ()
        try:
            with contextlib.suppress(_RollBack), self._store.transaction(durable=False):
                port = draft.addressed(self._store, port, spec, sandbox)
                plan = models.attach(port)
                raise _RollBack
        finally:
            self._core.drop_idle_switch(switch)
        return plan

    def _draft(self, spec: PortSpec, sandbox: Sandbox, host_fd: int | None) -> tuple[Switch, Port]:
        """The port as asked for, judged, without addresses."""
        switch = self._core.switch_for(host_fd)
        try:
            ref = sandbox.ref(self._core.boot_id)
            return switch, draft.judged(self._core, spec, switch, ref, self._clones)
        except BaseException:
            self._core.drop_idle_switch(switch)
            raise

    def _abandon(self, switch: Switch, port: Port, entry: int) -> None:
        """After a failed create: the applier took the kernel back; sweep, then forget the port."""
        with contextlib.suppress(Exception), Applier(switch, None, self._core.faults) as applier:
            applier.take_back(models.delete(port), "abandon")
        with self._store.transaction(durable=True):
            self._store.release(port.port_id, now=time.time(), rest=False)
            self._store.delete_port(port.port_id)
            self._store.finish(entry, "failed")
        self._host_ports.release(port.port_id)
        self._clones.release(port.clone)
        self._core.dismiss(switch, port)
        self._core.drop_idle_switch(switch)

    # -- delete ----------------------------------------------------------------------------------

    def delete(self, port: Port, *, entry: int | None = None, rest: bool = True) -> None:
        """Ends the port, whatever state it is in. Needs the record alone; may be repeated.

        ``entry``: the open journal entry that this finishes. ``rest=False``: its addresses are free at once.
        """
        plan = models.delete(port)
        port = msgspec.structs.replace(port, state=PortState.DELETING)
        with self._store.transaction(durable=True):
            self._store.put_port(port)
            if entry is None:
                entry = self._store.begin(port.port_id, "del", encode(plan))
        self._core.faults.at("del:intent")
        switch = self._core.switch_of(port)
        if switch is not None:
            with Applier(switch, None, self._core.faults) as applier:
                applier.take_back(plan, "del")
        # Not durable: a power cut would bring the intent back, and the next start finishes it again.
        with self._store.transaction(durable=False):
            self._store.release(port.port_id, now=time.time(), rest=rest)
            self._store.delete_port(port.port_id)
            self._store.finish(entry, "done")
        self._core.faults.at("del:commit")
        self._host_ports.release(port.port_id)
        self._clones.release(port.clone)
        self._core.dismiss(switch, port)
        if switch is not None:
            self._core.drop_idle_switch(switch)

    def clear(self, port: Port) -> None:
        """The kernel's part of ``delete``; the record stays, in state deleting, for ``delete`` to end."""
        port = msgspec.structs.replace(port, state=PortState.DELETING)
        with self._store.transaction(durable=True):
            self._store.put_port(port)
        switch = self._core.switch_of(port)
        if switch is not None:
            with Applier(switch, None, self._core.faults) as applier:
                applier.take_back(models.delete(port), "clear")

    # -- plug and unplug -------------------------------------------------------------------------

    def unplug(self, port: Port) -> Port:
        """Takes the device; the port keeps addresses, counters, limits, mappings: it is detached."""
        if port.state is PortState.DETACHED:
            raise PortStateError(port.port_id, port.state.value, "attached")
        return self._detach(port)

    def device_gone(self, port: Port) -> Port:
        """The sandbox deleted its end (or died with it): the same, found out by a netlink event."""
        return self._detach(port)

    def _detach(self, port: Port, *, entry: int | None = None) -> Port:
        plan = models.detach(port)
        if entry is None:
            with self._store.transaction(durable=True):
                entry = self._store.begin(port.port_id, "unplug", encode(plan))
        self._core.faults.at("unplug:intent")
        switch = self._core.switch_of(port)
        if switch is not None:
            with Applier(switch, None, self._core.faults) as applier:
                applier.take_back(plan, "unplug")
        port = msgspec.structs.replace(port, state=PortState.DETACHED, rep_ifindex=0)
        with self._store.transaction(durable=True):
            self._store.put_port(port)
            self._store.finish(entry, "done")
        self._core.faults.at("unplug:commit")
        return port

    def plug(self, port: Port, sandbox_fd: int, netns_path: str, ifname: str | None) -> Port:
        """Gives a detached port a new device, in the same sandbox or in another."""
        if port.state is not PortState.DETACHED:
            raise PortStateError(port.port_id, port.state.value, "detached")
        with Sandbox(sandbox_fd, netns_path) as sandbox:
            return self._plug(port, sandbox, ifname)

    def _plug(self, port: Port, sandbox: Sandbox, ifname: str | None) -> Port:
        switch = self._core.switch_of(port) or self._core.switch_for()
        network = self._store.get_network(port.network)
        self._core.prepare(switch, network)
        ref = sandbox.ref(self._core.boot_id)
        if ref.cookie == switch.ref.cookie:
            raise InvalidInput("netns", sandbox.path, "is the host's own namespace, not a sandbox's")
        port = msgspec.structs.replace(
            port, state=PortState.PLUGGING, sandbox=ref, host=switch.ref, ifname=ifname or port.ifname
        )
        present = draft.destinations(self._store, port, sandbox)
        implicit = {"0.0.0.0/0", "::/0"}
        routes = tuple(r for r in port.routes if r.dst not in implicit or r.dst not in present)
        plan = models.attach(msgspec.structs.replace(port, routes=routes))
        with self._store.transaction(durable=True):
            self._store.put_port(port)
            entry = self._store.begin(port.port_id, "plug", encode(plan))
        self._core.faults.at("plug:intent")
        try:
            self._core.admit(switch, port)
            with Applier(switch, sandbox, self._core.faults) as applier:
                applier.apply(plan, "plug")
                attached = msgspec.structs.replace(
                    port, state=PortState.ATTACHED, rep_ifindex=applier.rep_ifindex
                )
        except BaseException:
            self._detach(port, entry=entry)
            raise
        with self._store.transaction(durable=False):
            self._store.put_port(attached)
            self._store.finish(entry, "done")
        self._core.faults.at("plug:commit")
        return attached

    # -- recovery --------------------------------------------------------------------------------

    def roll_back_create(self, port: Port, entry: int) -> None:
        """A create that a crash cut short: as if it had never been asked for."""
        self.delete(port, entry=entry, rest=False)

    def finish_delete(self, port: Port, entry: int) -> None:
        """A delete that a crash cut short: forward."""
        self.delete(port, entry=entry)

    def roll_back_plug(self, port: Port, entry: int) -> None:
        """A plug or unplug that a crash cut short: detached, ready to be plugged again."""
        self._detach(port, entry=entry)


def publication(port: Port) -> Publication:
    """The host ports that a port publishes."""
    return Publication(holder=port.port_id, mappings=port.port_mappings, addresses=port.addresses)
