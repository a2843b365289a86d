"""What policies say together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from portwright.policy.labels import Expr
from portwright.policy.lints.entry import KUBERNETES, PROTOCOL_NAMES, SIDES, Entry, Lint, field_of, rules_of
from portwright.policy.lints.index import Blocks, Covering, Services, Subjects, network, places
from portwright.policy.population import Population, covers, describe, may_overlap
from portwright.policy.rules import (
    ADMIN,
    BASELINE,
    TCP,
    UDP,
    Action,
    Direction,
    Peer,
    Policy,
    Rule,
    Traffic,
)

DNS_PORT: Final = 53


def dns(entries: Sequence[Entry], world: Population) -> Iterator[Lint]:
    """Egress that is isolated by Kubernetes' policies and leaves no way to a name server."""
    served = {protocol: _Served(entries, protocol, world) for protocol in (UDP, TCP)}
    for entry in entries:
        policy = entry.policy
        if entry.document.api_version != KUBERNETES or policy.egress is None:
            continue
        lacking = [protocol for protocol in served if not served[protocol].includes(policy.subject)]
        if not lacking:
            continue
        what = "no name server" if UDP in lacking else "a name server by UDP only, so long answers fail"
        ports = ", ".join(
            f"{{protocol: {PROTOCOL_NAMES[protocol]}, port: {DNS_PORT}}}" for protocol in lacking
        )
        yield entry.lint(
            ("spec", "egress"),
            "no-dns" if UDP in lacking else "no-dns-tcp",
            f"pods of {describe(policy.subject)} reach {what}",
            f"Add an egress rule: {{ports: [{ports}]}}, with `to` if the server is known.",
        )


class _Served:
    """Those who may ask a name server by one protocol, by whichever policy."""

    def __init__(self, entries: Sequence[Entry], protocol: int, world: Population) -> None:
        self.world = world
        self.subjects = {entry.policy.subject for entry in entries if protocol in entry.once(_asks_by)}
        self.selected = world.any_of(self.subjects)
        self.covering = Covering(self.subjects)
        self._known: dict[Expr, bool] = {}

    def includes(self, subject: Expr) -> bool:
        """Whether all of these may; where there are none of them now, whether all that come will."""
        known = self._known.get(subject)
        if known is None:
            known = self._known[subject] = self._includes(subject)
        return known

    def _includes(self, subject: Expr) -> bool:
        selected = self.world.of(subject)
        if selected:
            return not selected & ~self.selected
        return subject in self.subjects or any(
            covers(wide, subject) for wide in self.covering.candidates(subject)
        )


def _asks_by(entry: Entry) -> frozenset[int]:
    """The protocols by which those whom the policy selects may ask a name server."""
    rules = () if entry.policy.staged else entry.policy.egress or ()
    return frozenset(
        protocol for protocol in (UDP, TCP) if any(_allows_dns(rule, protocol) for rule in rules)
    )


def _allows_dns(rule: Rule, protocol: int) -> bool:
    if rule.action is not Action.ALLOW or rule.peers == ():
        return False
    return rule.traffic is None or any(
        part.protocol in {None, protocol}
        and not part.source_ports
        and (
            not (part.ports or part.names)
            or any(DNS_PORT in ports for ports in part.ports)
            # What a name means is its server's affair; clusters' name servers call it dns, dns-tcp.
            or any("dns" in name for name in part.names)
        )
        for part in rule.traffic
    )


def whose_names(entries: Sequence[Entry], world: Population) -> Iterator[Lint]:
    """Domain names for pods that may ask any name server, so one of their own, what they stand for."""
    named = [entry for entry in entries if entry.once(_domains)]
    if not named:
        return
    asking = {
        entry.policy.subject: rule
        for entry in entries
        if not entry.policy.staged
        for rule in entry.policy.egress or ()
        if _anybody(rule) and (_allows_dns(rule, UDP) or _allows_dns(rule, TCP))
    }
    subjects = list(asking)
    among = Subjects(subjects, world)
    for entry in named:
        subject = entry.policy.subject
        for rule in entry.once(_domains):
            near = (subjects[place] for place in places(among.meeting(subject)))
            opening = next((asking[other] for other in near if _may_share(subject, other, world)), None)
            if opening is not None:
                yield entry.lint(
                    field_of(entry, rule),
                    "names-any-server",
                    f"pods of {describe(entry.policy.subject)} may ask any name server ({opening.where}): "
                    "one of their own, too, what these names stand for",
                    "Allow port 53 to the addresses of your name servers only.",
                )


