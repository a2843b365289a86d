"""The life of a port: create, delete, plug, unplug.

Each verb is one journal entry. The intent - the port's record, its addresses and the plan - is
committed durably before the kernel is touched; the outcome is committed after. Whatever happens in
between, ``node.recover`` finds the intent and finishes or takes back, with the record alone.
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import time
from collections.abc import Sequence

import msgspec

from portwright.attach import clone, models, tcfilter, veth
from portwright.dataplane import values
from portwright.model.errors import Conflict, InvalidInput, PortStateError
from portwright.model.network import GATEWAY4, GATEWAY6, AddressRange, Dns, Network, Route
from portwright.model.port import (
    Limits,
    NetnsRef,
    Owner,
    Port,
    PortAddress,
    PortMapping,
    PortState,
    rep_name,
)
from portwright.node import unseen
from portwright.node.apply import Applier
from portwright.node.changes import complete
from portwright.node.clones import Numbers
from portwright.node.core import Core
from portwright.node.sandbox import Sandbox
from portwright.node.switch import Switch, attach_mode
from portwright.plan.operations import Operation, encode
from portwright.plan.publish import HostPorts, Publication

_V6_MIN_MTU = 1280


class PortSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller wants of a new port. Addresses: ``requested`` ones, one of each pool, or ``given``."""

    network: Network
    owner: Owner
    ifname: str = "eth0"
    netns: str = ""
    model: str = veth.MODEL
    attach: str = ""
    queues: int = 1
    join: str = ""
    inner_addresses: tuple[str, ...] = ()
    mac: str = ""
    mtu: int | None = None
    pools: tuple[tuple[AddressRange, ...], ...] | None = None
    requested: tuple[str, ...] = ()
    given: tuple[PortAddress, ...] | None = None
    routes: tuple[Route, ...] = ()
    dns: Dns = Dns()
    port_mappings: tuple[PortMapping, ...] = ()
    limits: Limits = Limits()
    labels: dict[str, str] = {}
    ipam: str = "portwright"
    cni: dict[str, object] = {}


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
                port = self._with_addresses(port, spec, time.time())
                port = self._with_routes(port, spec, sandbox)
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
                port = self._with_addresses(port, spec, time.time())
                port = self._with_routes(port, spec, sandbox)
                plan = models.attach(port)
                raise _RollBack
        finally:
            self._core.drop_idle_switch(switch)
        return plan

    def _draft(self, spec: PortSpec, sandbox: Sandbox, host_fd: int | None) -> tuple[Switch, Port]:
        """The port as asked for, judged, without addresses."""
        if spec.queues > 1 and not models.of(spec.model).taps:
            raise InvalidInput("queues", spec.queues, f"a {spec.model} has no tap to have them: ask for 1")
        switch = self._core.switch_for(host_fd)
        try:
            return switch, self._judged(spec, switch, sandbox.ref(self._core.boot_id))
        except BaseException:
            self._core.drop_idle_switch(switch)
            raise

    def _judged(self, spec: PortSpec, switch: Switch, sandbox: NetnsRef) -> Port:
        if sandbox.cookie == switch.ref.cookie:
            raise InvalidInput("netns", spec.netns, "is the host's own namespace, not a sandbox's")
        uplink = self._core.uplink_mtu(switch)
        mtu = spec.mtu or spec.network.mtu or uplink
        if not veth.MIN_MTU <= mtu <= veth.MAX_MTU:
            raise InvalidInput("mtu", mtu, f"must be {veth.MIN_MTU} to {veth.MAX_MTU}")
        inner = clone.judge(spec.inner_addresses, spec.model)
        join = tcfilter.judge_join(spec.join, spec.model, clone=bool(inner))
        port_id = secrets.token_hex(8)
        return Port(
            port_id=port_id,
            network=spec.network.name,
            net_id=spec.network.net_id,
            owner=spec.owner,
            model=spec.model,
            state=PortState.CREATING,
            ifname=spec.ifname,
            attach=attach_mode(spec.attach),
            rep_name=rep_name(port_id),
            tap=models.of(spec.model).tap(port_id),
            queues=spec.queues,
            join=join,
            inner_addresses=inner,
            clone=self._clones.free() if inner else 0,
            mac=spec.mac or _random_mac(),
            mtu=mtu,
            host=switch.ref,
            sandbox=sandbox,
            dns=spec.dns,
            port_mappings=spec.port_mappings,
            limits=complete(spec.limits),
            labels=spec.labels,
            ipam=spec.ipam,
            cni=spec.cni,
            created=time.time(),
        )

    def _with_addresses(self, port: Port, spec: PortSpec, now: float) -> Port:
        if spec.given is not None:
            addresses = spec.given
        elif spec.pools or spec.network.pools or spec.requested:
            allocations = self._store.reserve(
                spec.network.name, spec.pools, port.port_id, spec.requested, now=now
            )
            pools = (spec.pools or ()) if spec.pools is not None else spec.network.pools
            addresses = tuple(
                PortAddress(address=a.address, gateway=gateway_of(a.address, pools)) for a in allocations
            )
        else:
            addresses = ()
        if any(":" in a.address for a in addresses) and port.mtu < _V6_MIN_MTU:
            raise InvalidInput("mtu", port.mtu, f"IPv6 needs at least {_V6_MIN_MTU} (RFC 8200, 5)")
        if port.port_mappings and not addresses:
            raise InvalidInput("portMappings", len(port.port_mappings), "the port has no address to publish")
        return msgspec.structs.replace(port, addresses=addresses)

    def _with_routes(self, port: Port, spec: PortSpec, sandbox: Sandbox) -> Port:
        """The sandbox's routes: those asked for, or a default route of each family.

        A sandbox with several ports has one default route of each family already; another port of
        it gets routes to its own network's subnets instead. What the sandbox has is left alone.
        """
        present = self._destinations(port, sandbox)
        routes = list(spec.routes)
        wanted = {ipaddress.ip_network(r.dst, strict=False).version for r in routes}
        for version in sorted({ipaddress.ip_address(a.address).version for a in port.addresses}):
            default = "0.0.0.0/0" if version == 4 else "::/0"
            served = version in wanted or default in present
            subnets = _subnets(spec, version) if served else [default]
            mine = {r.dst for r in routes}
            routes += [Route(dst=dst) for dst in subnets if dst not in present and dst not in mine]
        return msgspec.structs.replace(port, routes=tuple(routes))

    def _destinations(self, port: Port, sandbox: Sandbox) -> set[str]:
        inside = models.of(port.model).inside
        return sandbox.destinations() if inside else unseen.destinations(self._store, port)

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
        present = self._destinations(port, sandbox)
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


def gateway_of(address: str, pools: Sequence[Sequence[AddressRange]]) -> str:
    """The router for ``address``: the one its range names, else the link-local one."""
    ip = ipaddress.ip_address(address)
    for pool in pools:
        for one in pool:
            if one.gateway and ip in ipaddress.ip_network(one.subnet):
                return one.gateway
    return GATEWAY4 if ip.version == 4 else GATEWAY6


def _subnets(spec: PortSpec, version: int) -> list[str]:
    pools = (spec.pools or ()) if spec.pools is not None else spec.network.pools
    found = {r.subnet: None for pool in pools for r in pool}
    return [s for s in found if ipaddress.ip_network(s).version == version]


def publication(port: Port) -> Publication:
    """The host ports that a port publishes."""
    return Publication(holder=port.port_id, mappings=port.port_mappings, addresses=port.addresses)


def _random_mac() -> str:
    """A unicast, locally administered address (IEEE 802, 48 bits, second bit of the first octet)."""
    raw = bytearray(secrets.token_bytes(6))
    raw[0] = raw[0] & 0xFC | 0x02
    return values.mac_text(bytes(raw))
