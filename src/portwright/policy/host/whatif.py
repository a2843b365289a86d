"""What changes for the host's own interfaces between two states of policy, endpoint by endpoint.

::

    outside -> host/uplink     what local processes receive by the interface
    host/uplink -> outside     what they send by it
    outside -> port, port -> outside, *via* host/uplink: what is routed on, where a policy of forwarded
                               traffic selects the endpoint: both it and the port's own policies decide

Which interface a packet takes, no policy says: so each endpoint has its own rows. Between ports and the host
no host endpoint is asked, as those packets come and go by the ports' own interfaces. Whatever an endpoint's
rules treat alike is one group; groups are compared once, service by service.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from portwright.policy.classes import ROOTS
from portwright.policy.host.places import Group, Place, grouped, names_of
from portwright.policy.host.rulings import HostRow, Published, Rulings, Way
from portwright.policy.host.stages import EVERY, Bound, bound_to
from portwright.policy.labels import matches
from portwright.policy.manifests.calico_hosts import HOST_NODE
from portwright.policy.matching import address_key, net_key
from portwright.policy.parties import ANY_OTHER, Side, State, free_places, titles_of
from portwright.policy.ranges import EMPTY, Ranges, subtract, union
from portwright.policy.rules import Direction, Endpoint, EndpointKind
from portwright.policy.services import FIRST_PACKETS, service_text
from portwright.policy.sides import Rows
from portwright.policy.tables import NO_POLICY

#: The bounds of the work: places of a family, of which each is asked by each peer of a rule; groups' pairs;
#: packets that are judged. Beyond, what is told is a part.
MOST_PLACES, MOST_SORTED, MOST_PAIRS, MOST_JUDGED = 1 << 13, 1 << 20, 1 << 18, 1 << 19

#: What decides of a connection: who allows, and by what; of each side.
_Told: TypeAlias = tuple[bool, str]


class Hosts(NamedTuple):
    """The host endpoints of this node before and after, and which of its services are published ports'."""

    before: Sequence[Bound] = ()
    after: Sequence[Bound] = ()
    published: Sequence[Published] = ()


class HostChange(NamedTuple):
    """As change.Change; ``via``: the host endpoint by whose interfaces it is routed, '' of the host's own.

    Behind it the service that it is published as, if it is.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    services: Ranges
    families: tuple[int, ...]
    allowed: bool
    before: str
    after: str
    via: str

    @property
    def pairs(self) -> int:
        """How many ordered pairs that is."""
        return len(self.sources) * len(self.targets) * len(self.families)


class Found(NamedTuple):
    """``counted``: false where there is more that nobody looked at."""

    rows: tuple[HostChange, ...]
    counted: bool


class Party(NamedTuple):
    """Interfaces that are the same host endpoint in each of the two states, or none in one of them."""

    name: str
    before: Endpoint | None
    after: Endpoint | None


class _Outcome(NamedTuple):
    allowed: bool
    before: str
    after: str
    services: Ranges


def parties(before: Sequence[Bound], after: Sequence[Bound]) -> tuple[Party, ...]:
    """Whose interfaces there are, by name."""
    names = sorted({name for bound in (*before, *after) for name in bound.interfaces})
    found: dict[tuple[str, str], tuple[Endpoint | None, Endpoint | None, list[str]]] = {}
    for name in [*names, EVERY]:
        if name == EVERY:
            old, new = (next((b.endpoint for b in those if b.every), None) for those in (before, after))
        else:
            old, new = bound_to(before, name), bound_to(after, name)
        if old is not None or new is not None:
            key = (old.name if old else "", new.name if new else "")
            found.setdefault(key, (old, new, []))[2].append(name)
    titles = [new_or_old.name for old, new, _ in found.values() if (new_or_old := new or old)]
    told = []
    for title, (old, new, interfaces) in zip(titles, found.values(), strict=True):
        more = f" ({', '.join(interfaces)})" if titles.count(title) > 1 else ""
        told.append(Party(f"host/{title}{more}", old, new))
    return tuple(sorted(told, key=lambda party: party.name))


def host_changes(before: State, after: State, hosts: Hosts) -> Found:
    """What changes for this node's own interfaces between the two states. Raises as Engine."""
    those = parties(hosts.before, hosts.after)
    if not those:
        return Found((), True)
    comparison = Comparison(before, after, hosts.published)
    rows: dict[tuple[object, ...], HostChange] = {}
    for party in those:
        for version in (4, 6):
            for row in comparison.changes(party, version):
                key = (row.sources, row.targets, row.services, row.allowed, row.before, row.after, row.via)
                same = rows.get(key)
                rows[key] = row if same is None else same._replace(families=(*same.families, version))
    return Found(tuple(rows.values()), comparison.counted)


