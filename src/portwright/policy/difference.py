"""From the tables in force to the next, entry by entry, in the order in which a map may be written live.

A number that both generations have means the same in both (compile.recompile), so the steps are: what is new
and not yet asked for, then the entries that addresses are found by, then what nobody asks for any more. Nets
go in longest first and out shortest first: so no address is ever found by a net around its own, whose class
it has in neither generation.
"""

from __future__ import annotations

import ipaddress
from typing import TypeVar

import msgspec

from portwright.policy.tables import AddressEntry, Column, Compiled, SetTable, SplitTable, Verdict

#: (set, class, port class)
CellKey = tuple[int, int, int]
#: What a net or an address is found as.
_Found = TypeVar("_Found")


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What to put and what to delete; each field in the order in which it is to be done, and so the fields.

    ``put_sets`` are the intervals and defaults of sets, without their cells. Puts of ``put_cells`` that hold
    a key of the old tables do not occur: a cell never changes.
    """

    put_sets: dict[int, SetTable | SplitTable]
    put_cells: dict[CellKey, Verdict]
    put_prefixes: dict[str, int]
    put_addresses: dict[str, AddressEntry]
    delete_addresses: tuple[str, ...]
    delete_prefixes: tuple[str, ...]
    delete_cells: tuple[CellKey, ...]
    delete_sets: tuple[int, ...]
    gone_classes: frozenset[int]
    """Of the addresses that change, those that nothing has any more."""
    atomic: bool
    """Whether the entries in this order let every packet be decided by the old or by the new tables alone:
    only one address, or one workload, changes what it is found as. Else the generation must be swapped."""

    @property
    def entries(self) -> int:
        """How many puts and deletes it is."""
        puts = len(self.put_sets) + len(self.put_cells) + len(self.put_prefixes) + len(self.put_addresses)
        addresses = len(self.delete_prefixes) + len(self.delete_addresses)
        return puts + addresses + len(self.delete_cells) + len(self.delete_sets)


class Remains:
    """What changes in place have left in the tables, for packets that were on their way."""

    #: How many cells may lie about.
    BOUND = 4096

    def __init__(self) -> None:
        self.cells: set[CellKey] = set()
        self._sets: set[int] = set()
        self._classes: set[int] = set()

    def add(self, change: Difference) -> None:
        """After a change: the cells and sets that nobody asks for any more."""
        self.cells.update(change.delete_cells)
        self._sets.update(change.delete_sets)
        self._classes.update(change.gone_classes)

    def hinder(self, change: Difference) -> bool:
        """Whether they must go first: a number of theirs is to mean something else, or there are many."""
        return (
            len(self.cells) > self.BOUND
            or not self._sets.isdisjoint(change.put_sets)
            or not self._classes.isdisjoint(entry.class_id for entry in change.put_addresses.values())
        )


def diff(old: Compiled, new: Compiled) -> Difference:
    """What turns ``old`` into ``new``, which recompile made of it."""
    put_cells: dict[CellKey, Verdict] = {}
    delete_cells: list[CellKey] = []
    for number, table in new.sets.items():
        before = old.sets.get(number)
        if before is table:
            continue
        had = before.columns if before is not None else {}
        for class_id, column in table.columns.items():
            if class_id not in had:
                put_cells.update(_cells(number, class_id, column))
        for class_id in had.keys() - table.columns.keys():
            delete_cells += [key for key, _ in _cells(number, class_id, had[class_id])]
    for number in old.sets.keys() - new.sets.keys():
        for class_id, column in old.sets[number].columns.items():
            delete_cells += [key for key, _ in _cells(number, class_id, column)]
    put_prefixes, delete_prefixes = _changed(old.prefixes, new.prefixes)
    put_addresses, delete_addresses = _changed(old.addresses, new.addresses)
    return Difference(
        put_sets=_new_sets(old, new),
        put_cells=put_cells,
        put_prefixes=dict(sorted(put_prefixes.items(), key=lambda item: -_length(item[0]))),
        put_addresses=put_addresses,
        delete_addresses=tuple(sorted(delete_addresses)),
        delete_prefixes=tuple(sorted(delete_prefixes, key=_length)),
        delete_cells=tuple(delete_cells),
        delete_sets=tuple(sorted((old.sets | old.splits).keys() - (new.sets | new.splits).keys())),
        gone_classes=_gone_classes(old, new, {*put_addresses, *delete_addresses}),
        atomic=is_atomic(old, new),
    )


def _changed(old: dict[str, _Found], new: dict[str, _Found]) -> tuple[dict[str, _Found], set[str]]:
    """What is found otherwise, and what is not found any more."""
    return {at: found for at, found in new.items() if old.get(at) != found}, old.keys() - new.keys()


def _new_sets(old: Compiled, new: Compiled) -> dict[int, SetTable | SplitTable]:
    """Those that are asked for by source ports after those that they lead to."""
    sets = {number: table for number, table in new.sets.items() if number not in old.sets}
    splits = {number: table for number, table in new.splits.items() if number not in old.splits}
    return {**sets, **splits}


def _cells(number: int, class_id: int, column: Column) -> list[tuple[CellKey, Verdict]]:
    return [((number, class_id, port_class), verdict) for port_class, verdict in column]


def _gone_classes(old: Compiled, new: Compiled, addresses: set[str]) -> frozenset[int]:
    had = {old.addresses[address].class_id for address in addresses if address in old.addresses}
    if not had:
        return frozenset()
    return frozenset(had.difference((e.class_id for e in new.addresses.values()), new.prefixes.values()))


def _length(net: str) -> int:
    return ipaddress.ip_network(net).prefixlen


def is_atomic(old: Compiled, new: Compiled) -> bool:
    """Whether their difference is: much sooner told than the difference itself.

    A packet is found as a source and as a destination: of these two at most one may change. Those of one
    workload are one, since its traffic to itself is no policy's.
    """
    if old.prefixes != new.prefixes:
        return False
    addresses = set[str]().union(*_changed(old.addresses, new.addresses))
    if len(addresses) < 2:
        return True
    owners = {
        table.addresses[address].owner
        for address in addresses
        for table in (old, new)
        if address in table.addresses
    }
    return len(owners) == 1 and 0 not in owners
