"""Rules as one address of an endpoint has them: what they say of the own side is decided here.

``Rule.local``, ingress rules by a port's name (the destination is the endpoint itself), the IP version, and
nets of the other family are true or false once the own address is known. What is left of a rule are *terms*,
peers that addresses of the other side are or are not, each with the services that the rule means for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

from portwright.model.errors import InvalidInput
from portwright.policy.classes import Places, narrow
from portwright.policy.ranges import EMPTY, Ranges, contains, subtract, union
from portwright.policy.rules import PORT_PROTOCOLS, Action, Direction, NamedPort, Peer, Policy, Rule, Traffic
from portwright.policy.services import ALL_SERVICES, traffic_services

#: A peer (None: anybody) that must be true of an address, and a named port that its endpoint must have.
Term: TypeAlias = tuple[Peer | None, NamedPort | None]
_Asked: TypeAlias = tuple[tuple[Traffic, ...], Direction, int, tuple[NamedPort, ...]]
_Services: TypeAlias = tuple[Ranges, dict[NamedPort, Ranges]]
#: The number of the term that is true of every address.
ANYBODY = 0


class Resolved(NamedTuple):
    """A rule for one own address: matches where one of ``alternatives`` does and none of ``exceptions``.

    Each is (term's number, services). ``rule`` is the rule's number.
    """

    rule: int
    action: Action
    alternatives: tuple[tuple[int, Ranges], ...]
    exceptions: tuple[tuple[int, Ranges], ...] = ()


class Traits(NamedTuple):
    """What a policy's rules of one direction ask about the own side, and whether the IP version matters.

    ``others_ports``: they ask for ports by names that the other side gives them.
    """

    versions: bool
    locals: tuple[Peer, ...]
    names: tuple[str, ...]
    others_ports: bool

    @classmethod
    def of_all(cls, traits: Iterable[Traits]) -> Traits:
        """What several policies ask together."""
        every = list(traits)
        return cls(
            any(each.versions for each in every),
            tuple(dict.fromkeys(peer for each in every for peer in each.locals)),
            tuple(dict.fromkeys(name for each in every for name in each.names)),
            any(each.others_ports for each in every),
        )


class Own(NamedTuple):
    """The own address, as far as a policy's traits ask: equal values resolve a policy equally."""

    version: int
    locals: tuple[bool, ...]
    ports: tuple[NamedPort, ...]


def traits_of(policy: Policy, direction: Direction) -> Traits:
    """The traits of a policy; raises InvalidInput for source ports, of which a table has no room to ask."""
    versions = False
    local: dict[Peer, None] = {}
    names: dict[str, None] = {}
    others_ports = False
    for index, rule in enumerate(policy.rules(direction) or ()):
        if rule.local is not None:
            local[rule.local] = None
        for peer in rule.peers or ():
            versions = versions or peer.nets is not None or bool(peer.not_nets)
        for traffic in (*(rule.traffic or ()), *rule.not_traffic):
            versions = versions or traffic.ip_version is not None
            if traffic.source_ports or traffic.source_names:
                raise _no_source_ports(policy, direction, index, rule, traffic)
            if direction is Direction.INGRESS:
                names.update(dict.fromkeys(traffic.names))
            elif traffic.names:
                others_ports = True
    return Traits(versions, tuple(local), tuple(names), others_ports)


def own_of(traits: Traits, places: Places, place: int, ports: tuple[NamedPort, ...]) -> Own:
    """What ``traits`` ask of the address at ``place``, whose endpoints have these named ports."""
    return Own(
        places.version(place) if traits.versions else 0,
        tuple(contains(places.extent(peer), place) for peer in traits.locals),
        tuple(sorted({p for p in ports if p.name in traits.names}, key=_port_key)) if traits.names else (),
    )


class Resolution(NamedTuple):
    """A policy's rules of one direction for one own address; the indexes of these rules, and all their terms.

    ``lasting``: it is the same in every snapshot.
    """

    rules: tuple[Resolved, ...]
    indexes: tuple[int, ...]
    terms: tuple[Term, ...]
    lasting: bool


class Resolver:
    """Resolves policies against one snapshot; ``rule_number`` and ``term_number`` number what they get."""

    def __init__(
        self,
        places: Places,
        rule_number: Callable[[Policy, Direction, int], int],
        term_number: Callable[[Term], int],
    ) -> None:
        self._places = places
        self._rule_number = rule_number
        self._term_number = term_number
        self._known: dict[_Asked, _Services] = {}
        self._terms: dict[Term, None] = {}

    def resolve(self, policy: Policy, direction: Direction, traits: Traits, own: Own) -> Resolution:
        """The policy's rules of that direction for one own address, without those that can match nothing."""
        local = dict(zip(traits.locals, own.locals, strict=True))
        out: list[Resolved] = []
        indexes: list[int] = []
        self._terms = {}
        for index, rule in enumerate(policy.rules(direction) or ()):
            if rule.local is not None and not local[rule.local]:
                continue
            alternatives, exceptions = self._matches(rule, direction, own)
            if alternatives:
                number = self._rule_number(policy, direction, index)
                out.append(Resolved(number, rule.action, alternatives, exceptions))
                indexes.append(index)
        return Resolution(tuple(out), tuple(indexes), tuple(self._terms), not traits.others_ports)

    def again(self, found: Resolution, policy: Policy, direction: Direction) -> None:
        """Has the numbers of an earlier snapshot's resolution kept, which is this one's too."""
        for index in found.indexes:
            self._rule_number(policy, direction, index)
        for term in found.terms:
            self._term_number(term)

    def _matches(
        self, rule: Rule, direction: Direction, own: Own
    ) -> tuple[tuple[tuple[int, Ranges], ...], tuple[tuple[int, Ranges], ...]]:
        peers = self._peers(rule, own.version)
        if not peers:
            return (), ()
        common, by_port = self._services(rule.traffic, direction, own)
        without, without_by_port = self._services(rule.not_traffic, direction, own)
        found: dict[int, Ranges] = {}
        for peer in peers:
            for port, services in ((None, common), *by_port.items()):
                left = subtract(services, without)
                if left:
                    number = self._number(peer, port)
                    more = found.get(number)
                    found[number] = union((*more, *left)) if more else left
        exceptions = {self._number(None, port): services for port, services in without_by_port.items()}
        return tuple(found.items()), tuple(exceptions.items()) if found else ()

    def _number(self, peer: Peer | None, port: NamedPort | None) -> int:
        if peer is None and port is None:
            return ANYBODY
        self._terms[peer, port] = None
        return self._term_number((peer, port))

    def _peers(self, rule: Rule, version: int) -> list[Peer | None]:
        if rule.peers is None:
            return [None]
        found: dict[Peer, None] = {}
        for peer in rule.peers:
            left = narrow(peer, version) if version else peer
            if left == Peer():
                return [None]
            if left is not None:
                found[left] = None
        return list(found)

    def _services(self, traffic: tuple[Traffic, ...] | None, direction: Direction, own: Own) -> _Services:
        """The services for every peer, and those for peers that have a named port."""
        if traffic is None:
            return ALL_SERVICES, {}
        if not traffic:
            return EMPTY, {}
        key = (traffic, direction, own.version, own.ports)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._compute_services(traffic, direction, own)
        return known

    def _compute_services(self, traffic: tuple[Traffic, ...], direction: Direction, own: Own) -> _Services:
        own_ports = own.ports if direction is Direction.INGRESS else ()

        def of_own(name: str, protocol: int) -> tuple[int, ...]:
            return tuple(p.port for p in own_ports if (p.name, p.protocol) == (name, protocol))

        common: list[tuple[int, int]] = []
        by_port: dict[NamedPort, Ranges] = {}
        for each in traffic:
            if each.ip_version not in {None, own.version}:
                continue
            common += traffic_services(each, of_own)
            if direction is Direction.EGRESS:
                for port in self._ports_called(each):
                    services = traffic_services(_only_named(each, port.name), _calls(port))
                    by_port[port] = union((*by_port.get(port, EMPTY), *services))
        return union(common), by_port

    def _ports_called(self, traffic: Traffic) -> list[NamedPort]:
        protocols = PORT_PROTOCOLS if traffic.protocol is None else PORT_PROTOCOLS & {traffic.protocol}
        return [
            NamedPort(name, protocol, port)
            for name in traffic.names
            for protocol in sorted(protocols)
            for port in sorted(self._places.named(name, protocol))
        ]


def _calls(port: NamedPort) -> Callable[[str, int], tuple[int, ...]]:
    return lambda name, protocol: (port.port,) if (name, protocol) == (port.name, port.protocol) else ()


def _only_named(traffic: Traffic, name: str) -> Traffic:
    return Traffic(
        protocol=traffic.protocol,
        names=(name,),
        icmp_type=traffic.icmp_type,
        icmp_code=traffic.icmp_code,
    )


def _port_key(port: NamedPort) -> tuple[str, int, int]:
    return port.name, port.protocol, port.port


def _no_source_ports(
    policy: Policy, direction: Direction, index: int, rule: Rule, traffic: Traffic
) -> InvalidInput:
    path = rule.where.path or f"{direction}[{index}]"
    ranges = [f"{r.first}" if r.first == r.last else f"{r.first}:{r.last}" for r in traffic.source_ports]
    return InvalidInput(
        f"{policy.kind} {policy.title}: {path}.source.ports",
        ", ".join([*ranges, *traffic.source_names]),
        "a workload's policy can't ask for source ports; the sender chooses them, so remove the field or "
        "select the sender",
    )
