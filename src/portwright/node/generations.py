"""Generations of policy in one data path: a new one filled beside the one in force, or that one amended.

A packet reads the number of the generation once and is judged by that one's tables alone, which are those of
the number's slot. So a generation's tables may go only when no packet can be on its way with its number. They
go with the install after the next: each update of a map of maps returns after a grace period
(maybe_wait_bpf_programs, kernel/bpf/syscall.c), so once a table of the next generation is entered, the
packets of the one before the present are through.

Where only one workload is found otherwise than before, the tables in force are amended in place, in an order
in which every packet in between is decided by the old or by the new (policy/difference.py), and the
generation gets another number of the same slot, so that flows are judged anew. That waits for nothing. What
it leaves behind, the cells that nobody asks for any more, goes when there is much of it, or before their
numbers get another meaning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import struct
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import Final, Self

from portwright.dataplane import OBJECT, bounds, policy_values, values
from portwright.dataplane.abi import PwPolicyConst
from portwright.kernel.bpf import CollectionSpec, Map, Packed
from portwright.kernel.bpf.enums import MapType
from portwright.kernel.bpf.spec import MapSpec
from portwright.model.errors import InternalError, KernelFailed
from portwright.node.faults import Faults
from portwright.policy.difference import CellKey, Difference
from portwright.policy.rules import OnChange
from portwright.policy.tables import AddressEntry, Compiled, RuleInfo, SetTable, SplitTable, Verdict

_SLOTS = int(PwPolicyConst.SLOTS)
_U32 = struct.Struct("=I")
#: Keys of pw_generation: the number in force, and the last one that was given out.
_IN_FORCE, _LAST = _U32.pack(0), _U32.pack(1)
#: Sets that an array has room for at least; and for half as many again as there are.
_SPARE_SETS = 32
#: Cells that a table has room for at least; and for twice as many as there are, or up to four times.
_LEAST_CELLS = 4096

_NO_FAULTS = Faults()

Rules = Mapping[int, RuleInfo]


@functools.cache
def _template(name: str) -> MapSpec:
    """What an inner map of this table has to be: the object says it."""
    inner = CollectionSpec.load(OBJECT).maps[name].inner
    if inner is None:
        raise InternalError(f"{name} is no map of maps")
    return inner


class Entries(dict[str, Packed]):
    """The exact entries of each of a generation's tables, found when they are first asked for."""

    def __init__(self, compiled: Compiled) -> None:
        """Finds nothing yet."""
        super().__init__()
        self._of = compiled, _Words(compiled.rules)

    def __missing__(self, name: str) -> Packed:
        found = self[name] = _TABLES[name](*self._of)
        return found

    def complete(self) -> Self:
        """With all of them found."""
        for name in _TABLES:
            self[name]
        return self


