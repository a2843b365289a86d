"""The journal: what the daemon set out to do, so that a crash can be rolled on or back."""

from __future__ import annotations

import time
from typing import Final, Literal, NamedTuple

from portwright.model.errors import InternalError
from portwright.store.addresses import AddressTable

#: Closed entries kept for people to read; the newest of them stay.
KEEP: Final = 1000
_PRUNE_EVERY: Final = 64  # so that pruning costs a delete per 64 entries, not one each

JournalState = Literal["intent", "done", "failed"]


class JournalEntry(NamedTuple):
    """One undertaking. ``plan`` is the writer's own encoding; ``created`` unix seconds."""

    id: int
    port_id: str
    kind: str
    plan: bytes
    state: JournalState
    created: float


class JournalTable(AddressTable):
    """Intents and their ends."""

    def begin(self, port_id: str, kind: str, plan: bytes) -> int:
        """Write an intent and return its id, larger than any before. Do it in a durable transaction."""
        with self._write():
            cursor = self._run(
                "INSERT INTO journal(port_id, kind, plan, state, created) VALUES (?, ?, ?, 'intent', ?)",
                (port_id, kind, plan, time.time()),
            )
        if cursor.lastrowid is None:
            raise InternalError("the journal gave no id")
        return cursor.lastrowid

    def finish(self, entry_id: int, state: Literal["done", "failed"]) -> None:
        """Close an intent. Raises InternalError if it is not open: somebody else closed it."""
        with self._write():
            query = "UPDATE journal SET state = ? WHERE id = ? AND state = 'intent'"
            if self._run(query, (state, entry_id)).rowcount != 1:
                raise InternalError(f"journal entry {entry_id} is not an open intent")
            if entry_id % _PRUNE_EVERY == 0:
                self.prune()

    def pending(self) -> list[JournalEntry]:
        """Return the open intents, oldest first: what recovery has to look at."""
        return self._entries("WHERE state = 'intent' ORDER BY id")

    def history(self, limit: int = 100) -> list[JournalEntry]:
        """Return the newest ``limit`` entries of any state, newest first."""
        return self._entries("ORDER BY id DESC LIMIT ?", limit)

    def prune(self) -> None:
        """Drop all closed entries but the newest 1,000; open intents are never dropped."""
        with self._write():
            self._run(
                "DELETE FROM journal WHERE state != 'intent' AND id <= "
                "(SELECT id FROM journal WHERE state != 'intent' ORDER BY id DESC LIMIT 1 OFFSET ?)",
                (KEEP,),
            )

    def _entries(self, where: str, *values: int) -> list[JournalEntry]:
        rows = self._rows(f"SELECT id, port_id, kind, plan, state, created FROM journal {where}", values)  # noqa: S608 - a constant of ours
        return [JournalEntry._make(row) for row in rows]