def _domains(entry: Entry) -> tuple[Rule, ...]:
    """The rules that name domains."""
    rules = entry.policy.egress or ()
    return tuple(rule for rule in rules if any(peer.domains for peer in rule.peers or ()))


def _anybody(rule: Rule) -> bool:
    """Whether the rule is for every address of a family."""
    return rule.peers is None or any(
        peer == Peer() or any(network(net).prefixlen == 0 for net in peer.nets or ()) for peer in rule.peers
    )


def _may_share(one: Expr, other: Expr, world: Population) -> bool:
    """Whether both select some pod; where there is none, whether one could come that both do."""
    if world.workloads:
        return bool(world.of(one) & world.of(other))
    return may_overlap(one, other)


class _Opening(msgspec.Struct, frozen=True):
    """A peer of addresses in a rule of a policy. ``selected``: by the policy, now."""

    entry: Entry
    direction: Direction
    index: int
    rule: Rule
    peer: Peer
    selected: int


def excepts(entries: Sequence[Entry], world: Population) -> Iterator[Lint]:
    """Addresses that one ipBlock leaves out and another rule for the same pods lets in all the same."""
    openings = _Openings(_openings(entries, world), world)
    for hole in openings.all:
        for place, net in enumerate(hole.peer.not_nets):
            for other in openings.near(hole, net):
                if other.peer is not hole.peer and _same_packet(hole, other, world):
                    number = (hole.rule.peers or ()).index(hole.peer)
                    yield hole.entry.lint(
                        field_of(
                            hole.entry, hole.rule, SIDES[hole.direction], number, "ipBlock", "except", place
                        ),
                        "except-allowed",
                        f"{net} is left out of this block only; {other.direction} rule {other.index + 1} of "
                        f"{other.entry.policy.title} ({other.rule.where}) lets it in again",
                        "Leave it out there too: an except takes nothing from other rules.",
                    )
                    break


class _Openings:
    """All openings, and which of them are worth a look for an address that one leaves out."""

    def __init__(self, openings: list[_Opening], world: Population) -> None:
        of_peer: dict[Peer, list[_Opening]] = defaultdict(list)
        for opening in openings:
            of_peer[opening.peer].append(opening)
        self.all = openings
        self._by_peer = [opening for found in of_peer.values() for opening in found]
        self._peers = list(of_peer)
        self._of_peer: list[int] = []  # which openings are this peer's
        self._of_entry: dict[int, int] = defaultdict(int)
        self._of_direction: dict[Direction, int] = defaultdict(int)
        begin = 0
        for found in of_peer.values():
            self._of_peer.append(((1 << len(found)) - 1) << begin)
            begin += len(found)
        for place, opening in enumerate(self._by_peer):
            self._of_entry[id(opening.entry)] |= 1 << place
            self._of_direction[opening.direction] |= 1 << place
        self._blocks = Blocks(self._peers)
        self._subjects = Subjects([opening.entry.policy.subject for opening in self._by_peer], world)
        self._services = Services([opening.rule for opening in self._by_peer])
        self._over: dict[str, int] = {}

    def near(self, hole: _Opening, net: str) -> Iterator[_Opening]:
        """Openings that let ``net`` in, of all those that may be about a packet of the hole's rule."""
        if net not in self._over:
            # Few nets are left out, by however many policies: look once for those that let each in.
            self._over[net] = 0
            for place in places(self._blocks.overlapping(net)):
                if _lets_in(self._peers[place], net):
                    self._over[net] |= self._of_peer[place]
        same = self._subjects.meeting(hole.entry.policy.subject) | self._of_entry[id(hole.entry)]
        bits = self._over[net] & self._of_direction[hole.direction] & same
        if bits:
            bits &= self._services.meeting(hole.rule)
        return (self._by_peer[place] for place in places(bits))


