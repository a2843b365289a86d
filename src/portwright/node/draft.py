"""A new port's record: what its caller wants, judged, then completed by addresses and routes."""

from __future__ import annotations

import ipaddress
import secrets
import time
from collections.abc import Sequence

import msgspec

from portwright.attach import clone, models, tcfilter, veth
from portwright.dataplane import values
from portwright.model.errors import InvalidInput
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
from portwright.node.changes import complete
from portwright.node.clones import Numbers
from portwright.node.core import Core
from portwright.node.sandbox import Sandbox
from portwright.node.switch import Switch, attach_mode
from portwright.store import Store

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


def judged(core: Core, spec: PortSpec, switch: Switch, sandbox: NetnsRef, clones: Numbers) -> Port:
    """The port as asked for, without addresses. Raises for what can't be, before anything is changed."""
    if spec.queues > 1 and not models.of(spec.model).taps:
        raise InvalidInput("queues", spec.queues, f"a {spec.model} has no tap to have them: ask for 1")
    if sandbox.cookie == switch.ref.cookie:
        raise InvalidInput("netns", spec.netns, "is the host's own namespace, not a sandbox's")
    uplink = core.uplink_mtu(switch)
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
        clone=clones.free() if inner else 0,
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


def addressed(store: Store, port: Port, spec: PortSpec, sandbox: Sandbox) -> Port:
    """A judged port with its addresses, which are reserved in the caller's transaction, and its routes."""
    return _with_routes(store, _with_addresses(store, port, spec), spec, sandbox)


def _with_addresses(store: Store, port: Port, spec: PortSpec) -> Port:
    if spec.given is not None:
        addresses = spec.given
    elif spec.pools or spec.network.pools or spec.requested:
        allocations = store.reserve(
            spec.network.name, spec.pools, port.port_id, spec.requested, now=time.time()
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


def _with_routes(store: Store, port: Port, spec: PortSpec, sandbox: Sandbox) -> Port:
    """The sandbox's routes: those asked for, or a default route of each family.

    A sandbox with several ports has one default route of each family already; another port of
    it gets routes to its own network's subnets instead. What the sandbox has is left alone.
    """
    present = destinations(store, port, sandbox)
    routes = list(spec.routes)
    wanted = {ipaddress.ip_network(r.dst, strict=False).version for r in routes}
    for version in sorted({ipaddress.ip_address(a.address).version for a in port.addresses}):
        default = "0.0.0.0/0" if version == 4 else "::/0"
        served = version in wanted or default in present
        subnets = _subnets(spec, version) if served else [default]
        mine = {r.dst for r in routes}
        routes += [Route(dst=dst) for dst in subnets if dst not in present and dst not in mine]
    return msgspec.structs.replace(port, routes=tuple(routes))


def destinations(store: Store, port: Port, sandbox: Sandbox) -> set[str]:
    """Where the port's sandbox has routes to already. Raises Conflict as :func:`unseen.destinations`."""
    inside = models.of(port.model).inside
    return sandbox.destinations() if inside else unseen.destinations(store, port)


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


def _random_mac() -> str:
    """A unicast, locally administered address (IEEE 802, 48 bits, second bit of the first octet)."""
    raw = bytearray(secrets.token_bytes(6))
    raw[0] = raw[0] & 0xFC | 0x02
    return values.mac_text(bytes(raw))
