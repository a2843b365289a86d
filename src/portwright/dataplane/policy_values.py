"""From a compiled policy's numbers to the bytes of the maps of dataplane/policy.h. Pure."""

from __future__ import annotations

import ipaddress
import struct
from array import array
from collections.abc import Sequence

from portwright.dataplane import values
from portwright.dataplane.abi import PwNetKey, PwPeer, PwPolicyConst, PwSet, PwVerdict

_STARTS = int(PwPolicyConst.SET_STARTS)
_WORD = struct.Struct("=I")
#: As plain numbers: there are thousands of words, and an operation of an enum's takes a microsecond.
_RULE, _LOG, _DENY = int(PwVerdict.V_RULE), int(PwVerdict.V_LOG), int(PwVerdict.V_DENY)
_KEEP, _RESET = int(PwVerdict.V_KEEP), int(PwVerdict.V_RESET)
_UNUSED, _ZEROS = b"\xff" * 4 * _STARTS, bytes(4 * _STARTS)
#: struct pw_cell_key, without the detour over its name: there are a hundred thousand of them.
_CELL = struct.Struct("=III").pack
_CELL_BYTES = struct.calcsize("=III")


def verdict_word(
    *, allow: bool, rule: int, log: bool = False, keep: bool = False, reset: bool = False
) -> int:
    """``enum pw_verdict``: the rule's number with its bits. ValueError for a number that does not fit.

    ``keep``, ``reset``: what a denial means for a flow that is open.
    """
    if not 0 <= rule <= _RULE:
        raise ValueError(f"rule number {rule} does not fit in {_RULE:#x}")
    bits = _LOG if log else 0
    if not allow:
        bits |= _DENY | (_KEEP if keep else 0) | (_RESET if reset else 0)
    return rule | bits


def peer_value(*, class_id: int, set_in: int, set_out: int, owner: int) -> bytes:
    """The value of pw_peers; its key is ``values.address``."""
    return PwPeer(class_id=class_id, set_in=set_in, set_out=set_out, owner=owner).pack()


def net_key(cidr: str) -> bytes:
    """The key of pw_early: an IPv4 prefix counts from its place in the mapped address."""
    net = ipaddress.ip_network(cidr)
    extra = 128 - net.max_prefixlen
    raw = values.address(str(net.network_address))
    return PwNetKey(prefixlen=net.prefixlen + extra, addr=raw).pack()


def number_value(number: int) -> bytes:
    """The value of pw_cells, a verdict word."""
    return _WORD.pack(number)


def set_value(*, starts: Sequence[int], classes: Sequence[int], defaults: Sequence[int]) -> bytes:
    """The value of pw_sets. ``defaults`` are verdict words by port class; ``classes`` by interval.

    ValueError for more intervals than an entry holds, or where the first does not begin at 0.
    """
    count = len(starts)
    if not 0 < count <= _STARTS or starts[0] != 0 or len(classes) != count:
        raise ValueError(f"{count} intervals, of {_STARTS} at most, the first at 0")
    by_interval = [defaults[place] for place in classes]
    return PwSet(
        starts=_words(starts, _UNUSED),
        defaults=_words(by_interval, _ZEROS),
        classes=bytes(classes) + bytes(_STARTS - count),
    ).pack()


def split_value(*, starts: Sequence[int], sets: Sequence[int]) -> bytes:
    """The value of pw_sets where source ports choose the set: a first start that is not 0 says so.

    ValueError as set_value's.
    """
    count = len(starts)
    if not 0 < count <= _STARTS or starts[0] != 0 or len(sets) != count:
        raise ValueError(f"{count} intervals, of {_STARTS} at most, the first at 0")
    return PwSet(
        starts=_words((1, *starts[1:]), _UNUSED),
        defaults=_words(sets, _ZEROS),
        classes=bytes(_STARTS),
    ).pack()


def _words(numbers: Sequence[int], rest: bytes) -> bytes:
    """All words of an entry: these first, then those of ``rest``."""
    return array("I", numbers).tobytes() + rest[4 * len(numbers) :]


def cell_key(set_id: int, class_id: int, port_class: int) -> bytes:
    """The key of pw_cells."""
    return _CELL(set_id, class_id, port_class)


def cell_keys(sets: array[int], classes: array[int], port_classes: array[int]) -> bytes:
    """Keys of pw_cells, one after the other; the numbers are arrays of u32, all of one length."""
    keys = array("I", bytes(_CELL_BYTES * len(sets)))
    keys[0::3], keys[1::3], keys[2::3] = sets, classes, port_classes
    return keys.tobytes()
