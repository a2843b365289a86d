"""What else the daemon made or changed on the host, so that uninstalling can put it back."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from portwright.store.database import damaged
from portwright.store.journal import JournalTable


class OwnedThing(NamedTuple):
    """A thing on the host that is ours: ``kind`` (sysctl, nft-table, route, mount, ...) and ``name``."""

    kind: str
    name: str
    detail: Any


class OwnedTable(JournalTable):
    """Things by (kind, name), with a JSON detail."""

    def own(self, kind: str, name: str, detail: object = None) -> bool:
        """Record a thing; write it *before* making it. Tell whether the record is new.

        An existing record is kept as it is: the previous value of a sysctl is the one
        from before our first change, not from before the second.
        """
        with self._write():
            cursor = self._run(
                "INSERT INTO owned VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (kind, name, msgspec.json.encode(detail)),
            )
        return cursor.rowcount == 1

    def disown(self, kind: str, name: str) -> bool:
        """Drop a record; tell whether there was one."""
        with self._write():
            cursor = self._run("DELETE FROM owned WHERE kind = ? AND name = ?", (kind, name))
        return cursor.rowcount == 1

    def owned(self, kind: str | None = None) -> list[OwnedThing]:
        """Return the things of a kind, or all, by kind and name."""
        query = "SELECT kind, name, detail FROM owned WHERE (?1 IS NULL OR kind = ?1) ORDER BY kind, name"
        things = []
        for row_kind, name, detail in self._rows(query, (kind,)):
            try:
                things.append(OwnedThing(row_kind, name, msgspec.json.decode(detail)))
            except msgspec.MsgspecError as error:
                raise damaged(self.path, f"owned {row_kind} {name!r} can't be read ({error})") from error
        return things
