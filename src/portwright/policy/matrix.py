"""Who may reach whom on which port, and by which rule: all pairs of the pods that manifests describe."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

import msgspec

from portwright.policy.engine import Connection, Decision, Engine
from portwright.policy.rules import SCTP, TCP, UDP, Endpoint, EndpointKind, Flow, PolicySet, Snapshot
from portwright.policy.services import EPHEMERAL

PROTOCOLS = {TCP: "TCP", UDP: "UDP", SCTP: "SCTP"}
#: Addresses of pods whose manifest gives none: of RFC 6666 and RFC 1112, 4, which no rule names by accident.
PLACEHOLDERS = (ipaddress.ip_network("100::/64"), ipaddress.ip_network("240.0.0.0/4"))


class Cell(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One pair and port. ``rule``: what decided, the denying side's where there is one.

    ``source`` and ``target`` are ``namespace/name``; in JSON they are called ``from`` and ``to``. The host is
    ``host/`` and its endpoint's name, outside is a net, less smaller ones, or "any other address". ``via``:
    the host endpoint by whose interface it is routed.
    """

    source: str = msgspec.field(name="from")
    target: str = msgspec.field(name="to")
    protocol: str
    port: int
    allowed: bool
    rule: str
    via: str = ""


def matrix(policies: PolicySet, snapshot: Snapshot) -> tuple[Cell, ...]:
    """A cell for every two pods and every port that the second's containers declare, itself included.

    Ordered by target, protocol and port, then source. A pod without an address gets one of each family, which
    is nobody's; a pair without a family in common has no cells.
    """
    world = addressed(snapshot)
    engine = Engine(policies, world)
    return tuple(_cell(engine, source, target, flow) for source, target, flow in questions(world))


def pods_of(world: Snapshot) -> list[Endpoint]:
    """The pods that the matrix is of, in its order: those with an address of their own."""
    return sorted(
        (e for e in world.endpoints if e.kind is EndpointKind.WORKLOAD and not e.host_network),
        key=lambda pod: (pod.namespace, pod.name),
    )


def services_of(pod: Endpoint) -> list[tuple[int, int]]:
    """(protocol, port) of each port that the pod's containers declare, in order."""
    return sorted({*((p.protocol, p.port) for p in pod.named_ports), *pod.unnamed_ports})


def questions(world: Snapshot) -> Iterator[tuple[Endpoint, Endpoint, Flow]]:
    """(sender, receiver, flow) of each cell, in the order of the cells. All pods have addresses."""
    pods = pods_of(world)
    for target in pods:
        for protocol, port in services_of(target):
            for source in pods:
                pair = _family(source, target)
                if pair is None:
                    continue
                near, far = pair
                yield (
                    source,
                    target,
                    Flow(source=near, destination=far, protocol=protocol, source_port=EPHEMERAL, port=port),
                )


def _cell(engine: Engine, source: Endpoint, target: Endpoint, flow: Flow) -> Cell:
    found = engine.connect(flow)
    return Cell(
        source=source.title,
        target=target.title,
        protocol=PROTOCOLS[flow.protocol],
        port=flow.port or 0,
        allowed=found.allowed,
        rule=deciding(found),
    )


def addressed(snapshot: Snapshot) -> Snapshot:
    """The same world, in which a pod whose manifest gives no address has one of each family."""
    endpoints: list[Endpoint] = []
    for number, endpoint in enumerate(snapshot.endpoints, 1):
        lacks = endpoint.kind is EndpointKind.WORKLOAD and not endpoint.addresses
        placeholder = tuple(str(net[number]) for net in PLACEHOLDERS)
        endpoints.append(msgspec.structs.replace(endpoint, addresses=placeholder) if lacks else endpoint)
    return msgspec.structs.replace(snapshot, endpoints=tuple(endpoints))


def _family(source: Endpoint, target: Endpoint) -> tuple[str, str] | None:
    for version in (4, 6):
        near = [a for a in source.addresses if ipaddress.ip_address(a).version == version]
        far = [a for a in target.addresses if ipaddress.ip_address(a).version == version]
        if near and far:
            return near[0], far[0]
    return None


def deciding(found: Connection) -> str:
    """What decided: the sides that deny, else those that there are."""
    sides = [side for side in (found.egress, found.ingress) if side is not None]
    denied = [side for side in sides if not side.allowed]
    return "; ".join(_title(side) for side in denied or sides)


def _title(side: Decision) -> str:
    if side.policy is not None and side.index is not None:
        where = f" {side.rule.where}" if side.rule is not None and str(side.rule.where) else ""
        return f"{side.direction} {side.policy.title} rule {side.index + 1}{where}"
    tier = f" of {side.tier.name}" if side.tier is not None else ""
    return f"{side.direction} {side.implicit}{tier}"
