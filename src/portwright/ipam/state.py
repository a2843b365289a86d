"""What the allocator knows: who holds which address, which ones rest, where each set stands.

The state is the store's picture in memory. Every change returns its inverse, so that
the store can undo all of it when a transaction is rolled back, in reverse order.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from portwright.ipam.intervals import IntervalSet
from portwright.model.errors import InternalError

Undo = Callable[[], None]


class Allocation(NamedTuple):
    """One address given out: the index of its range set and its canonical text."""

    range_set: int
    address: str


class Usage(NamedTuple):
    """How full something is. Free is ``total - used - resting``."""

    used: int
    resting: int
    total: int


class Holder(NamedTuple):
    """Who has an address, and from which range set of which network it came."""

    port_id: str
    network: str
    range_set: int


class Rest(NamedTuple):
    """An address nobody has that may not be chosen yet; ``released_at`` is unix seconds."""

    released_at: float
    port_id: str
    network: str


@dataclass(slots=True)
class _Space:
    """One family's addresses. ``blocked`` is always the keys of ``used`` and ``resting``."""

    used: dict[int, Holder] = field(default_factory=dict)
    resting: dict[int, Rest] = field(default_factory=dict)
    blocked: IntervalSet = field(default_factory=IntervalSet)
    # (released_at, address), with entries that no longer rest left in place: see expire()
    queue: list[tuple[float, int]] = field(default_factory=list)


class AddressState:
    """Addresses of all networks of a host: an address has one owner in the whole store."""

    def __init__(
        self,
        used: Mapping[tuple[int, int], Holder] | None = None,
        resting: Mapping[tuple[int, int], Rest] | None = None,
        cursors: Mapping[tuple[str, int], tuple[int, int]] | None = None,
    ) -> None:
        """Start from records. Keys are (family, address); cursors map (network, range set)."""
        self.cursors: dict[tuple[str, int], tuple[int, int]] = dict(cursors or {})
        self._space = {4: _Space(), 6: _Space()}
        self._by_port: dict[str, list[tuple[int, int]]] = {}
        for (family, value), holder in (used or {}).items():
            self._space[family].used[value] = holder
            self._by_port.setdefault(holder.port_id, []).append((family, value))
        for (family, value), rest in (resting or {}).items():
            if value not in self._space[family].used:
                self._space[family].resting[value] = rest
        for space in self._space.values():
            space.blocked = IntervalSet([*space.used, *space.resting])
            space.queue = [(rest.released_at, value) for value, rest in space.resting.items()]
            heapq.heapify(space.queue)

    def holder(self, family: int, value: int) -> Holder | None:
        """Return who has the address, or None."""
        return self._space[family].used.get(value)

    def resting(self, family: int, value: int) -> Rest | None:
        """Return the rest of the address, or None."""
        return self._space[family].resting.get(value)

    def held_by(self, port_id: str) -> tuple[tuple[int, int], ...]:
        """Return the port's (family, address) pairs, in the order in which it got them."""
        return tuple(self._by_port.get(port_id, ()))

    def next_free(self, family: int, value: int) -> int:
        """Return the smallest address >= ``value`` that is neither used nor resting."""
        return self._space[family].blocked.next_free(value)

    def count(self, family: int, pieces: Iterable[tuple[int, int]]) -> tuple[int, int]:
        """Return (used, resting) within inclusive ``pieces``."""
        space = self._space[family]
        blocked = resting = 0
        for lo, hi in pieces:
            blocked += space.blocked.count(lo, hi)
            resting += sum(lo <= value <= hi for value in space.resting)
        return blocked - resting, resting

    def take(self, family: int, value: int, holder: Holder) -> Undo:
        """Record a new owner and move the set's cursor; ends a rest. Returns the inverse.

        Raises InternalError if somebody has the address: the allocator never offers one.
        """
        space = self._space[family]
        if value in space.used:
            raise InternalError(f"address {value} of family {family} is taken twice")
        key = (holder.network, holder.range_set)
        before, rest = self.cursors.get(key), space.resting.pop(value, None)
        space.used[value] = holder
        space.blocked.add(value)
        self.cursors[key] = (family, value)
        self._by_port.setdefault(holder.port_id, []).append((family, value))

        def undo() -> None:
            self._forget(family, value, rest)
            if before is None:
                del self.cursors[key]
            else:
                self.cursors[key] = before

        return undo

    def release(self, family: int, value: int, now: float | None) -> Undo:
        """End an ownership; the address rests from ``now`` on, or not at all if None."""
        holder = self._space[family].used[value]
        place = self._by_port[holder.port_id].index((family, value))
        rest = None if now is None else Rest(now, holder.port_id, holder.network)
        self._forget(family, value, rest)

        def undo() -> None:
            space = self._space[family]
            space.resting.pop(value, None)
            space.used[value] = holder
            space.blocked.add(value)
            self._by_port.setdefault(holder.port_id, []).insert(place, (family, value))

        return undo

    def drop_cursors(self, network: str) -> Undo:
        """Forget where the sets of a network stand. Returns the inverse."""
        gone = {key: self.cursors.pop(key) for key in list(self.cursors) if key[0] == network}
        return lambda: self.cursors.update(gone)

    def expire(self, now: float, rest_seconds: float) -> None:
        """Free the addresses whose rest is over at ``now``; amortized O(log n) per release.

        A release that lies in the future means that the clock was set back since; its
        rest starts again at ``now`` instead of lasting until the old time comes round.
        """
        for space in self._space.values():
            queue = space.queue
            while queue:
                released_at, value = queue[0]
                rest = space.resting.get(value)
                if rest is None or rest.released_at != released_at:
                    heapq.heappop(queue)  # it was given out (or released again) since
                elif released_at > now:
                    space.resting[value] = rest._replace(released_at=now)
                    heapq.heapreplace(queue, (now, value))
                elif released_at + rest_seconds <= now:
                    heapq.heappop(queue)
                    del space.resting[value]
                    space.blocked.discard(value)
                else:
                    break

    def _forget(self, family: int, value: int, rest: Rest | None) -> None:
        space = self._space[family]
        holder = space.used.pop(value)
        mine = self._by_port[holder.port_id]
        mine.remove((family, value))
        if not mine:
            del self._by_port[holder.port_id]
        if rest is None:
            space.blocked.discard(value)
        else:
            space.resting[value] = rest
            heapq.heappush(space.queue, (rest.released_at, value))