def numbered(nodes: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
    """The entries of pw_bounds."""
    return [(_U32.pack(number), node) for number, node in enumerate(nodes)]


def _bounds(compiled: Compiled, _words: _Words) -> Packed:
    return Packed.of(numbered(bounds.nodes(compiled.prefixes)))


def _peers(compiled: Compiled, _words: _Words) -> Packed:
    return Packed.of(_peer(address, entry) for address, entry in compiled.addresses.items())


def _peer(address: str, entry: AddressEntry) -> tuple[bytes, bytes]:
    value = policy_values.peer_value(
        class_id=entry.class_id, set_in=entry.set_in, set_out=entry.set_out, owner=entry.owner
    )
    return values.address(address), value


class _Words(dict[Verdict, int]):
    """``enum pw_verdict`` of each verdict that is asked for: a few thousand, asked for again and again."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    def __missing__(self, verdict: Verdict) -> int:
        on_change = self._rules[verdict.rule].on_change
        word = self[verdict] = policy_values.verdict_word(
            allow=verdict.allow,
            rule=verdict.rule,
            log=verdict.log,
            keep=on_change is OnChange.KEEP,
            reset=on_change is OnChange.RESET,
        )
        return word


def _sets(compiled: Compiled, words: _Words) -> Packed:
    sets = [_set(number, table, words) for number, table in compiled.sets.items()]
    return Packed.of([*sets, *(_split(number, table) for number, table in compiled.splits.items())])


def _set(number: int, table: SetTable, words: _Words) -> tuple[bytes, bytes]:
    value = policy_values.set_value(
        starts=table.starts,
        classes=table.port_classes,
        defaults=[words[verdict] for verdict in table.defaults],
    )
    return _U32.pack(number), value


def _split(number: int, table: SplitTable) -> tuple[bytes, bytes]:
    return _U32.pack(number), policy_values.split_value(starts=table.starts, sets=table.sets)


def _cells(compiled: Compiled, words: _Words) -> Packed:
    """All cells. They are the most by far of what a compilation makes, and most classes share their columns.

    So the keys' numbers are listed each by itself, for all neighbours of one column at once.
    """
    sets, classes, port_classes, verdicts = (array("I") for _ in range(4))
    for set_id, table in compiled.sets.items():
        for column, those in groupby(table.columns, table.columns.__getitem__):
            members = array("I", those)
            count = len(members)
            for port_class, verdict in column:
                sets += array("I", (set_id,)) * count
                classes += members
                port_classes += array("I", (port_class,)) * count
                verdicts += array("I", (words[verdict],)) * count
    return Packed(policy_values.cell_keys(sets, classes, port_classes), verdicts.tobytes(), len(verdicts))


def _cell(key: CellKey, verdict: Verdict, words: _Words) -> tuple[bytes, bytes]:
    return policy_values.cell_key(*key), policy_values.number_value(words[verdict])


#: The tables of a generation, and how their entries are found. The first's are soon found, and what goes
#: waits for its entering; the second takes the longest to fill.
_TABLES: Final[Mapping[str, Callable[[Compiled, _Words], Packed]]] = {
    "pw_bounds": _bounds,
    "pw_cells": _cells,
    "pw_peers": _peers,
    "pw_sets": _sets,
}


def in_force(maps: Mapping[str, Map]) -> int:
    """The generation that packets are judged by; 0: none, everything passes the policy."""
    raw = maps["pw_generation"].lookup(_IN_FORCE)
    return 0 if raw is None else int(_U32.unpack(raw)[0])


def slot_of(number: int) -> bytes:
    """The slot of a generation's tables, as the outer maps' key."""
    return _U32.pack(number % _SLOTS)


def enter_bounds(maps: Mapping[str, Map], slot: bytes, nodes: Iterable[bytes]) -> None:
    """Gives a slot its nets."""
    entries = Packed.of(numbered(nodes))
    with contextlib.closing(_made("pw_bounds", entries)) as inner:
        inner.update_packed(entries)
        maps["pw_bounds"].update(slot, _U32.pack(inner.fd))


def install(maps: Mapping[str, Map], entries: Entries, faults: Faults = _NO_FAULTS) -> int:
    """Puts these tables in force for every packet from one moment on; returns the generation's number.

    Raises KernelFailed (no memory, a table full); then the generation before is in force, untouched.
    """
    now = in_force(maps)
    number = _next(maps, now)
    slot = number % _SLOTS
    kept = {now % _SLOTS, slot} if now else {slot}

    # Beside each other: what is entered and what goes waits for a grace period each. A table that no packet
    # asks for yet is filled meanwhile, by the kernel, while we find the next one's entries.
    with contextlib.ExitStack() as made, ThreadPoolExecutor(3 * len(_TABLES)) as threads:
        tables: dict[str, list[Future[None]]] = {}
        swept: list[Future[None]] = []
        for name in _TABLES:
            inner = made.enter_context(contextlib.closing(_made(name, entries[name])))
            entered = threads.submit(maps[name].update, _U32.pack(slot), _U32.pack(inner.fd))
            tables[name] = [entered, threads.submit(inner.update_packed, entries[name])]
            if not swept:
                swept = [threads.submit(_sweep, maps[each], kept, after=entered) for each in _TABLES]
        for name, steps in tables.items():
            for step in steps:
                step.result()
            faults.at(f"policy:{name}")
        for step in swept:
            step.result()
    faults.at("policy:swept")
    maps["pw_generation"].update(_IN_FORCE, _U32.pack(number))
    return number


def amend(
    maps: Mapping[str, Map],
    change: Difference,
    rules: Rules,
    *,
    remains: Collection[CellKey] | None = None,
    faults: Faults = _NO_FAULTS,
) -> int | None:
    """Turns the tables in force into the next ones, in place; the generation's new number.

    ``change`` must be atomic and from what is in force; ``rules`` are the next tables'. ``remains``: cells
    that earlier changes left behind and that must go first, when the packets of the moment are through;
    None: they may stay. The change's own are left. None: a table has no room for it; all packets are still
    decided by the old tables, and the new are to be installed whole.
    Raises KernelFailed: then packets are decided by the old tables or by the new, each by one of them; the
    new are to be installed whole.
    """
    now, words = in_force(maps), _Words(rules)
    with contextlib.ExitStack() as stack:
        inner = {name: _entered(stack, maps[name], now % _SLOTS) for name in _TABLES}
        if max(change.put_sets, default=0) >= inner["pw_sets"].max_entries:
            return None
        if remains is not None:
            _wait_for_packets(maps, now)
            inner["pw_cells"].delete_batch(policy_values.cell_key(*key) for key in remains)
        for set_id, table in change.put_sets.items():
            inner["pw_sets"].update(
                *(_split(set_id, table) if isinstance(table, SplitTable) else _set(set_id, table, words))
            )
        try:
            inner["pw_cells"].update_batch(
                _cell(key, verdict, words) for key, verdict in change.put_cells.items()
            )
        except KernelFailed as error:
            if error.errno == errno.E2BIG:
                return None  # what is there of it already is of sets and classes that nobody has yet
            raise
        faults.at("policy:amend-cells")
        for address, entry in change.put_addresses.items():
            inner["pw_peers"].update(*_peer(address, entry))
        for address in change.delete_addresses:
            inner["pw_peers"].delete(values.address(address))
        faults.at("policy:amend-peers")
        number = _next(maps, now, same_slot=True)
        maps["pw_generation"].update(_IN_FORCE, _U32.pack(number))
    return number


def withdraw(maps: Mapping[str, Map], faults: Faults = _NO_FAULTS) -> None:
    """No policy is in force any more: every packet passes it. Flows keep the number that judged them."""
    was = in_force(maps)
    maps["pw_generation"].update(_IN_FORCE, _U32.pack(0))
    faults.at("policy:withdrawn")
    _wait_for_packets(maps, was + 1)
    for name in _TABLES:
        _sweep(maps[name], set())


def _next(maps: Mapping[str, Map], now: int, *, same_slot: bool = False) -> int:
    """A number that no flow can have, as none was ever in force with it; on record before it is used.

    Nor has it the slot of the one in force, however many installs have failed since that one, unless that
    is asked for.
    """
    raw = maps["pw_generation"].lookup(_LAST)
    number = (0 if raw is None else int(_U32.unpack(raw)[0])) + 1
    if same_slot:
        number += (now - number) % _SLOTS
    elif now and number % _SLOTS == now % _SLOTS:
        number += 1
    maps["pw_generation"].update(_LAST, _U32.pack(number))
    return number


def _wait_for_packets(maps: Mapping[str, Map], slot: int) -> None:
    """Returns when every packet that is on its way now is through."""
    key = _U32.pack(slot % _SLOTS)
    known = maps["pw_bounds"].lookup(key)
    if known is None:
        enter_bounds(maps, key, ())
        return
    with contextlib.closing(Map.from_id(int(_U32.unpack(known)[0]))) as same:
        maps["pw_bounds"].update(key, _U32.pack(same.fd))


def _sweep(outer: Map, kept: set[int], after: Future[None] | None = None) -> None:
    """Removes the tables of every slot but these, once ``after`` is done."""
    if after is not None:
        after.result()
    for slot in set(range(_SLOTS)) - kept:
        if outer.lookup(_U32.pack(slot)) is not None:
            outer.delete(_U32.pack(slot))


def _entered(stack: contextlib.ExitStack, outer: Map, slot: int) -> Map:
    """The inner map of a slot."""
    raw = outer.lookup(_U32.pack(slot))
    if raw is None:
        raise InternalError(f"{outer.name} has no table in slot {slot}, which is in force")
    return stack.enter_context(contextlib.closing(Map.from_id(int(_U32.unpack(raw)[0]))))


def _made(name: str, filling: Packed) -> Map:
    """A new and empty inner map, of a size for these entries."""
    spec = _template(name)
    if spec.type is MapType.ARRAY:
        needed = 1 + max(array("I", filling.keys), default=0)
        # A node that is not there has no bounds; one that is and empty would have wrong ones.
        spare = max(needed // 2, _SPARE_SETS) if name == "pw_sets" else 0
        spec = dataclasses.replace(spec, max_entries=needed + spare)
    elif name == "pw_cells":
        # The kernel makes as many buckets: of a million the most are for nothing, and of other pages.
        room = 1 << max(_LEAST_CELLS, 2 * filling.number).bit_length()
        spec = dataclasses.replace(spec, max_entries=min(room, spec.max_entries))
    return Map.create(spec)