def _openings(entries: Sequence[Entry], world: Population) -> list[_Opening]:
    """All peers of Kubernetes' policies that are not selectors."""
    return [
        _Opening(entry, *each, world.of(entry.policy.subject))
        for entry in entries
        for each in entry.once(_open)
    ]


def _open(entry: Entry) -> tuple[tuple[Direction, int, Rule, Peer], ...]:
    return tuple(
        (direction, index, rule, peer)
        for direction, index, rule in rules_of(entry.policy)
        for peer in (rule.peers if rule.peers is not None else (Peer(),))
        if entry.document.api_version == KUBERNETES and peer.selector is None
    )


def _same_packet(hole: _Opening, other: _Opening, world: Population) -> bool:
    """Whether both are about one direction, some pod and some service."""
    if hole.direction is not other.direction:
        return False
    if hole.entry is other.entry:
        together = True
    elif world.workloads:
        together = bool(hole.selected & other.selected)
    else:
        together = may_overlap(hole.entry.policy.subject, other.entry.policy.subject)
    return together and _share_traffic(hole.rule, other.rule)


def _lets_in(peer: Peer, net: str) -> bool:
    """Whether some address of ``net`` is surely among the peer's."""
    if peer.nets is None:
        return True
    hole = network(net)
    return any(
        _overlap(hole, network(block))
        and not any(_contains(network(without), hole) for without in peer.not_nets)
        for block in peer.nets
    )


def _overlap(left: Any, right: Any) -> bool:
    return bool(left.version == right.version and left.overlaps(right))


def _contains(outer: Any, inner: Any) -> bool:
    return bool(outer.version == inner.version and inner.subnet_of(outer))


def _share_traffic(left: Rule, right: Rule) -> bool:
    """Whether both may match one packet; names may mean any number."""
    return any(
        a.protocol is None
        or b.protocol is None
        or (
            a.protocol == b.protocol
            and (
                not a.ports
                or not b.ports
                or any(p.first <= q.last and q.first <= p.last for p in a.ports for q in b.ports)
            )
        )
        for a in left.traffic or (Traffic(),)
        for b in right.traffic or (Traffic(),)
    )


def equal_priorities(entries: Sequence[Entry], world: Population) -> Iterator[Lint]:
    """Admin policies of one tier and priority for the same pods: the specification leaves the winner open."""
    equal: dict[tuple[str, float], list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.policy.tier in {ADMIN.name, BASELINE.name}:
            equal[entry.policy.tier, entry.policy.order].append(entry)
    for (tier, order), group in sorted(equal.items(), key=lambda item: item[0]):
        ordered = sorted(group, key=lambda entry: (entry.policy.namespace, entry.policy.name))
        for first, second in _near_pairs(ordered, world):
            ways = [way for way in Direction if first.policy.rules(way) and second.policy.rules(way)]
            if ways and _together(first.policy, second.policy, world):
                yield second.lint(
                    ("spec", "priority"),
                    "equal-priority",
                    f"{first.policy.title} ({first.policy.where}) has priority {order:g} in {tier} too and "
                    f"selects the same pods for {' and '.join(ways)}; here the name decides, "
                    f"{first.policy.title} first, elsewhere it is open",
                    "Give one of them another priority.",
                )


def _near_pairs(entries: Sequence[Entry], world: Population) -> Iterator[tuple[Entry, Entry]]:
    """All pairs that may be together, each in its order."""
    subjects = Subjects([entry.policy.subject for entry in entries], world)
    for place, first in enumerate(entries):
        later = subjects.meeting(first.policy.subject) >> place + 1 << place + 1
        for other in places(later):
            yield first, entries[other]


def _together(left: Policy, right: Policy, world: Population) -> bool:
    """Whether some pod is selected by both; where no pod is known, whether one could be."""
    if world.workloads:
        return bool(world.of(left.subject) & world.of(right.subject))
    return may_overlap(left.subject, right.subject)
