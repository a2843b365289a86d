"""What an older release pinned, in the shape that these programs read."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from portwright.dataplane import bounds
from portwright.dataplane.abi import PwNetKey
from portwright.kernel.bpf import Map
from portwright.node import generations

#: Up to ABI 4 nets were a prefix tree, under this name.
_NETS = "pw_nets"
_U32 = struct.Struct("=I")


def carry(maps: Mapping[str, Map]) -> None:
    """Enters what is in force as these programs look it up, before they judge a packet. May be repeated."""
    number = generations.in_force(maps)
    if _NETS not in maps or not number:
        return
    slot = generations.slot_of(number)
    raw = maps[_NETS].lookup(slot)
    if raw is None or maps["pw_bounds"].lookup(slot) is not None:
        return
    with closing(Map.from_id(int(_U32.unpack(raw)[0]))) as inner:
        found = [(PwNetKey.unpack(key), int(_U32.unpack(value)[0])) for key, value in inner.items()]
    nets = ((int.from_bytes(key.addr), key.prefixlen, class_id) for key, class_id in found)
    generations.enter_bounds(maps, slot, bounds.tree(bounds.bounds(nets)))


def forget(pins: Path) -> None:
    """Removes what only the older release's programs read, once they are gone."""
    (pins / "maps" / _NETS).unlink(missing_ok=True)
