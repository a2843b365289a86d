"""From a compiled policy's numbers to the bytes of the maps of dataplane/policy.h. Pure."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Sequence

from portwright.dataplane import values
from portwright.dataplane.abi import PwNetKey, PwPeer, PwPolicyConst, PwSet, PwVerdict

_STARTS = int(PwPolicyConst.SET_STARTS)
_WORDS = struct.Struct(f"={_STARTS}I")
_WORD = struct.Struct("=I")
_UNUSED = 0xFFFFFFFF
#: struct pw_cell_key, without the detour over its name: there are a hundred thousand of them.
_CELL = struct.Struct("=III").pack


def verdict_word(
    *, allow: bool, rule: int, log: bool = False, keep: bool = False, reset: bool = False
) -> int:
    """``enum pw_verdict``: the rule's number with its bits. ValueError for a number that does not fit.

    ``keep``, ``reset``: what a denial means for a flow that is open.
    """
    if not 0 <= rule <= PwVerdict.V_RULE:
        raise ValueError(f"rule number {rule} does not fit in {PwVerdict.V_RULE:#x}")
    bits = PwVerdict.V_LOG if log else 0
    if not allow:
        bits |= PwVerdict.V_DENY | (PwVerdict.V_KEEP if keep else 0) | (PwVerdict.V_RESET if reset else 0)
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
    spare = _STARTS - count
    return PwSet(
        starts=_WORDS.pack(*starts, *([_UNUSED] * spare)),
        defaults=_WORDS.pack(*by_interval, *([0] * spare)),
        classes=bytes(classes) + bytes(spare),
    ).pack()


def split_value(*, starts: Sequence[int], sets: Sequence[int]) -> bytes:
    """The value of pw_sets where source ports choose the set: a first start that is not 0 says so.

    ValueError as set_value's.
    """
    count = len(starts)
    if not 0 < count <= _STARTS or starts[0] != 0 or len(sets) != count:
        raise ValueError(f"{count} intervals, of {_STARTS} at most, the first at 0")
    spare = _STARTS - count
    return PwSet(
        starts=_WORDS.pack(1, *starts[1:], *([_UNUSED] * spare)),
        defaults=_WORDS.pack(*sets, *([0] * spare)),
        classes=bytes(_STARTS),
    ).pack()


def cell_key(set_id: int, class_id: int, port_class: int) -> bytes:
    """The key of pw_cells."""
    return _CELL(set_id, class_id, port_class)