class Comparison:
    """Two states, whose worlds every workload has its addresses in. ``counted``: as in Found, so far."""

    def __init__(self, before: State, after: State, published: Sequence[Published] = ()) -> None:
        self._states = (before, after)
        self._published = published
        self._rulings = tuple(Rulings(state.policies, state.snapshot) for state in self._states)
        self._shapes: dict[Ranges, int] = {}
        self._rows = tuple(Rows(state, self._shapes) for state in self._states)
        self._known: dict[tuple[object, ...], list[_Outcome]] = {}
        self._titles = titles_of((before.snapshot, after.snapshot))
        self.counted = True
        self._pairs = 0

    def changes(self, party: Party, version: int) -> Iterator[HostChange]:
        """The rows of one party and IP version."""
        world = self.world(party, version)
        outside = grouped((place for place in world if not place.workload), sides=False)
        own = grouped(self.own(party, version), sides=False)
        elsewhere = [(p.host_service, p.host_service + 1) for p in self._published_at(party, version)]
        for row in self._told(party, Way.RECEIVED, outside, own, version):
            if services := subtract(row.services, union(elsewhere)):
                yield row._replace(services=services)
        yield from self._told(party, Way.SENT, own, outside, version)
        governed = [way for way in (Way.ROUTED_IN, Way.ROUTED_OUT) if self._governs(party, way)]
        if governed:
            outside = grouped((place for place in world if not place.workload), sides=True)
            ports = grouped((place for place in world if place.workload), sides=True)
            for way in governed:
                ends = (outside, ports) if way is Way.ROUTED_IN else (ports, outside)
                yield from self._told(party, way, *ends, version)
        if Way.ROUTED_IN in governed:
            at = {place.address: place for place in world if place.workload}
            for each in self._published_at(party, version):
                if each.address in at:
                    yield from self._told_of_published(party, each, outside, at[each.address], version)

    def _governs(self, party: Party, way: Way) -> bool:
        return any(
            endpoint is not None and rulings.governs(endpoint, way)
            for endpoint, rulings in zip(party[1:], self._rulings, strict=True)
        )

    # -- who there is ----------------------------------------------------------------------------

    def world(self, party: Party, version: int) -> list[Place]:
        """All that is no address of the endpoint's node."""
        own = self._node_addresses(party)
        exact = {
            address
            for state in self._states
            for address in state.compiled.addresses
            if address_key(address)[0] == version
        }
        nets = {ROOTS[version], *self._nets(party)}
        nets |= {net for state in self._states for net in state.compiled.prefixes}
        places = [(address, address) for address in sorted(exact - own)]
        places += sorted(free_places((net for net in nets if net_key(net)[0] == version), exact | own))
        return self._placed(party, places, {ROOTS[version]: ANY_OTHER})

    def _node_addresses(self, party: Party) -> set[str]:
        nodes = {end.labels.get(HOST_NODE) for end in party[1:] if end is not None}
        return {
            address
            for state in self._states
            for end in state.snapshot.endpoints
            if end.kind is EndpointKind.HOST and end.labels.get(HOST_NODE) in nodes
            for address in end.addresses
        }

    def own(self, party: Party, version: int) -> list[Place]:
        """Its addresses; where it says none, the nets of which its rules ask for their own side."""
        own = {a for end in party[1:] if end is not None for a in end.addresses}
        exact = sorted(address for address in own if address_key(address)[0] == version)
        if exact:
            titles = dict.fromkeys(exact, party.name)
            return self._placed(party, [(address, address) for address in exact], titles)
        nets = {ROOTS[version], *self._nets(party, local=True)}
        free = list(free_places((net for net in nets if net_key(net)[0] == version), ()))
        titles = {net: party.name if net == ROOTS[version] else f"{party.name} ({net})" for net, _ in free}
        return self._placed(party, free, titles)

    def _nets(self, party: Party, *, local: bool = False) -> Iterator[str]:
        """What the endpoint's rules name; ``local``: of their own side alone."""
        for endpoint, rulings, state in zip(party[1:], self._rulings, self._states, strict=True):
            if endpoint is None:
                continue
            sets = [e for e in state.snapshot.endpoints if e.kind is EndpointKind.NETWORK_SET]
            for rule in rulings.rules(endpoint):
                mine = (rule.local,) if rule.local is not None else ()
                for peer in mine if local else (*mine, *(rule.peers or ())):
                    yield from (*(peer.nets or ()), *peer.not_nets)
                    for asked in (peer.selector, peer.not_selector):
                        if asked is not None:
                            yield from (n for s in sets if matches(asked, s.labels) for n in s.nets)

    def _placed(self, party: Party, places: Sequence[tuple[str, str]], titles: dict[str, str]) -> list[Place]:
        peers = sum(len(r.peers(e)) for e, r in zip(party[1:], self._rulings, strict=True) if e is not None)
        most = min(MOST_PLACES, MOST_SORTED // (1 + peers))
        self.counted = self.counted and len(places) <= most
        before, after = self._states
        found = []
        for name, address in places[:most]:
            sorts = tuple(
                0 if endpoint is None else rulings.sort(endpoint, address)
                for endpoint, rulings in zip(party[1:], self._rulings, strict=True)
            )
            title = titles.get(name) or self._titles.get(name, name)
            sides = before.side(address), after.side(address)
            net = name if name != address else ""
            found.append(Place(title, address, sides, (sorts[0], sorts[1]), net))
        return found

    # -- what becomes of them --------------------------------------------------------------------

    def _told(
        self, party: Party, way: Way, sources: Sequence[Group], targets: Sequence[Group], version: int
    ) -> Iterator[HostChange]:
        many: dict[tuple[_Outcome, int], list[int]] = defaultdict(list)
        for at, target in enumerate(targets):
            for number, source in enumerate(sources):
                self._pairs += 1
                if self._pairs > MOST_PAIRS or sum(r.asked for r in self._rulings) > MOST_JUDGED:
                    self.counted = False
                    break
                for outcome in self._outcomes(party, way, source.place, target.place, version):
                    many[outcome, at].append(number)
        ones: dict[tuple[_Outcome, tuple[int, ...]], list[int]] = defaultdict(list)
        for (outcome, at), numbers in many.items():
            ones[outcome, tuple(numbers)].append(at)
        via = party.name if way in {Way.ROUTED_IN, Way.ROUTED_OUT} else ""
        for (outcome, those), ats in ones.items():
            yield HostChange(
                sources=names_of(sources[number] for number in those),
                targets=names_of(targets[at] for at in ats),
                services=outcome.services,
                families=(version,),
                allowed=outcome.allowed,
                before=outcome.before,
                after=outcome.after,
                via=via,
            )

    def _published_at(self, party: Party, version: int) -> list[Published]:
        """The services of the endpoint's addresses that are routed on to ports."""
        own = {a for end in party[1:] if end is not None for a in end.addresses}
        return [
            each
            for each in self._published
            if (6 if ":" in each.address else 4) == version
            and (not each.host_address or not own or each.host_address in own)
        ]

    def _told_of_published(
        self, party: Party, published: Published, sources: Sequence[Group], target: Place, version: int
    ) -> Iterator[HostChange]:
        own = published.host_address or self.own(party, version)[0].address
        found: dict[tuple[_Told, _Told], list[Group]] = defaultdict(list)
        for group in sources:
            source = group.place
            told = []
            for state, (endpoint, rulings) in enumerate(zip(party[1:], self._rulings, strict=True)):
                number = self._of_port(state, Way.ROUTED_IN, source.sides[state], target.sides[state])
                mine = rulings.of_published(endpoint, source.address, own, published)
                told.append(_decided([mine, _at(self._port_row(state, number), published.service)]))
            if told[0][0] != told[1][0]:
                found[told[0], told[1]].append(group)
        for (was, becomes), groups in found.items():
            yield HostChange(
                sources=names_of(groups),
                targets=(target.name,),
                services=((published.service, published.service + 1),),
                families=(version,),
                allowed=becomes[0],
                before=was[1],
                after=becomes[1],
                via=f"{party.name} {service_text(published.host_service, published.host_service + 1)}",
            )

    def _outcomes(self, party: Party, way: Way, source: Place, target: Place, version: int) -> list[_Outcome]:
        """What changes of a pair, by what decides."""
        before, after = (
            self._of_port(state, way, source.sides[state], target.sides[state]) for state in (0, 1)
        )
        if self._nothing(before, after):
            return []
        key = (party.name, way, source.sorts, target.sorts, before, after, version)
        known = self._known.get(key)
        if known is None:
            rows = [
                (rulings.row(endpoint, way, *ends), self._port_row(state, number))
                for state, (endpoint, rulings, number) in enumerate(
                    zip(party[1:], self._rulings, (before, after), strict=True)
                )
                for ends in [[(place.address, place.sorts[state]) for place in (source, target)]]
            ]
            known = self._known[key] = [] if rows[0] == rows[1] else list(_compared(rows))
        return known

    def _of_port(self, state: int, way: Way, source: Side, target: Side) -> int:
        """The number of the row of the port's own policies, for what is routed to it or from it; else -1."""
        if way is Way.ROUTED_IN:
            return self._rows[state].of(target, source, Direction.INGRESS)
        return self._rows[state].of(source, target, Direction.EGRESS) if way is Way.ROUTED_OUT else -1

    def _nothing(self, before: int, after: int) -> bool:
        """Whether the port lets nothing pass in either state, whatever the endpoint says."""
        empty = self._shapes.get(EMPTY, -1)
        return before >= 0 and self._rows[0].shapes[before] == empty == self._rows[1].shapes[after]

    def _port_row(self, state: int, number: int) -> HostRow:
        if number < 0:
            return ((0, True, ""),)
        rows = self._rows[state]
        return tuple(
            (first, verdict.allow, "" if verdict.rule == NO_POLICY else rows.text(number, verdict))
            for first, verdict in rows.row(number)
        )


def _compared(rows: Sequence[Sequence[HostRow]]) -> Iterator[_Outcome]:
    """The rows of both sides before, and after: what differs."""
    cuts = sorted({start for state in rows for row in state for start, *_ in row if start < FIRST_PACKETS})
    spans: dict[tuple[bool, str, str], list[tuple[int, int]]] = defaultdict(list)
    for first, end in zip(cuts, [*cuts[1:], FIRST_PACKETS], strict=True):
        was, becomes = (_decided([_at(row, first) for row in state]) for state in rows)
        if was[0] != becomes[0]:
            spans[becomes[0], was[1], becomes[1]].append((first, end))
    for told, those in spans.items():
        yield _Outcome(*told, union(those))


def _at(row: HostRow, service: int) -> _Told:
    _, allowed, text = row[bisect_right(row, service, key=lambda stretch: stretch[0]) - 1]
    return allowed, text


def _decided(sides: Sequence[_Told]) -> _Told:
    """Whether all allow, and what decided: those that deny, else all that have something to say."""
    denied = [text for allowed, text in sides if not allowed]
    spoken = [text for _, text in sides if text]
    return not denied, "; ".join(denied or spoken) or "no policy"
