"""What host endpoints say of a pair, service by service: rows of rulings, over all services.

A row is of one endpoint, or of an interface that is none, and of the first packets of one way: of what local
processes receive or send, or of what is routed on, in by the interface or out by it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple, TypeAlias

from msgspec.structs import replace

from portwright.policy.host.judge import Judge, Ruling
from portwright.policy.host.stages import FAILSAFE_IN, FAILSAFE_OUT, ON_LINK, Stage
from portwright.policy.matching import named_ports, peer_matches
from portwright.policy.rules import (
    ICMP6,
    PORT_PROTOCOLS,
    Direction,
    Endpoint,
    Flow,
    Peer,
    Policy,
    PolicySet,
    Rule,
    Snapshot,
)
from portwright.policy.services import BLOCKS, EPHEMERAL, FIRST_PACKETS, OTHER_BLOCK, traffic_services

#: (first service, allowed, what decided) of each stretch of services, ascending from 0.
HostRow: TypeAlias = tuple[tuple[int, bool, str], ...]
#: Of an interface that is no host endpoint.
UNBOUND: Final[HostRow] = ((0, True, "no host endpoint"),)
UNBOUND_ROUTED: Final[HostRow] = ((0, True, ""),)
#: What an address is to an endpoint's rules, as a number: two that have the same are treated alike.
Sort: TypeAlias = int

_PROTOCOL_OF = {block: protocol for protocol, block in BLOCKS.items()}


class Published(NamedTuple):
    """A service of a port's address that the host has as one of its own, at one address or ('') at all."""

    address: str
    service: int
    host_address: str
    host_service: int


class Way(enum.Enum):
    """A packet's, as the endpoint's interface sees it."""

    RECEIVED = "received"
    SENT = "sent"
    ROUTED_IN = "routed in"
    ROUTED_OUT = "routed out"

    @property
    def direction(self) -> Direction:
        """The policies' word for it."""
        return Direction.INGRESS if self in {Way.RECEIVED, Way.ROUTED_IN} else Direction.EGRESS

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those that have a say."""
        last = Stage.LOCAL if self in {Way.RECEIVED, Way.SENT} else Stage.FORWARD
        early = {
            Way.RECEIVED: (Stage.UNTRACKED, Stage.PRE_DNAT),
            Way.SENT: (Stage.UNTRACKED,),
            Way.ROUTED_IN: (Stage.UNTRACKED, Stage.PRE_DNAT),
        }
        return (*early.get(self, ()), last)


class Rulings:
    """Policies and a world, asked for rows. ``asked``: how many packets were judged for them."""

    def __init__(self, policies: PolicySet, snapshot: Snapshot) -> None:
        """Raises as Engine."""
        self.judge = Judge(policies, snapshot)
        self._snapshot = snapshot
        self._rows: dict[tuple[str, Way, Sort, Sort, int], HostRow] = {}
        self._cuts: dict[tuple[str, Way], tuple[int, ...]] = {}
        self._peers: dict[str, tuple[Peer, ...]] = {}
        self._sorts: dict[tuple[object, ...], Sort] = {}
        self.asked = 0

    def governs(self, endpoint: Endpoint, way: Way) -> bool:
        """Whether it has a say: of what is routed only where a policy selects it."""
        if way in {Way.RECEIVED, Way.SENT}:
            return True
        return any(self.judge.selecting(stage, endpoint, way.direction) for stage in way.stages)

    def policies(self, endpoint: Endpoint, ways: Iterable[Way] = Way) -> tuple[Policy, ...]:
        """All that select it for one of these ways."""
        found = {
            (policy.kind, policy.title): policy
            for way in ways
            for stage in way.stages
            for _, those in self.judge.selecting(stage, endpoint, way.direction)
            for policy in those
        }
        return tuple(found.values())

    def rules(self, endpoint: Endpoint, ways: Iterable[Way] = Way) -> Iterator[Rule]:
        """The rules of these policies, in both directions."""
        for policy in self.policies(endpoint, ways):
            for direction in Direction:
                yield from policy.rules(direction) or ()

    def peers(self, endpoint: Endpoint) -> tuple[Peer, ...]:
        """All that its rules ask of an address, either side's."""
        known = self._peers.get(endpoint.name)
        if known is None:
            asked: list[Peer] = []
            for rule in self.rules(endpoint):
                asked += rule.peers or ()
                asked += (rule.local,) if rule.local is not None else ()
            known = self._peers[endpoint.name] = tuple({id(p): p for p in asked}.values())
        return known

    def sort(self, endpoint: Endpoint, address: str) -> Sort:
        """What the address is to the endpoint's rules."""
        world = self.judge.world
        told = tuple(peer_matches(peer, address, world) for peer in self.peers(endpoint))
        names = {(p.name, p.protocol, p.port) for end in world.at(address) for p in end.named_ports}
        return self._sorts.setdefault((endpoint.name, *told, *sorted(names)), len(self._sorts) + 1)

    def row(
        self, endpoint: Endpoint | None, way: Way, source: tuple[str, Sort], target: tuple[str, Sort]
    ) -> HostRow:
        """What it says of packets from an address to another, each with its sort."""
        if endpoint is None:
            return UNBOUND_ROUTED if way in {Way.ROUTED_IN, Way.ROUTED_OUT} else UNBOUND
        version = 6 if ":" in source[0] else 4
        key = (endpoint.name, way, source[1], target[1], version)
        known = self._rows.get(key)
        if known is None:
            known = self._rows[key] = tuple(self._stretches(endpoint, way, source[0], target[0]))
        return known

    def _stretches(
        self, endpoint: Endpoint, way: Way, source: str, target: str
    ) -> Iterator[tuple[int, bool, str]]:
        last: tuple[bool, str] | None = None
        for start in self._starts(endpoint, way):
            ruling = self.ruling(endpoint, way, flow_of(source, target, start))
            self.asked += 1
            told = ruling.allowed, described(ruling, way.direction)
            if told != last:
                yield start, *told
            last = told

    def ruling(self, endpoint: Endpoint, way: Way, flow: Flow) -> Ruling:
        """What it says of a flow."""
        if way is Way.ROUTED_IN:
            return self.judge.forwarded(endpoint, None, flow)
        if way is Way.ROUTED_OUT:
            return self.judge.forwarded(None, endpoint, flow)
        return self.judge.local(endpoint, way.direction, flow)

    def of_published(
        self, endpoint: Endpoint | None, source: str, own: str, published: Published
    ) -> tuple[bool, str]:
        """Whether it lets a packet to what is published at its address ``own`` be routed in, and why."""
        if endpoint is None:
            return True, ""
        flow = flow_of(source, published.address, published.service)
        self.asked += 1
        asked_for = flow_of(source, own, published.host_service)
        ruling = self.judge.forwarded(endpoint, None, flow, asked_for)
        return ruling.allowed, described(ruling, Direction.INGRESS)

    def _starts(self, endpoint: Endpoint, way: Way) -> tuple[int, ...]:
        """Every service before which a verdict of it may change."""
        known = self._cuts.get((endpoint.name, way))
        if known is None:
            ranges = [_failsafes(FAILSAFE_IN), _failsafes(FAILSAFE_OUT), _ON_LINK, _BLOCKS]
            for rule in self.rules(endpoint, (way,)):
                ranges += [
                    list(traffic_services(traffic, self._numbers))
                    for traffic in (*(rule.traffic or ()), *rule.not_traffic)
                ]
            # Of a name each number for itself: whose it is, the destination says.
            ranges += [self._named(endpoint, way)]
            found = {0} | {edge for those in ranges for pair in those for edge in pair}
            known = tuple(sorted(edge for edge in found if edge < FIRST_PACKETS))
            self._cuts[endpoint.name, way] = known
        return known

    def _named(self, endpoint: Endpoint, way: Way) -> list[tuple[int, int]]:
        return [
            (block << 16 | number, (block << 16 | number) + 1)
            for rule in self.rules(endpoint, (way,))
            for traffic in (*(rule.traffic or ()), *rule.not_traffic)
            for name in traffic.names
            for protocol, block in BLOCKS.items()
            for number in self._numbers(name, protocol)
        ]

    def _numbers(self, name: str, protocol: int) -> tuple[int, ...]:
        """The numbers that anybody gives to a port's name."""
        return tuple(named_ports(self._snapshot.endpoints, (name,), protocol))


