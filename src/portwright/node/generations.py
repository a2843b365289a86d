"""Generations of policy in one data path: filled beside the one in force, then put in force in one write.

A packet reads the number of the generation once and is judged by that one's tables alone. So a generation's
tables may go only when no packet can be on its way with its number. They go with the install after the next:
each update of a map of maps returns after a grace period (maybe_wait_bpf_programs, kernel/bpf/syscall.c), so
once the next generation's tables are entered, the packets of the one before the present are through.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import struct
from collections.abc import Iterable, Iterator, Mapping

from portwright.dataplane import policy_values, values
from portwright.dataplane.abi import PwPolicyConst
from portwright.kernel.bpf import CollectionSpec, Map
from portwright.kernel.bpf.enums import MapType
from portwright.kernel.bpf.spec import MapSpec
from portwright.model.errors import InternalError
from portwright.node.faults import Faults
from portwright.node.switch import OBJECT
from portwright.policy.tables import Compiled, SetTable, Verdict

_SLOTS = int(PwPolicyConst.SLOTS)
_U32 = struct.Struct("=I")
#: Keys of pw_generation: the number in force, and the last one that was given out.
_IN_FORCE, _LAST = _U32.pack(0), _U32.pack(1)
#: The tables of a generation, in the order in which they are entered.
_TABLES = ("pw_peers", "pw_nets", "pw_sets", "pw_cells")

_NO_FAULTS = Faults()

Entries = dict[str, list[tuple[bytes, bytes]]]


@functools.cache
def _template(name: str) -> MapSpec:
    """What an inner map of this table has to be: the object says it."""
    inner = CollectionSpec.load(OBJECT).maps[name].inner
    if inner is None:
        raise InternalError(f"{name} is no map of maps")
    return inner


def entries_of(compiled: Compiled) -> Entries:
    """The exact entries of the four tables."""
    return {
        "pw_peers": [
            (
                values.address(address),
                policy_values.peer_value(
                    class_id=entry.class_id, set_in=entry.set_in, set_out=entry.set_out, owner=entry.owner
                ),
            )
            for address, entry in compiled.addresses.items()
        ],
        "pw_nets": [
            (policy_values.net_key(cidr), policy_values.number_value(class_id))
            for cidr, class_id in compiled.prefixes.items()
        ],
        "pw_sets": [(_U32.pack(set_id), _set_value(table)) for set_id, table in compiled.sets.items()],
        "pw_cells": [
            (policy_values.cell_key(*key), policy_values.number_value(_word(verdict)))
            for key, verdict in compiled.cells()
        ],
    }


def _word(verdict: Verdict) -> int:
    return policy_values.verdict_word(allow=verdict.allow, rule=verdict.rule, log=verdict.log)


def _set_value(table: SetTable) -> bytes:
    return policy_values.set_value(
        starts=table.starts,
        classes=table.port_classes,
        defaults=[_word(verdict) for verdict in table.defaults],
    )


def in_force(maps: Mapping[str, Map]) -> int:
    """The generation that packets are judged by; 0: none, everything passes the policy."""
    raw = maps["pw_generation"].lookup(_IN_FORCE)
    return 0 if raw is None else int(_U32.unpack(raw)[0])


def install(maps: Mapping[str, Map], entries: Entries, faults: Faults = _NO_FAULTS) -> int:
    """Puts these tables in force for every packet from one moment on; returns the generation's number.

    Raises KernelFailed (no memory, a table full); then the generation before is in force, untouched.
    """
    now = in_force(maps)
    number = _next(maps, now)
    slot = number % _SLOTS
    for name in _TABLES:
        with _inner(_template(name), entries[name]) as inner:
            maps[name].update(_U32.pack(slot), _U32.pack(inner.fd))
        faults.at(f"policy:{name}")
    _sweep(maps, {now % _SLOTS, slot} if now else {slot})
    faults.at("policy:swept")
    maps["pw_generation"].update(_IN_FORCE, _U32.pack(number))
    return number


def withdraw(maps: Mapping[str, Map], faults: Faults = _NO_FAULTS) -> None:
    """No policy is in force any more: every packet passes it. Flows keep the number that judged them."""
    was = in_force(maps)
    maps["pw_generation"].update(_IN_FORCE, _U32.pack(0))
    faults.at("policy:withdrawn")
    with _inner(_template("pw_nets"), ()) as inner:  # waits for the packets that are under way
        maps["pw_nets"].update(_U32.pack((was + 1) % _SLOTS), _U32.pack(inner.fd))
    _sweep(maps, set())


def _next(maps: Mapping[str, Map], now: int) -> int:
    """A number that no flow can have, as none was ever in force with it; on record before it is used.

    Nor has it the slot of the one in force, however many installs have failed since that one.
    """
    raw = maps["pw_generation"].lookup(_LAST)
    number = (0 if raw is None else int(_U32.unpack(raw)[0])) + 1
    if now and number % _SLOTS == now % _SLOTS:
        number += 1
    maps["pw_generation"].update(_LAST, _U32.pack(number))
    return number


def _sweep(maps: Mapping[str, Map], kept: set[int]) -> None:
    """Removes the tables of every slot but these."""
    for name in _TABLES:
        for slot in set(range(_SLOTS)) - kept:
            if maps[name].lookup(_U32.pack(slot)) is not None:
                maps[name].delete(_U32.pack(slot))


@contextlib.contextmanager
def _inner(spec: MapSpec, filling: Iterable[tuple[bytes, bytes]]) -> Iterator[Map]:
    """A new inner map with these entries; ours until the outer map has it too."""
    pairs = list(filling)
    if spec.type is MapType.ARRAY:
        size = 1 + max((int(_U32.unpack(key)[0]) for key, _ in pairs), default=0)
        spec = dataclasses.replace(spec, max_entries=size)
    with contextlib.closing(Map.create(spec)) as made:
        made.update_batch(pairs)
        yield made
