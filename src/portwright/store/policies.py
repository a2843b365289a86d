"""The manifests of policy, as they were applied: text by file name."""

from __future__ import annotations

from collections.abc import Collection

from portwright.store.owned import OwnedTable


class PolicyTable(OwnedTable):
    """Manifest files. What they mean is the policy layer's business."""

    def manifests(self) -> list[tuple[str, str]]:
        """(name, text) of every file, by name."""
        rows = self._rows("SELECT name, text FROM manifests ORDER BY name")
        return [(str(name), str(text)) for name, text in rows]

    def watched_manifests(self) -> set[str]:
        """The names of those that are of the watched folder."""
        return {str(name) for (name,) in self._rows("SELECT name FROM manifests WHERE watched")}

    def set_manifests(self, files: list[tuple[str, str]], watched: Collection[str] = ()) -> None:
        """Makes these all that there is, durably. ``watched``: the names of the folder's."""
        with self._write():
            self._run("DELETE FROM manifests")
            for name, text in files:
                row = (name, text, int(name in watched))
                self._run("INSERT INTO manifests(name, text, watched) VALUES (?, ?, ?)", row)