_BLOCKS = [(block << 16, (block + 1) << 16) for block in range(OTHER_BLOCK)]
_ON_LINK = [
    (BLOCKS[ICMP6] << 16 | kind << 8, BLOCKS[ICMP6] << 16 | (kind + 1) << 8)
    for kinds in ON_LINK.values()
    for kind in kinds
]


def _failsafes(ports: dict[int, tuple[int, ...]]) -> list[tuple[int, int]]:
    numbers = [BLOCKS[protocol] << 16 | port for protocol, those in ports.items() for port in those]
    return [(number, number + 1) for number in numbers]


def flow_of(source: str, destination: str, service: int) -> Flow:
    """The first packet of a connection of this service, from a port that the sender's system picked."""
    block, low = service >> 16, service & 0xFFFF
    flow = Flow(source=source, destination=destination, protocol=_PROTOCOL_OF.get(block, low))
    if block == OTHER_BLOCK:
        return flow
    if flow.protocol in PORT_PROTOCOLS:
        return replace(flow, source_port=EPHEMERAL, port=low)
    return replace(flow, icmp_type=low >> 8, icmp_code=low & 0xFF)


def described(ruling: Ruling, direction: Direction) -> str:
    """What decided, for people: ``forward ingress web rule 1 web.yaml:3``; '' where nobody had a say."""
    decision = ruling.decision
    if decision is None:
        return "" if ruling.reason == "no-policy" else f"{direction} {ruling.reason}"
    stage = f"{ruling.stage} {decision.direction}"
    if decision.policy is not None and decision.index is not None:
        where = f" {decision.rule.where}" if decision.rule is not None and str(decision.rule.where) else ""
        return f"{stage} {decision.policy.title} rule {decision.index + 1}{where}"
    if decision.tier is None:
        return f"{stage} {decision.implicit}"
    first, *more = (p for p in decision.selected_by if p.tier == decision.tier.name)
    where = f" {first.where}" if str(first.where) else ""
    others = f" and {len(more)} more" if more else ""
    return f"{stage} {decision.implicit} of {decision.tier.name}, by {first.title}{where}{others}"
