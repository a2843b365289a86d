"""Places for look-ups: how many a port may have under way, and all ports together.

A few ports whose resolvers never answer would hold every place. So when all are taken, whoever holds the most
gives way to one that holds less, and loses its oldest.
"""

from __future__ import annotations

import asyncio

#: Queries under way at once, of one port and of all; a socket each.
MAX_QUERIES, MAX_QUERIES_IN_ALL = 64, 512
#: TCP connections of one port, and of all. Together well below 1,024, the common limit of open files.
MAX_CONNECTIONS, MAX_CONNECTIONS_IN_ALL = 16, 128


class Refused(Exception):
    """The answer can't be let through: a bound is reached, or policy could not take it."""


class Place:
    """One that is taken, until ``Places.free``. ``task``: what is cancelled to make room."""

    def __init__(self, port_id: str) -> None:
        self.port_id = port_id
        self.task: asyncio.Task[None] | None = None


class Places:
    """``each`` for a port, ``in_all`` for all of them."""

    def __init__(self, each: int, in_all: int) -> None:
        self._each, self._in_all = each, in_all
        #: by port, the oldest first
        self._held: dict[str, dict[Place, None]] = {}
        self._taken = 0

    def held(self, port_id: str) -> int:
        """How many a port has."""
        return len(self._held.get(port_id, ()))

    def take(self, port_id: str) -> Place | None:
        """A place for a port, if need be of one that holds at least two more; None: there is none."""
        mine = self.held(port_id)
        if mine >= self._each:
            return None
        if self._taken >= self._in_all:
            greedy = max(self._held.values(), key=len)
            if len(greedy) < mine + 2:
                return None
            oldest = next(iter(greedy))
            self.free(oldest)
            if oldest.task is not None:
                oldest.task.cancel()
        place = Place(port_id)
        self._held.setdefault(port_id, {})[place] = None
        self._taken += 1
        return place

    def free(self, place: Place) -> None:
        """Gives a place back; one that was given up already is no error."""
        held = self._held.get(place.port_id, {})
        if place not in held:
            return
        del held[place]
        self._taken -= 1
        if not held:
            del self._held[place.port_id]


class Load:
    """What is under way, of all ports together."""

    def __init__(self) -> None:
        self.queries = Places(MAX_QUERIES, MAX_QUERIES_IN_ALL)
        self.connections = Places(MAX_CONNECTIONS, MAX_CONNECTIONS_IN_ALL)
