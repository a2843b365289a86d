"""Sets of whole numbers as sorted half-open ranges: services, and places in the order of addresses.

Every value is canonical: ``(first, end)`` pairs, ascending, ``first < end``, none touching the next. So equal
sets are equal values, and may be keys.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from operator import itemgetter
from typing import TypeAlias

Ranges: TypeAlias = tuple[tuple[int, int], ...]

EMPTY: Ranges = ()

_first = itemgetter(0)


def union(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """What lies in at least one of ``pairs``, none of them empty, which may overlap and come in any order."""
    ordered = sorted(pairs)
    if len(ordered) < 2:
        return tuple(ordered)
    out: list[tuple[int, int]] = []
    first, end = ordered[0]
    for next_first, next_end in ordered[1:]:
        if next_first <= end:
            end = max(end, next_end)
        else:
            out.append((first, end))
            first, end = next_first, next_end
    out.append((first, end))
    return tuple(out)


def intersect(left: Ranges, right: Ranges) -> Ranges:
    """What lies in both."""
    if left is right:
        return left
    if len(left) > len(right):
        left, right = right, left
    out: list[tuple[int, int]] = []
    if len(left) * 8 < len(right):  # few in many: find each
        for low, high in left:
            at = max(0, bisect_right(right, low, key=_first) - 1)
            while at < len(right) and right[at][0] < high:
                first, end = max(low, right[at][0]), min(high, right[at][1])
                if first < end:
                    out.append((first, end))
                at += 1
        return tuple(out)
    i = j = 0
    while i < len(left) and j < len(right):
        first, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if first < end:
            out.append((first, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return tuple(out)


def complement(ranges: Ranges, end: int) -> Ranges:
    """What of ``[0, end)`` does not lie in ``ranges``."""
    out: list[tuple[int, int]] = []
    at = 0
    for first, last in ranges:
        if at < first:
            out.append((at, first))
        at = last
    if at < end:
        out.append((at, end))
    return tuple(out)


def subtract(left: Ranges, right: Ranges) -> Ranges:
    """What lies in ``left`` and not in ``right``."""
    if not left or not right:
        return left
    return intersect(left, complement(right, max(left[-1][1], right[-1][1])))


def contains(ranges: Ranges, number: int) -> bool:
    """Whether ``number`` lies in it."""
    place = bisect_right(ranges, number, key=_first) - 1
    return place >= 0 and number < ranges[place][1]
