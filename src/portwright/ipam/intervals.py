"""A set of integers kept as disjoint intervals: 'the next one that is free' without a walk.

The allocator asks one question of all the addresses that are taken: which is the
smallest free one from here on. A hash set answers it by walking, which costs most
when a pool is nearly full. Coalesced intervals answer it by one bisection, for an
IPv6 /64 as for a /24.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class IntervalSet:
    """A mutable set of integers.

    ``add``/``discard`` cost a bisection and a memmove of the interval lists (some
    microseconds at 32,768 intervals); ``next_free`` and ``in`` a bisection.
    """

    __slots__ = ("_ends", "_starts")

    def __init__(self, values: Iterable[int] = ()) -> None:
        """Hold ``values``, in any order, repeats allowed; O(n log n)."""
        self._starts: list[int] = []
        self._ends: list[int] = []  # inclusive; _ends[i] + 1 < _starts[i + 1]
        for value in sorted(values):
            if self._ends and value <= self._ends[-1] + 1:
                self._ends[-1] = value
            else:
                self._starts.append(value)
                self._ends.append(value)

    def __contains__(self, value: int) -> bool:
        """Tell whether ``value`` is a member."""
        i = bisect_right(self._starts, value) - 1
        return i >= 0 and value <= self._ends[i]

    def intervals(self) -> Iterator[tuple[int, int]]:
        """Yield the maximal (first, last) runs in ascending order."""
        return zip(self._starts, self._ends, strict=True)

    def add(self, value: int) -> None:
        """Make ``value`` a member; no effect if it is one."""
        starts, ends = self._starts, self._ends
        i = bisect_right(starts, value)  # the run after value
        if i and value <= ends[i - 1]:
            return
        joins_left = i > 0 and ends[i - 1] == value - 1
        joins_right = i < len(starts) and starts[i] == value + 1
        if joins_left and joins_right:
            ends[i - 1] = ends[i]
            del starts[i], ends[i]
        elif joins_left:
            ends[i - 1] = value
        elif joins_right:
            starts[i] = value
        else:
            starts.insert(i, value)
            ends.insert(i, value)

    def discard(self, value: int) -> None:
        """Make ``value`` no member; no effect if it is none."""
        starts, ends = self._starts, self._ends
        i = bisect_right(starts, value) - 1
        if i < 0 or value > ends[i]:
            return
        first, last = starts[i], ends[i]
        if first == last:
            del starts[i], ends[i]
        elif value == first:
            starts[i] = value + 1
        elif value == last:
            ends[i] = value - 1
        else:
            ends[i] = value - 1
            starts.insert(i + 1, value + 1)
            ends.insert(i + 1, last)

    def next_free(self, value: int) -> int:
        """Return the smallest integer >= ``value`` that is no member."""
        i = bisect_right(self._starts, value) - 1
        if i >= 0 and value <= self._ends[i]:
            return self._ends[i] + 1
        return value

    def count(self, first: int, last: int) -> int:
        """Count the members in [first, last], first <= last; linear in the runs that overlap it."""
        total = 0
        for i in range(bisect_left(self._ends, first), bisect_right(self._starts, last)):
            total += min(last, self._ends[i]) - max(first, self._starts[i]) + 1
        return total
