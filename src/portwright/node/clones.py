"""Clones: guests that all have the same addresses, and each port's own in their place outside.

A guest that is restored from a snapshot has the MAC and addresses of the one that was frozen. Its port has
the MAC too, and addresses of its own; the program that joins tap and device (dataplane/clone.bpf.c) puts one
in the place of the other. What it needs to know stands in a map, under a number that the filters carry.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from portwright.attach import clone
from portwright.dataplane import values
from portwright.kernel import clsact, rtnl
from portwright.kernel.bpf import Collection, CollectionSpec, Map, Program
from portwright.model.errors import KernelFailed, NotFound, NotSupported
from portwright.model.port import Port
from portwright.node.sandbox import Sandbox

if TYPE_CHECKING:
    from portwright.node.switch import Switch
    from portwright.plan.clone_operations import JoinClone, RemoveClone

OBJECT = Path(__file__).parent.parent / "dataplane" / "clone.bpf.o"
PROGRAM, MAP = "pw_clone", "pw_clones"
#: What a filter's class id can tell apart: 16 bits of it arrive, and 0 is none.
MOST = 0xFFFF
_HEAD = struct.Struct("=QII")  # struct pw_clone: port_id, tap, device; then addresses, by twos
_NO_SWAP = values.ZERO * 2


class Numbers:
    """Which numbers the clones of this node have; by the one writer's thread."""

    def __init__(self, used: Iterable[int]) -> None:
        """``used``: those on record."""
        self._used = set(used) - {0}
        self._next = 1

    def free(self) -> int:
        """A number that nobody has, not taken yet. Raises NotSupported when there is none."""
        if len(self._used) >= MOST:
            raise NotSupported(
                "tcfilter", "another clone", f"this node has {MOST}, and no number for more: delete one"
            )
        while self._next in self._used:
            self._next = self._next % MOST + 1
        return self._next

    def take(self, number: int) -> None:
        """From now on it is somebody's; 0 is nobody's."""
        if number:
            self._used.add(number)

    def release(self, number: int) -> None:
        """Nobody's again."""
        self._used.discard(number)


def load(maps: dict[str, Map], pins: Path) -> Program:
    """The program of :func:`join`; the caller closes it. A map that ``maps`` lacks is made and pinned."""
    reuse = {MAP: maps[MAP]} if MAP in maps else {}
    with contextlib.closing(Collection.load(CollectionSpec.load(OBJECT), reuse=reuse)) as collection:
        if not reuse:
            collection.maps[MAP].pin(pins / MAP)
            maps[MAP] = Map.from_pin(pins / MAP)
        return Program(os.dup(collection.programs[PROGRAM].fd), PROGRAM)


def join(sandbox: Sandbox, operation: JoinClone, switch: Switch) -> None:
    """The entry, then both filters. Raises Conflict where another's qdisc or filter is in the way."""
    program = switch.cloner  # before the map, which comes with it
    tap, device = (_index(sandbox, name) for name in (operation.tap, operation.device))
    try:
        switch.maps[MAP].update(key(operation.index), value(operation, tap=tap, device=device))
    except KernelFailed as error:
        if error.errno != errno.E2BIG:
            raise
        raise NotSupported("tcfilter", "another clone", f"the map has {MOST} entries: delete one") from error
    for index in (tap, device):
        clsact.join(sandbox.rtnl, index, program.fd, name=PROGRAM, class_id=operation.index)


def remove(operation: RemoveClone, switch: Switch) -> None:
    """Nothing is done where the entry is gone, or another port's."""
    table = switch.maps.get(MAP)
    held = table.lookup(key(operation.index)) if table is not None else None
    if table is not None and held is not None and values.port_text(held) == operation.port_id:
        table.delete(key(operation.index))


def lacks(switch: Switch, port: Port) -> list[str]:
    """What the map says otherwise of a clone, as sentences; [] is well, and for any port that is none."""
    if not port.clone:
        return []
    table = switch.maps.get(MAP)
    held = table.lookup(key(port.clone)) if table is not None else None
    if held is None or values.port_text(held) != port.port_id:
        return [f"map {MAP} has no entry {port.clone} of port {port.port_id}"]
    if held[_HEAD.size :] != value(clone.join(port), tap=0, device=0)[_HEAD.size :]:
        return [f"map {MAP} has other addresses of port {port.port_id}"]
    return []


def key(index: int) -> bytes:
    """The key of pw_clones."""
    return index.to_bytes(4, sys.byteorder)


def value(operation: JoinClone, *, tap: int, device: int) -> bytes:
    """``struct pw_clone``: both numbers are those of the devices in the sandbox's namespace."""
    swaps = {4: (_NO_SWAP, _NO_SWAP), 6: (_NO_SWAP, _NO_SWAP)}
    group = _NO_SWAP
    for inner, own in zip(operation.inner, operation.addresses, strict=True):
        ours, theirs = values.address(own), values.address(inner)
        version = 6 if ":" in own else 4
        swaps[version] = (theirs + ours, ours + theirs)
        if version == 6:
            group = _solicited(ours) + _solicited(theirs)
    head = _HEAD.pack(int(operation.port_id, 16), tap, device)
    return b"".join((head, *swaps[4], *swaps[6], group))


def _solicited(address: bytes) -> bytes:
    """The group in which neighbours ask for an IPv6 address (RFC 4291, 2.7.1)."""
    return ipaddress.IPv6Address("ff02::1:ff00:0").packed[:13] + address[13:]


def _index(sandbox: Sandbox, name: str) -> int:
    link = rtnl.link_by_name(sandbox.rtnl, name)
    if link is None:
        raise NotFound("device", name)
    return link.index
