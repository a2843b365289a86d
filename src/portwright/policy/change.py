"""Which connections become allowed or denied between two states of policy, and by which rules.

::

    both states' tables -> groups of addresses, alike in both (parties)
                        -> pairs of groups of which a side's allowed services differ
                        -> rows: sources x targets, services, the new verdict, the rule before and after

Equal rows are one, so a policy for a thousand ports makes a few rows. What is new or gone is compared as the
addresses that it has: an address that no endpoint has yet is one of the world's. An endpoint's traffic to
itself is always allowed and in no row; nor are later fragments, which go the way of their datagram's first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import msgspec

from portwright.policy.classes import bits_of, indexes_of
from portwright.policy.host.whatif import HostChange, Hosts, host_changes
from portwright.policy.pairs import Outcome, Pairs
from portwright.policy.parties import Group, State, groups_of, with_addresses
from portwright.policy.ranges import Ranges
from portwright.policy.rules import PolicySet, Snapshot

#: How many rows are told, and how many names in each on either side.
MOST_ROWS, MOST_NAMES = 500, 50
NO_HOSTS = Hosts()
#: How many bits the names of all rows may take before they are sorted and cut.
_MOST_BITS = 1 << 30


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """``sources`` to ``targets``, each to each but itself, on ``services``: ``allowed`` is what they become.

    ``services``: their numbers (services.py). ``families``: IP versions. ``before`` and ``after``: what
    decides, with file and line. ``pairs``: how many ordered pairs that is. ``more_sources`` and
    ``more_targets``: how many are not named. ``via``: the host endpoint by whose interfaces it is routed; ''
    by others, or not at all.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    services: Ranges
    families: tuple[int, ...]
    allowed: bool
    before: str
    after: str
    pairs: int
    more_sources: int = 0
    more_targets: int = 0
    via: str = ""


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """``rows``: first what is denied then. ``more_rows``, with ``more_pairs``: how many were left off.

    ``counted``: false where there are still more that nobody counted.
    """

    rows: tuple[Change, ...] = ()
    more_rows: int = 0
    more_pairs: int = 0
    counted: bool = True


def changes(
    before: tuple[PolicySet, Snapshot],
    after: tuple[PolicySet, Snapshot],
    *,
    hosts: Hosts = NO_HOSTS,
    most_rows: int = MOST_ROWS,
    most_names: int = MOST_NAMES,
) -> Changes:
    """What changes from one state to the other. Raises as compile_policies.

    ``hosts``: this node's own interfaces in both.
    """
    worlds = with_addresses(before[1], after[1])
    states = State(before[0], worlds[0]), State(after[0], worlds[1])
    return compare(*states, hosts=hosts, most_rows=most_rows, most_names=most_names)


def compare(
    before: State,
    after: State,
    *,
    hosts: Hosts = NO_HOSTS,
    most_rows: int = MOST_ROWS,
    most_names: int = MOST_NAMES,
) -> Changes:
    """The same of two states that are compiled, in whose worlds every workload has its addresses."""
    of_ports = _compared(before, after, most_rows, most_names)
    of_hosts = host_changes(before, after, hosts)
    if not of_hosts.rows and of_hosts.counted:
        return of_ports
    told = sorted((_of_host(row, most_names) for row in of_hosts.rows), key=_rank)
    rows = sorted((*told, *of_ports.rows), key=lambda row: row.allowed)  # stable: the host's first
    return Changes(
        rows=tuple(rows[:most_rows]),
        more_rows=of_ports.more_rows + len(rows[most_rows:]),
        more_pairs=of_ports.more_pairs + sum(row.pairs for row in rows[most_rows:]),
        counted=of_ports.counted and of_hosts.counted,
    )


def _of_host(row: HostChange, most_names: int) -> Change:
    return Change(
        sources=row.sources[:most_names],
        targets=row.targets[:most_names],
        services=row.services,
        families=row.families,
        allowed=row.allowed,
        before=row.before,
        after=row.after,
        pairs=row.pairs,
        more_sources=len(row.sources[most_names:]),
        more_targets=len(row.targets[most_names:]),
        via=row.via,
    )


def _rank(row: Change) -> tuple[object, ...]:
    return row.allowed, row.via, row.targets, row.sources, row.services, row.before, row.after


