"""Addresses that are open by a domain name, until when: what a restart must not forget."""

from __future__ import annotations

from collections.abc import Iterable

from portwright.store.policies import PolicyTable

#: (port_id, name or pattern of a rule, address)
Resolved = tuple[str, str, str]


class ResolvedTable(PolicyTable):
    """Rows as the daemon's ledger has them; what they mean is its business."""

    def resolved(self) -> list[tuple[str, str, str, float]]:
        """(port_id, name or pattern, address, until) of every one; ``until`` in unix seconds."""
        rows = self._rows("SELECT port_id, pattern, address, until FROM resolved")
        return [
            (str(port), str(pattern), str(address), float(until)) for port, pattern, address, until in rows
        ]

    def note_resolved(
        self, known: Iterable[tuple[str, str, str, float]], gone: Iterable[Resolved] = ()
    ) -> None:
        """Records these, each in the place of its former self, and forgets those. Not durable by itself."""
        with self.transaction(durable=False):
            for entry in gone:
                self._run("DELETE FROM resolved WHERE port_id = ? AND pattern = ? AND address = ?", entry)
            for row in known:
                self._run("INSERT OR REPLACE INTO resolved VALUES (?, ?, ?, ?)", row)
