"""Host endpoints in the matrix: who reaches the host, whom it reaches, and what is routed by its interfaces.

Each endpoint of the manifests is judged as on the node that the pods are on. Between pods and the host no
endpoint is asked, as their packets pass no interface of the host's but the pods' own: the pod's policies
decide alone, and what the node sends to its pods passes.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from portwright.model.errors import InvalidInput
from portwright.policy.engine import Engine
from portwright.policy.host import whatif
from portwright.policy.host.rulings import Rulings, Way, described
from portwright.policy.host.whatif import Comparison, Party
from portwright.policy.matching import in_nets
from portwright.policy.matrix import PLACEHOLDERS, PROTOCOLS, Cell, addressed, deciding, pods_of, services_of
from portwright.policy.parties import ANY_OTHER, State
from portwright.policy.rules import (
    PORT_PROTOCOLS,
    Endpoint,
    EndpointKind,
    Flow,
    PolicySet,
    Rule,
    Snapshot,
)
from portwright.policy.services import EPHEMERAL

_LOCAL_NODE = "ingress local-node"
#: Who stands for any other address, the first that is one: of RFC 5737, 3849 and 2544, and of the world's.
_ELSEWHERE = {
    4: ("203.0.113.77", "198.51.100.77", "192.0.2.77", "198.18.0.77", "9.9.9.77"),
    6: ("2001:db8:ffff::77", "2001:db8::77", "2001:2::77", "2620:fe::77"),
}


class Question(NamedTuple):
    """A cell before it is judged: the host endpoint that is asked, or none, and which way the packet goes.

    ``way`` None: between a pod and the host, where it is not asked.
    """

    source: str
    target: str
    flow: Flow
    endpoint: Endpoint
    way: Way | None

    @property
    def via(self) -> str:
        """The endpoint that routes it."""
        return f"host/{self.endpoint.name}" if self.way in {Way.ROUTED_IN, Way.ROUTED_OUT} else ""


def host_cells(policies: PolicySet, snapshot: Snapshot) -> tuple[Cell, ...]:
    """The cells of all host endpoints, in the order of :func:`host_questions`. Raises as compile_policies."""
    world = addressed(snapshot)
    asked = list(host_questions(policies, world))
    if not asked:
        return ()
    engine, rulings = Engine(policies, world), Rulings(policies, world)
    return tuple(_cell(each, engine, rulings) for each in asked)


def host_questions(policies: PolicySet, world: Snapshot) -> Iterator[Question]:
    """By endpoint: from outside to the host and back, from pods to it and back, and what it routes.

    For each port that a HostEndpoint declares or a rule of a policy that selects it names alone, and for
    those of pods. Raises InvalidInput for an endpoint whose rules name too many nets.
    """
    ends = sorted((e for e in world.endpoints if e.kind is EndpointKind.HOST), key=lambda e: e.name)
    if not ends:
        return
    state = State(policies, world)
    places, rulings, pods = Comparison(state, state), Rulings(policies, world), pods_of(world)
    for end in ends:
        name = f"host/{end.name}"
        outside = _outside(places, Party(name, end, end))
        mine = _services(rulings, end, Way.RECEIVED)
        for service in sorted({*mine, *((p.protocol, p.port) for p in end.named_ports)}):
            yield from _each(outside, [(name, own_addresses(end))], service, end, Way.RECEIVED)
            if end.addresses:
                those = [(pod.title, pod.addresses) for pod in pods]
                yield from _each(those, [(name, end.addresses)], service, end, None)
        for service in _services(rulings, end, Way.SENT):
            yield from _each([(name, own_addresses(end))], outside, service, end, Way.SENT)
        for pod in pods:
            to = [(pod.title, pod.addresses)]
            for service in services_of(pod):
                yield from _each([(name, own_addresses(end))], to, service, end, None)
                if rulings.governs(end, Way.ROUTED_IN):
                    yield from _each(outside, to, service, end, Way.ROUTED_IN)
            if rulings.governs(end, Way.ROUTED_OUT):
                for service in _services(rulings, end, Way.ROUTED_OUT):
                    yield from _each(to, outside, service, end, Way.ROUTED_OUT)
        if not places.counted:
            why = "there are more than a matrix shows; policy apply --dry-run says what changes"
            raise InvalidInput(f"HostEndpoint {end.name}: nets of its rules", whatif.MOST_PLACES, why)


def _cell(asked: Question, engine: Engine, rulings: Rulings) -> Cell:
    told: list[tuple[bool, str]] = []
    if asked.way is None and asked.source == f"host/{asked.endpoint.name}":
        told = [(True, _LOCAL_NODE)]
    elif asked.way in {None, Way.ROUTED_IN, Way.ROUTED_OUT}:
        found = engine.connect(asked.flow)
        told = [(found.allowed, deciding(found))]
    if asked.way is not None:
        ruling = rulings.ruling(asked.endpoint, asked.way, asked.flow)
        direction = asked.way.direction
        told.append((ruling.allowed, described(ruling, direction) or f"{direction} no-policy"))
    allowed = all(passes for passes, _ in told)
    return Cell(
        source=asked.source,
        target=asked.target,
        protocol=PROTOCOLS[asked.flow.protocol],
        port=asked.flow.port or 0,
        allowed=allowed,
        rule="; ".join(text for passes, text in told if allowed or not passes),
        via=asked.via,
    )


def _each(
    sources: Sequence[tuple[str, Sequence[str]]],
    targets: Sequence[tuple[str, Sequence[str]]],
    service: tuple[int, int],
    end: Endpoint,
    way: Way | None,
) -> Iterator[Question]:
    """Of each to each, in IPv4 where both have it."""
    for target, there in targets:
        for source, here in sources:
            for version in (4, 6):
                near, far = (
                    [a for a in addresses if ipaddress.ip_address(a).version == version]
                    for addresses in (here, there)
                )
                if near and far:
                    flow = Flow(
                        source=near[0],
                        destination=far[0],
                        protocol=service[0],
                        source_port=EPHEMERAL,
                        port=service[1],
                    )
                    yield Question(source, target, flow, end, way)
                    break


def _outside(places: Comparison, party: Party) -> list[tuple[str, list[str]]]:
    """What the endpoint's rules tell apart outside, and all the rest: names, each with an address."""
    found: dict[str, list[str]] = {}
    for version, plausible in _ELSEWHERE.items():
        world = places.world(party, version)
        known = {place.address for place in world}
        nets = [place.net for place in world if place.net and place.name != ANY_OTHER]
        for place in world:
            address = place.address
            if place.name == ANY_OTHER:
                rest = (a for a in plausible if a not in known and not in_nets(a, nets))
                address = next(rest, address)
            if not place.workload:
                found.setdefault(place.name, []).append(address)
    return list(found.items())


def own_addresses(end: Endpoint) -> tuple[str, ...]:
    """Its addresses, or some that are nobody's, no pod's either."""
    return end.addresses or tuple(str(net[1 << 24]) for net in PLACEHOLDERS)


def _services(rulings: Rulings, end: Endpoint, way: Way) -> list[tuple[int, int]]:
    """(protocol, port) of each port that a rule of the endpoint's policies names alone, in that direction."""
    rules: list[Rule] = [
        rule for policy in rulings.policies(end, (way,)) for rule in policy.rules(way.direction) or ()
    ]
    found = {
        (protocol, ports.first)
        for rule in rules
        for traffic in (*(rule.traffic or ()), *rule.not_traffic)
        for protocol in ({traffic.protocol} if traffic.protocol is not None else PORT_PROTOCOLS)
        if protocol in PORT_PROTOCOLS
        for ports in traffic.ports
        if ports.first == ports.last
    }
    return sorted(found)
