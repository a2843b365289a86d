"""Addresses as two states of policy see them, for host endpoints: what is alike to both is one group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from portwright.policy.host.rulings import Sort
from portwright.policy.parties import Side, in_several


class Place(NamedTuple):
    """A name, an address that stands for it, and what it is to the two states."""

    name: str
    address: str
    sides: tuple[Side, Side]
    sorts: tuple[Sort, Sort]
    net: str = ""
    """The net whose rest it stands for, '' of an address."""

    @property
    def workload(self) -> bool:
        """Whether it is a port's, in one of the states at least."""
        return any(side.workload for side in self.sides)


class Group(NamedTuple):
    """Places that are the same to both states: the first, and all their names."""

    place: Place
    names: tuple[str, ...]


def grouped(places: Iterable[Place], *, sides: bool) -> list[Group]:
    """Places that are alike; with ``sides``: to ports' policies too."""
    alike: dict[tuple[object, ...], list[Place]] = {}
    for place in places:
        key: tuple[object, ...] = (*place.sorts,)
        if sides:
            key += tuple(part for side in place.sides for part in (*side[:5], *map(id, side[5:])))
        alike.setdefault(key, []).append(place)
    titles = {place.address: place.name for those in alike.values() for place in those}
    split = in_several(titles, [[place.address for place in those] for those in alike.values()])
    return [
        Group(
            those[0],
            tuple(sorted({f"{p.name} ({p.address})" if p.address in split else p.name for p in those})),
        )
        for those in alike.values()
    ]


def names_of(groups: Iterable[Group]) -> tuple[str, ...]:
    """All of their names, in order."""
    return tuple(sorted({name for group in groups for name in group.names}))
