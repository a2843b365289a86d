"""The chained table: taps of ours on devices that other plugins made, by id and by CNI attachment."""

from __future__ import annotations

import msgspec

from portwright.model.errors import NotFound
from portwright.model.port import Chained
from portwright.store.database import Row, damaged
from portwright.store.resolved import ResolvedTable

_decoder = msgspec.json.Decoder(Chained)
_encoder = msgspec.json.Encoder()


class ChainedTable(ResolvedTable):
    """One row for each of them; an owner may have several."""

    def put_chained(self, one: Chained) -> None:
        """Insert it, or replace the record of the same ``port_id``."""
        owner = one.port.owner
        row = (one.port.port_id, owner.key(), owner.container_id, _encoder.encode(one))
        with self._write():
            self._run("INSERT OR REPLACE INTO chained VALUES (?, ?, ?, ?)", row)

    def chained(self, owner: str | None = None) -> list[Chained]:
        """All of them, or those of an ``owner.key()``; by ``port_id``."""
        query = "SELECT body FROM chained WHERE (?1 IS NULL OR owner_key = ?1) ORDER BY port_id"
        return [self._decode_chained(row) for row in self._rows(query, (owner,))]

    def find_chained(self, text: str) -> Chained | None:
        """The one whose id this is, or the only one of the container of this id; else None."""
        query = "SELECT body FROM chained WHERE port_id = ?1 OR alias = ?1"
        found = [self._decode_chained(row) for row in self._rows(query, (text,))]
        return found[0] if len(found) == 1 else None

    def delete_chained(self, port_id: str) -> None:
        """Delete the record. Raises NotFound."""
        with self._write():
            if self._run("DELETE FROM chained WHERE port_id = ?", (port_id,)).rowcount == 0:
                raise NotFound("port", port_id)

    def _decode_chained(self, row: Row) -> Chained:
        try:
            return _decoder.decode(row[0])
        except msgspec.MsgspecError as error:
            raise damaged(self.path, f"the record of a chained tap can't be read ({error})") from error
