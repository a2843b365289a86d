"""The ports table: one row per port, with the model's struct as JSON."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import msgspec

from portwright.model.errors import Conflict, NotFound
from portwright.model.port import Port, PortState
from portwright.store.database import Row, damaged
from portwright.store.networks import NetworkTable

_PUT = """
INSERT INTO ports(port_id, owner_key, network, state, rep_name, alias, body) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT(port_id) DO UPDATE SET owner_key = excluded.owner_key, network = excluded.network,
    state = excluded.state, rep_name = excluded.rep_name, alias = excluded.alias, body = excluded.body
"""
_SHOWN = 5  # candidates that an 'ambiguous' error names

_decoder = msgspec.json.Decoder(Port)
_encoder = msgspec.json.Encoder()


class PortTable(NetworkTable):
    """Ports by ``port_id``, by owner and by what a person types."""

    _ports_version = 0

    @property
    def ports_version(self) -> int:
        """The same as long as no port is another than before, and none is new or gone."""
        return self._ports_version

    def put_port(self, port: Port) -> None:
        """Insert the port, or replace the record of the same ``port_id``.

        Raises Conflict if another port has this owner (``duplicate allocation is not
        allowed``, as host-local says) or this representor's name (then another port_id
        is needed), and NotFound if there is no such network.
        """
        alias = port.owner.name or port.owner.container_id
        values = (
            port.port_id,
            port.owner.key(),
            port.network,
            port.state.value,
            port.rep_name,
            alias,
            _encoder.encode(port),
        )
        with self._write():
            self._ports_change()
            try:
                self._run(_PUT, values, may_refuse=True)
            except sqlite3.IntegrityError as error:
                raise self._why_refused(port, error) from None

    def get_port(self, port_id: str) -> Port:
        """Return the port. Raises NotFound."""
        rows = self._rows("SELECT body FROM ports WHERE port_id = ?", (port_id,))
        if not rows:
            raise NotFound("port", port_id)
        return self._decode(rows[0])

    def port_by_owner(self, key: str) -> Port | None:
        """Return the port whose ``owner.key()`` this is, or None (DEL of an unknown one is no error)."""
        rows = self._rows("SELECT body FROM ports WHERE owner_key = ?", (key,))
        return self._decode(rows[0]) if rows else None

    def find_port(self, text: str) -> Port:
        """Return the port that a person means.

        The first of these that matches decides: the port_id or the representor's name;
        the name or container id; the beginning of a port_id, name or container id.
        Raises NotFound, and Conflict (naming some) if that matches several ports.
        """
        if not text:
            raise NotFound("port", text)
        exact = "SELECT body FROM ports WHERE port_id = ?1 OR rep_name = ?1"
        alias = "SELECT body FROM ports WHERE alias = ? ORDER BY port_id"
        start = (
            "SELECT body FROM ports WHERE substr(port_id, 1, length(?1)) = ?1 "
            "OR substr(alias, 1, length(?1)) = ?1 ORDER BY port_id"
        )
        for query in (exact, alias, start):
            found = [self._decode(row) for row in self._rows(query, (text,))]
            if len(found) == 1:
                return found[0]
            if found:
                names = [f"{p.port_id} ({p.owner.key()})" for p in found[:_SHOWN]]
                more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
                why = f"could be {len(found)} ports: {', '.join(names)}{more}; give more of the port_id"
                raise Conflict("port", text, why)
        raise NotFound("port", text)

    def ports(self, network: str | None = None, state: PortState | None = None) -> Iterator[Port]:
        """Yield ports by ``port_id``, all or those of a network and/or in a state.

        The selection is made at the first step; ports may be changed while iterating.
        """
        yield from map(
            self._decode,
            self._rows(
                "SELECT body FROM ports WHERE (?1 IS NULL OR network = ?1) AND (?2 IS NULL OR state = ?2) "
                "ORDER BY port_id",
                (network, state.value if state else None),
            ),
        )

    def port_count(self, network: str | None = None) -> int:
        """Count ports, all or those of a network, without decoding them."""
        query = "SELECT count(*) FROM ports WHERE (?1 IS NULL OR network = ?1)"
        return int(self._rows(query, (network,))[0][0])

    def delete_port(self, port_id: str) -> None:
        """Delete the record. Raises NotFound, and Conflict while it holds addresses (see ``release``)."""
        with self._write():
            self._ports_change()
            held = self._rows("SELECT address FROM addresses WHERE port_id = ?", (port_id,))
            if held:
                why = f"still holds {', '.join(row[0] for row in held)}; release its addresses first"
                raise Conflict("port", port_id, why)
            if self._run("DELETE FROM ports WHERE port_id = ?", (port_id,)).rowcount == 0:
                raise NotFound("port", port_id)

    def _ports_change(self) -> None:
        """They do now, and do again if this is rolled back."""
        self._ports_version += 1
        self._on_rollback(self._ports_changed)

    def _ports_changed(self) -> None:
        self._ports_version += 1

    def _decode(self, row: Row) -> Port:
        try:
            return _decoder.decode(row[0])
        except msgspec.MsgspecError as error:
            raise damaged(self.path, f"the record of a port can't be read ({error})") from error

    def _why_refused(self, port: Port, error: sqlite3.IntegrityError) -> Exception:
        what = str(error)
        if "FOREIGN KEY" in what:
            return NotFound("network", port.network)
        if "owner_key" in what:
            other = self.port_by_owner(port.owner.key())
            has = other.port_id if other else "unknown"
            why = f"duplicate allocation is not allowed: port {has} is there for it"
            return Conflict("port", port.owner.key(), why)
        return Conflict("representor", port.rep_name, "another port has this name; take another port_id")
