"""The attachment model ``veth``: a pair whose host end is the representor.

The order of a plan is its safety. Until ``SetLink(host, up)`` the sandbox has no carrier, and by
then both programs are attached and know the port: there is no moment at which a packet passes
unguarded. ``PutTargets`` is last: the port can be reached from others once all of it is there, and
``AwaitLink`` before it makes the answer mean that packets flow both ways.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from portwright.model.network import GATEWAY_MAC, Route
from portwright.model.port import Port
from portwright.plan.adopt_operations import AddWay
from portwright.plan.operations import (
    AddAddress,
    AddNeighbour,
    AddRoute,
    AwaitLink,
    CreateVeth,
    DeleteLink,
    NameLink,
    Operation,
    PublishPorts,
    SetLink,
    SetSysctl,
    UnpublishPorts,
)
from portwright.plan.path_operations import (
    AttachProgram,
    DetachProgram,
    PutPort,
    PutTargets,
    RemovePort,
    RemoveTargets,
)
from portwright.plan.publish import loopback_access

MODEL = "veth"
#: The model whose representor is a tap (attach.tap): the data path has to know.
DIRECT = "tap"
#: What the model can't do is refused before the kernel is touched.
CAPABILITIES = frozenset({"portMappings", "bandwidth", "ips", "ipRanges", "mac", "dns"})
_TABLES = {"local": 255, "main": 254}  # rtnetlink.h
MIN_MTU, MIN_MTU6, MAX_MTU = 68, 1280, 65535


def attach(port: Port) -> tuple[Operation, ...]:
    """The plan that gives a recorded port its device. A disabled link (``admin``) stays down."""
    made = CreateVeth(
        rep=port.rep_name,
        ifname=port.ifname,
        mac=port.mac,
        gateway_mac=GATEWAY_MAC,
        mtu=port.mtu,
        sandbox=port.sandbox.path,
        alias=alias(port),
    )
    return around(port, made, _sandbox(port))


def around(port: Port, made: Operation, inside: Sequence[Operation]) -> tuple[Operation, ...]:
    """The plan around the operation that makes the representor, and those in the sandbox."""
    ops: list[Operation] = [
        made,
        NameLink(rep=port.rep_name, altnames=altnames(port)),
        *guarded(port),
        *_up(port),
        *inside,
        *_reachable(port),
    ]
    if port.port_mappings:
        ops.append(PublishPorts(port_id=port.port_id, mappings=port.port_mappings, addresses=port.addresses))
    return tuple(ops)


def restore(port: Port) -> tuple[Operation, ...]:
    """The plan for a representor that came back from elsewhere, bare: as ``attach``, without making it."""
    return (
        RemovePort(rep=port.rep_name, port_id=port.port_id, ifindex=port.rep_ifindex),
        *guarded(port),
        *_up(port),
        *_reachable(port, again=True),
    )


def enable(port: Port) -> tuple[Operation, ...]:
    """The plan of ``admin up``. Going down cost the host's routes and neighbours: they come back."""
    return (
        SetLink(where="host", name=port.rep_name, up=True),
        *reach(port, again=True),
        targets(port),
    )


def disable(port: Port) -> tuple[Operation, ...]:
    """The plan of ``admin down``: first nobody's packets lead here, then the sandbox loses its carrier."""
    return (targets(port), SetLink(where="host", name=port.rep_name, up=False))


def entry(port: Port) -> PutPort:
    """The port's own entry in the data path: what its sender is held to."""
    return PutPort(
        rep=port.rep_name,
        port_id=port.port_id,
        net_id=port.net_id,
        mac=port.mac,
        gateway_mac=gateway_mac(port),
        mtu=port.mtu,
        sandbox=port.sandbox.cookie,
        addresses=tuple(a.address for a in port.addresses),
        gateways=tuple(dict.fromkeys(a.gateway for a in port.addresses)),
        limits=port.limits,
        tap=_tapped(port),
        onlink=port.adopted is not None,
    )


def targets(port: Port) -> PutTargets:
    """The entries that lead others to the port, or say that its link is disabled."""
    return PutTargets(
        rep=port.rep_name,
        port_id=port.port_id,
        net_id=port.net_id,
        mac=port.mac,
        gateway_mac=gateway_mac(port),
        mtu=port.mtu,
        sandbox=port.sandbox.cookie,
        addresses=tuple(a.address for a in port.addresses),
        limited=bool(port.limits.ingress_rate),
        down=port.admin == "down",
        tap=_tapped(port),
    )


def _tapped(port: Port) -> bool:
    return port.model == DIRECT or bool(port.adopted and port.adopted.tap)


def gateway_mac(port: Port) -> str:
    """What the sandbox takes for its gateway's MAC."""
    return port.adopted.bridge_mac if port.adopted else GATEWAY_MAC


def reach(port: Port, *, again: bool = False) -> tuple[Operation, ...]:
    """The host's ways to the port, by a representor that is up. ``again``: some may be there."""
    if port.adopted:
        return tuple(_adopted_way(port, a.address, port.adopted.sources) for a in port.addresses)
    ops: list[Operation] = []
    for address in (a.address for a in port.addresses):
        route = Route(dst=host_prefix(address), scope=_link_scope(address))
        ops.append(AddRoute(where="host", dev=port.rep_name, route=route, shared=again))
        ops.append(AddNeighbour(where="host", dev=port.rep_name, address=address, mac=port.mac))
    return (*ops, *_loopback(port, again=again))


