"""Rules as one address of an endpoint has them: what they say of the own side is decided here.

``Rule.local``, ingress rules by a port's name (the destination is the endpoint itself), the IP version, and
nets of the other family are true or false once the own address is known. What is left of a rule are *terms*,
peers that addresses of the other side are or are not, each with the services that the rule means for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

from portwright.policy.classes import Places, narrow
from portwright.policy.ranges import EMPTY, Ranges, contains, subtract, union
from portwright.policy.rules import PORT_PROTOCOLS, Action, Direction, NamedPort, Peer, Policy, Rule, Traffic
from portwright.policy.services import ALL_SERVICES, traffic_services

#: A peer (None: anybody) that must be true of an address, and a named port that its endpoint must have.
Term: TypeAlias = tuple[Peer | None, NamedPort | None]
_Asked: TypeAlias = tuple[tuple[Traffic, ...], Direction, int, tuple[NamedPort, ...]]

#: The services for peers that have this named port (None: for all), from these sources (None: from all).
_Matched: TypeAlias = tuple[NamedPort | None, Ranges, Ranges | None]
_Part: TypeAlias = tuple[int, Ranges]
_SourcedPart: TypeAlias = tuple[int, Ranges, Ranges]
#: What a Resolved matches.
_Matches: TypeAlias = tuple[
    tuple[_Part, ...], tuple[_Part, ...], tuple[_SourcedPart, ...], tuple[_SourcedPart, ...]
]
#: The number of the term that is true of every address.
ANYBODY = 0


class Resolved(NamedTuple):
    """A rule for one own address: matches where one of ``alternatives`` does and none of ``exceptions``.

    Each is (term's number, services). ``rule`` is the rule's number. ``sourced`` and ``sourced_exceptions``
    are more of them that hold for some source ports alone: (term's number, services, sources).
    """

    rule: int
    action: Action
    alternatives: tuple[_Part, ...]
    exceptions: tuple[_Part, ...] = ()
    sourced: tuple[_SourcedPart, ...] = ()
    sourced_exceptions: tuple[_SourcedPart, ...] = ()


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
    """The traits of a policy."""
    versions = False
    local: dict[Peer, None] = {}
    names: dict[str, None] = {}
    others_ports = False
    for rule in policy.rules(direction) or ():
        if rule.local is not None:
            local[rule.local] = None
        for peer in rule.peers or ():
            versions = versions or peer.nets is not None or bool(peer.not_nets)
        for traffic in (*(rule.traffic or ()), *rule.not_traffic):
            versions = versions or traffic.ip_version is not None
            own, others = traffic.names, traffic.source_names
            if direction is Direction.EGRESS:
                own, others = others, own
            names.update(dict.fromkeys(own))
            others_ports = others_ports or bool(others)
    return Traits(versions, tuple(local), tuple(names), others_ports)


#: Of policies that ask for the IP version alone, or for nothing (0): most of them.
_PLAIN = {version: Own(version, (), ()) for version in (0, 4, 6)}


def own_of(traits: Traits, places: Places, place: int, ports: tuple[NamedPort, ...]) -> Own:
    """What ``traits`` ask of the address at ``place``, whose endpoints have these named ports."""
    version = places.version(place) if traits.versions else 0
    if not traits.locals and not traits.names:
        return _PLAIN[version]
    return Own(
        version,
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
        self._known: dict[_Asked, tuple[_Matched, ...]] = {}
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
            matches = self._matches(rule, direction, own)
            if matches is not None:
                out.append(Resolved(self._rule_number(policy, direction, index), rule.action, *matches))
                indexes.append(index)
        return Resolution(tuple(out), tuple(indexes), tuple(self._terms), not traits.others_ports)

    def _matches(self, rule: Rule, direction: Direction, own: Own) -> _Matches | None:
        found = self._services(rule.traffic, direction, own)
        without = self._services(rule.not_traffic, direction, own)
        never = next((services for port, services, sources in without if port is None is sources), EMPTY)
        alternatives: dict[int, Ranges] = {}
        sourced: dict[tuple[int, Ranges], Ranges] = {}
        for peer in self._peers(rule, own.version):
            for port, services, sources in found:
                left = subtract(services, never)
                if not left:
                    continue
                number = self._number(peer, port)
                if sources is None:
                    alternatives[number] = union((*alternatives.get(number, EMPTY), *left))
                else:
                    sourced[number, sources] = union((*sourced.get((number, sources), EMPTY), *left))
        if not alternatives and not sourced:
            return None
        exceptions: list[_Part] = []
        sourced_exceptions: list[_SourcedPart] = []
        for port, services, sources in without:
            if sources is not None:
                sourced_exceptions.append((self._number(None, port), services, sources))
            elif port is not None:
                exceptions.append((self._number(None, port), services))
        return (
            tuple(alternatives.items()),
            tuple(exceptions),
            tuple((number, services, sources) for (number, sources), services in sourced.items()),
            tuple(sourced_exceptions),
        )

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

    def _services(
        self, traffic: tuple[Traffic, ...] | None, direction: Direction, own: Own
    ) -> tuple[_Matched, ...]:
        if traffic is None:
            return ((None, ALL_SERVICES, None),)
        key = (traffic, direction, own.version, own.ports)
        known = self._known.get(key)
        if known is None:
            found: dict[tuple[NamedPort | None, Ranges | None], Ranges] = {}
            for each in traffic:
                if each.ip_version in {None, own.version}:
                    for port, services, sources in self._matched(each, direction, own.ports):
                        found[port, sources] = union((*found.get((port, sources), EMPTY), *services))
            known = self._known[key] = tuple(
                (port, services, sources)
                for (port, sources), services in found.items()
                if services and sources != EMPTY
            )
        return known

    def _matched(
        self, traffic: Traffic, direction: Direction, own_ports: tuple[NamedPort, ...]
    ) -> Iterator[_Matched]:
        """The destination's ports and the source's: the names of one side are the own, of one the peer's."""
        own_calls = _calls(own_ports)
        of_source = Traffic(protocol=traffic.protocol, ports=traffic.source_ports, names=traffic.source_names)
        is_sourced = bool(traffic.source_ports or traffic.source_names)
        if direction is Direction.INGRESS:
            services = traffic_services(traffic, own_calls)
            if not is_sourced:
                yield None, services, None
                return
            yield None, services, traffic_services(of_source, _calls(()))
            for port in self._ports_called(traffic.protocol, traffic.source_names):
                yield port, services, traffic_services(_only_named(of_source, port.name), _calls((port,)))
            return
        sources = traffic_services(of_source, own_calls) if is_sourced else None
        yield None, traffic_services(traffic, _calls(())), sources
        for port in self._ports_called(traffic.protocol, traffic.names):
            yield port, traffic_services(_only_named(traffic, port.name), _calls((port,))), sources

    def _ports_called(self, protocol: int | None, names: tuple[str, ...]) -> list[NamedPort]:
        protocols = PORT_PROTOCOLS if protocol is None else PORT_PROTOCOLS & {protocol}
        return [
            NamedPort(name, protocol, port)
            for name in names
            for protocol in sorted(protocols)
            for port in sorted(self._places.named(name, protocol))
        ]


def _calls(ports: tuple[NamedPort, ...]) -> Callable[[str, int], tuple[int, ...]]:
    return lambda name, protocol: tuple(p.port for p in ports if (p.name, p.protocol) == (name, protocol))


def _only_named(traffic: Traffic, name: str) -> Traffic:
    return Traffic(
        protocol=traffic.protocol,
        names=(name,),
        icmp_type=traffic.icmp_type,
        icmp_code=traffic.icmp_code,
    )


def _port_key(port: NamedPort) -> tuple[str, int, int]:
    return port.name, port.protocol, port.port
