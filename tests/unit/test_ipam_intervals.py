"""IntervalSet behaves as a set of integers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from portwright.ipam.intervals import IntervalSet

small = st.integers(min_value=0, max_value=40)


@given(
    st.lists(small),
    st.lists(st.tuples(st.booleans(), small)),
)
def test_agrees_with_a_set(start: list[int], steps: list[tuple[bool, int]]) -> None:
    """After any adds and discards, members, runs, counts and next_free are those of a plain set."""
    intervals, plain = IntervalSet(start), set(start)
    for add, value in steps:
        if add:
            intervals.add(value)
            plain.add(value)
        else:
            intervals.discard(value)
            plain.discard(value)
    assert {v for lo, hi in intervals.intervals() for v in range(lo, hi + 1)} == plain
    runs = list(intervals.intervals())
    assert all(a[1] + 1 < b[0] for a, b in pairwise(runs)), "runs are maximal and ascending"
    for value in range(-1, 43):
        assert (value in intervals) == (value in plain)
        assert intervals.next_free(value) == next(v for v in range(value, 99) if v not in plain)
        assert intervals.count(value - 5, value) == len([v for v in plain if value - 5 <= v <= value])


def test_ipv6_size() -> None:
    """Integers of 128 bits are as good as small ones."""
    base = 0x20010DB8 << 96
    intervals = IntervalSet(base + i for i in range(1000))
    assert intervals.next_free(base) == base + 1000
    assert list(intervals.intervals()) == [(base, base + 999)]