def detach(port: Port) -> tuple[Operation, ...]:
    """The plan that takes the device away and keeps the port: counters, addresses, limits."""
    addresses = tuple(a.address for a in port.addresses)
    ops: list[Operation] = []
    if port.port_mappings:
        ops.append(
            UnpublishPorts(port_id=port.port_id, mappings=port.port_mappings, addresses=port.addresses)
        )
    ops += [
        RemoveTargets(port_id=port.port_id, addresses=addresses),
        DeleteLink(rep=port.rep_name),
        DetachProgram(port_id=port.port_id, direction="ingress"),
        DetachProgram(port_id=port.port_id, direction="egress"),
        RemovePort(rep=port.rep_name, port_id=port.port_id, ifindex=port.rep_ifindex),
    ]
    return tuple(ops)


def altnames(port: Port) -> tuple[str, ...]:
    """Names to find the representor by: the port's id, and the workload's (at most 127 bytes)."""
    names = [f"port-{port.port_id}"]
    owner = port.owner
    if owner.kind == "cni":
        names.append(f"{owner.container_id[:64]}-{owner.ifname}-{port.port_id[:4]}")
    elif owner.name:
        names.append(f"{owner.name[:100]}-{port.port_id[:4]}")
    return tuple(names)


def host_prefix(address: str) -> str:
    """``10.0.0.2`` -> ``10.0.0.2/32``."""
    return f"{address}/{ipaddress.ip_address(address).max_prefixlen}"


def alias(port: Port) -> str:
    """What the representor says of its port to whoever looks: its network and its workload."""
    labels = port.labels
    pod = labels.get("io.kubernetes.pod.name")
    who = f"{labels.get('io.kubernetes.pod.namespace', 'default')}/{pod}" if pod else port.owner.key()
    return f"{port.network} {who}"[:255]


def _link_scope(address: str) -> int | None:
    return 253 if ":" not in address else None  # RT_SCOPE_LINK; IPv6 has none


def _adopted_way(port: Port, address: str, sources: tuple[str, ...]) -> AddWay:
    source = next((s for s in sources if (":" in s) == (":" in address)), "")
    return AddWay(rep=port.rep_name, address=address, mac=port.mac, source=source)


def guarded(port: Port) -> tuple[Operation, ...]:
    """The port's entry, and both programs on its representor."""
    rep, lent = port.rep_name, port.adopted is not None
    return (
        entry(port),
        AttachProgram(rep=rep, port_id=port.port_id, direction="ingress", how=port.attach, lent=lent),
        AttachProgram(rep=rep, port_id=port.port_id, direction="egress", how=port.attach, lent=lent),
    )


def _reachable(port: Port, *, again: bool = False) -> tuple[Operation, ...]:
    if port.admin == "down":  # the kernel takes no routes over a device that is down
        return (targets(port),)
    if port.adopted:  # in use since long
        return (*reach(port, again=again), targets(port))
    return (*reach(port, again=again), AwaitLink(rep=port.rep_name), targets(port))


def _up(port: Port) -> tuple[Operation, ...]:
    """The representor first.

    The end that is opened last sends at once, the other one only after the kernel's link watch has seen
    its carrier (net/core/link_watch.c), and loses what comes before.
    """
    return () if port.admin == "down" else (SetLink(where="host", name=port.rep_name, up=True),)


def _loopback(port: Port, *, again: bool = False) -> list[Operation]:
    """What the representor needs for published ports on the host's own loopback."""
    access = loopback_access(port.rep_name, port.port_mappings, port.addresses)
    ops: list[Operation] = [SetSysctl(where="host", path=path, value=value) for path, value in access.sysctls]
    for dst, table, metric in access.local_routes:
        route = Route(dst=dst, table=_TABLES[table], priority=metric)
        ops.append(AddRoute(where="host", dev=port.rep_name, route=route, kind="local", shared=again))
    return ops


def _sandbox(port: Port) -> list[Operation]:
    name = port.ifname
    ops: list[Operation] = [
        AddAddress(name=name, address=host_prefix(address.address)) for address in port.addresses
    ]
    ops.append(SetLink(where="sandbox", name=name, up=True))
    gateways = list(dict.fromkeys(a.gateway for a in port.addresses))
    for gateway in gateways:
        if not gateway.startswith("fe80:"):
            route = Route(dst=host_prefix(gateway), scope=_link_scope(gateway))
            ops.append(AddRoute(where="sandbox", dev=name, route=route, shared=True))
    first = {ipaddress.ip_address(g).version: g for g in reversed(gateways)}
    for route in port.routes:
        version = ipaddress.ip_network(route.dst, strict=False).version
        gw = route.gw or (first.get(version) if route.scope != 253 else None)
        ops.append(
            AddRoute(
                where="sandbox",
                dev=name,
                route=Route(
                    dst=route.dst,
                    gw=gw,
                    mtu=route.mtu,
                    advmss=route.advmss,
                    priority=route.priority,
                    table=route.table,
                    scope=route.scope,
                ),
                # The route to the gateway may be another port's; a link-local one needs none.
                onlink=gw is not None and not gw.startswith("fe80:"),
            )
        )
    return ops
