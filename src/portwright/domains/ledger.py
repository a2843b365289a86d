"""What is resolved now: for each port, by the name or pattern that its rules ask for, until when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

#: Addresses that one answer may have, one port may have open at once, and all ports together.
MAX_PER_ANSWER, MAX_PER_PORT, MAX_IN_ALL = 64, 1024, 32_768
#: Seconds beyond an answer's TTL: the sandbox counts from when it hears it, and then has to connect. An
#: answer for the connection of the moment (TTL 0) lives so long.
MOMENT = 2.0
#: The longest that an answer counts, whatever it says.
MAX_TTL = 86_400

_Pair: TypeAlias = tuple[str, str]


class TooMany(Exception):
    """An answer for which there is no room; the sentence says which bound it is."""


class Entry(NamedTuple):
    """An address that a name stands for, for a port. ``until``: on the caller's clock."""

    port_id: str
    pattern: str
    address: str
    until: float


class Ledger:
    """Bookkeeping only: it has no clock and installs nothing."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._known: dict[str, dict[_Pair, float]] = {}
        for entry in entries:
            self._known.setdefault(entry.port_id, {})[entry.pattern, entry.address] = entry.until

    def __len__(self) -> int:
        """How many entries there are."""
        return sum(map(len, self._known.values()))

    def learn(
        self, port_id: str, patterns: Iterable[str], addresses: tuple[str, ...], until: float
    ) -> tuple[Entry, ...]:
        """Adds an answer's addresses, or prolongs them; returns those that are new to the port.

        Raises TooMany, and then nothing has changed.
        """
        known = self._known.get(port_id, {})
        pairs = [(pattern, address) for pattern in patterns for address in addresses]
        new = [pair for pair in pairs if pair not in known]
        if len(addresses) > MAX_PER_ANSWER:
            raise TooMany(f"an answer has {len(addresses)} addresses, at most {MAX_PER_ANSWER} are taken")
        if len(known) + len(new) > MAX_PER_PORT:
            raise TooMany(f"port {port_id} has {len(known)} addresses by name, of {MAX_PER_PORT}")
        if len(self) + len(new) > MAX_IN_ALL:
            raise TooMany(f"all ports together have {len(self)} addresses by name, of {MAX_IN_ALL}")
        for pair in pairs:
            known[pair] = max(until, known.get(pair, until))
        if known:
            self._known[port_id] = known
        return tuple(Entry(port_id, *pair, known[pair]) for pair in new)

    def entry(self, port_id: str, pattern: str, address: str) -> Entry:
        """One that is there, with its end. Raises KeyError."""
        return Entry(port_id, pattern, address, self._known[port_id][pattern, address])

    def forget(self, entries: Iterable[Entry]) -> None:
        """Takes entries away; one that is not there is no error."""
        for entry in entries:
            known = self._known.get(entry.port_id, {})
            known.pop((entry.pattern, entry.address), None)
            if not known:
                self._known.pop(entry.port_id, None)

    def keep(self, entries: Iterable[Entry], until: float) -> None:
        """Prolongs entries that are there."""
        for entry in entries:
            known = self._known.get(entry.port_id, {})
            if (entry.pattern, entry.address) in known:
                known[entry.pattern, entry.address] = until

    def put_back(self, entries: Iterable[Entry], until: float) -> None:
        """Adds what was there a moment ago, within no bound, until then."""
        for entry in entries:
            self._known.setdefault(entry.port_id, {})[entry.pattern, entry.address] = until

    def unasked(self, asked: Mapping[str, tuple[str, ...]]) -> tuple[Entry, ...]:
        """What no rule asks for any more; ``asked``: the names and patterns of each port."""
        return tuple(entry for entry in self if entry.pattern not in asked.get(entry.port_id, ()))

    def due(self, now: float) -> tuple[Entry, ...]:
        """What has had its time."""
        return tuple(entry for entry in self if entry.until <= now)

    def next_due(self) -> float | None:
        """When the first entry has had its time; None: there is none."""
        return min((until for known in self._known.values() for until in known.values()), default=None)

    def table(self) -> dict[str, tuple[str, ...]]:
        """Addresses by the name or pattern that rules ask for, as policy takes them."""
        return table_of(self)

    def __iter__(self) -> Iterator[Entry]:
        """Every entry."""
        for port_id, known in self._known.items():
            for (pattern, address), until in known.items():
                yield Entry(port_id, pattern, address, until)


def table_of(entries: Iterable[Entry]) -> dict[str, tuple[str, ...]]:
    """Addresses by name or pattern, each once, sorted."""
    found: dict[str, set[str]] = {}
    for entry in entries:
        found.setdefault(entry.pattern, set()).add(entry.address)
    return {pattern: tuple(sorted(addresses)) for pattern, addresses in sorted(found.items())}
