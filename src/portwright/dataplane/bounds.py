"""Nets as the data path finds them: a search tree of bounds, the nodes of pw_bounds. Pure.

Between two neighbouring bounds every address is of one class. A look-up goes down from node 0, 9n + 1 to
9n + 9 being the children of node n, and has the class of the last bound that is not above the address
(dataplane/policy.h). With nine ways to a node that is six nodes where a prefix tree of 39,000 nets has 16.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Mapping

#: Bounds of a node. It has one more class than that, and room for 16.
_WIDTH = 8
_NODE = struct.Struct(f"={_WIDTH}Q{_WIDTH}Q16I")
_PAD = (1 << 128) - 1
_HALF = (1 << 64) - 1
_ROOM = (0,) * (15 - _WIDTH)
#: Where IPv4 begins (RFC 4291, 2.5.5.2), and how many bits are before it.
_V4, _V4_BITS = 0xFFFF << 32, 96

#: Its first place, how many of its 128 leading bits are fixed, and its class.
Net = tuple[int, int, int]


def nodes(prefixes: Mapping[str, int]) -> list[bytes]:
    """``struct pw_bounds`` in the order of their numbers, of classes by net; at least one."""
    return tree(bounds(net(cidr, class_id) for cidr, class_id in prefixes.items()))


def bounds(nets: Iterable[Net]) -> list[tuple[int, int]]:
    """Where the class of addresses changes, ascending, and to which; it is 0 before, and where no net is.

    Of nets around an address the longest counts.
    """
    out: list[tuple[int, int]] = []
    around: list[tuple[int, int]] = [(1 << 128, 0)]  # (one past the last place inside, class)

    def change(place: int, class_id: int) -> None:
        if out and out[-1][0] == place:
            out.pop()
        if class_id != (out[-1][1] if out else 0):
            out.append((place, class_id))

    def leave(place: int) -> None:
        """Out of the nets that end before ``place`` or there."""
        while len(around) > 1 and around[-1][0] <= place:
            end, _ = around.pop()
            change(end, around[-1][1])

    for first, length, class_id in sorted(nets):
        leave(first)
        change(first, class_id)
        around.append((first + (1 << (128 - length)), class_id))
    leave((1 << 128) - 1)
    return out


def tree(found: list[tuple[int, int]]) -> list[bytes]:
    """The nodes of ascending bounds."""
    count = max(1, -(-len(found) // _WIDTH))
    places: list[list[int]] = [[] for _ in range(count)]
    classes: list[list[int]] = [[] for _ in range(count)]
    ahead = iter(found)
    before = 0

    def fill(node: int) -> None:
        """In the order of the bounds: what is below each, then the bound."""
        nonlocal before
        for way in range(_WIDTH + 1):
            classes[node].append(before)
            child = node * (_WIDTH + 1) + 1 + way
            if child < count:
                fill(child)
            if way < _WIDTH:
                place, before = next(ahead, (_PAD, before))
                places[node].append(place)

    fill(0)
    return [
        _NODE.pack(*(p >> 64 for p in at), *(p & _HALF for p in at), *those, *_ROOM)
        for at, those in zip(places, classes, strict=True)
    ]


def net(cidr: str, class_id: int) -> Net:
    """A net of either family. OSError or ValueError for other text."""
    host, _, length = cidr.partition("/")
    if ":" in host:
        return int.from_bytes(socket.inet_pton(socket.AF_INET6, host)), int(length), class_id
    place = _V4 | int.from_bytes(socket.inet_aton(host))
    return place, _V4_BITS + int(length), class_id