def _compared(before: State, after: State, most_rows: int, most_names: int) -> Changes:
    families = {version: Pairs(before, after, groups_of(before, after, version)) for version in (4, 6)}
    names = sorted({key for pairs in families.values() for group in pairs.groups for key in _keys(group)})
    place_of = {key: place for place, key in enumerate(names)}
    merged: dict[tuple[int, int, Outcome], _Row] = {}
    room = _MOST_BITS // (1 + len(names))
    counted = True
    for version, pairs in families.items():
        for row in _rows(pairs, place_of, version):
            same = merged.get(row.key)
            if same is None and len(merged) >= room:
                counted = False
                break
            merged[row.key] = row if same is None else same.joined(row)
    found = sorted(merged.values(), key=_Row.rank)
    return Changes(
        rows=tuple(_told(row, [name for _, name in names], most_names) for row in found[:most_rows]),
        more_rows=len(found[most_rows:]),
        more_pairs=sum(row.pairs for row in found[most_rows:]),
        counted=counted and all(pairs.counted for pairs in families.values()),
    )


class _Row(NamedTuple):
    """All pairs of some sources and targets, as bits of their names, of one outcome."""

    sources: int
    targets: int
    outcome: Outcome
    pairs: int
    families: tuple[int, ...]

    @property
    def key(self) -> tuple[int, int, Outcome]:
        return self.sources, self.targets, self.outcome

    def joined(self, other: _Row) -> _Row:
        """The same of another family."""
        return self._replace(pairs=self.pairs + other.pairs, families=(*self.families, *other.families))

    def rank(self) -> tuple[object, ...]:
        """What is denied comes first; then by the first names."""
        first = (next(indexes_of(self.sources)), next(indexes_of(self.targets)))
        return self.outcome.allowed, *first, self.outcome, self.sources, self.targets


def _keys(group: Group) -> list[tuple[bool, str]]:
    """The names in the order in which they are told: endpoints first, then the world."""
    return [(not group.workload, name) for name in group.names]


def _rows(pairs: Pairs, place_of: dict[tuple[bool, str], int], version: int) -> Iterator[_Row]:
    """What changes in one family, but for what is of an endpoint and itself alone."""
    named = [bits_of((place_of[key] for key in _keys(group)), len(place_of)) for group in pairs.groups]
    common = _common(pairs.groups)
    for rectangle in pairs.rectangles():
        near, far = list(indexes_of(rectangle.sources)), list(indexes_of(rectangle.targets))
        count = sum(len(pairs.groups[g].names) for g in near)
        count *= sum(len(pairs.groups[g].names) for g in far)
        count -= sum(n for g in near for other, n in common.get(g, ()) if rectangle.targets >> other & 1)
        if count:
            sources, targets = _union(named, near), _union(named, far)
            yield _Row(
                _without_itself(sources, targets),
                _without_itself(targets, sources),
                rectangle.outcome,
                count,
                (version,),
            )


def _common(groups: Sequence[Group]) -> dict[int, list[tuple[int, int]]]:
    """By group: with which groups it shares endpoints, and how many ordered pairs these are."""
    of_title: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        for title in group.titles:
            of_title[title].append(index)
    found: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for indexes in of_title.values():
        for one in indexes:
            for other in indexes:
                found[one][other] += 1
    return {one: list(others.items()) for one, others in found.items()}


def _union(named: Sequence[int], groups: Sequence[int]) -> int:
    bits = 0
    for group in groups:
        bits |= named[group]
    return bits


def _without_itself(names: int, others: int) -> int:
    """Without the only other one, with whom it makes no pair."""
    return names & ~others if others.bit_count() == 1 else names


def _told(row: _Row, names: Sequence[str], most_names: int) -> Change:
    sources, targets = (
        tuple(names[place] for place in islice(indexes_of(bits), most_names))
        for bits in (row.sources, row.targets)
    )
    return Change(
        sources=sources,
        targets=targets,
        services=row.outcome.services,
        families=row.families,
        allowed=row.outcome.allowed,
        before=row.outcome.before,
        after=row.outcome.after,
        pairs=row.pairs,
        more_sources=row.sources.bit_count() - len(sources),
        more_targets=row.targets.bit_count() - len(targets),
    )
