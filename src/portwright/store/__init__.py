"""The durable record: one SQLite file, written by one daemon, with the addresses in memory too."""

from __future__ import annotations

from portwright.store.journal import JournalEntry
from portwright.store.owned import OwnedThing
from portwright.store.store import Store

__all__ = ["JournalEntry", "OwnedThing", "Store"]
