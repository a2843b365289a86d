"""Numbers for values: what had one keeps it, what is new gets one that nothing in force has."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import count
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Numbers(Generic[K]):
    """``before``: the numbers in force; with ``keep`` false no value keeps its own, and none is reused.

    ``dense``: new numbers are the smallest free, for what indexes a map; else they are larger than any ever
    given, and never mean anything else.
    """

    def __init__(
        self, first: int, before: Numbers[K] | None = None, *, dense: bool, keep: bool = True
    ) -> None:
        self._before: dict[K, int] = {} if before is None else before.used
        self._last: int = first - 1 if before is None else before.last
        self._keep = keep
        self.used: dict[K, int] = {}
        taken = frozenset(self._before.values()) if dense else frozenset()
        start = first if dense else self._last + 1
        self._free: Iterator[int] = (number for number in count(start) if number not in taken)

    def of(self, key: K) -> int:
        """The number of ``key``."""
        known = self.used.get(key)
        if known is None:
            known = self._before.get(key) if self._keep else None
            if known is None:
                known = next(self._free)
                self._last = max(self._last, known)
            self.used[key] = known
        return known

    @property
    def last(self) -> int:
        """The largest number ever given."""
        return self._last

    def is_new(self, key: K) -> bool:
        """Whether ``key`` had no number before, or could not keep it."""
        return not self._keep or key not in self._before
