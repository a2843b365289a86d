"""Addresses: the allocator's choice, written down in the transaction that needs it.

All of it is in memory too (loaded at open), so a reservation costs the same with ten
ports and with thousands. Memory changes with the statements and is taken back if the
transaction is not committed: at any moment without an open transaction, both agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from portwright.ipam.allocator import allocate
from portwright.ipam.allocator import usage as pool_usage
from portwright.ipam.ranges import Pools, compile_pools, parse_address, text
from portwright.ipam.state import AddressState, Allocation, Holder, Rest, Usage
from portwright.model.errors import Conflict, InvalidInput
from portwright.model.network import AddressRange
from portwright.store.database import damaged
from portwright.store.ports import PortTable


class AddressTable(PortTable):
    """Reservations. An address has one owner in the whole store, whatever its network."""

    def __init__(self, state_dir: Path, rest_seconds: float) -> None:
        """Open the file; ``_load_addresses`` must follow."""
        super().__init__(state_dir)
        self._rest_seconds = rest_seconds
        self._state = AddressState()

    def _load_addresses(self) -> None:
        try:
            self._state = AddressState(
                used={
                    parse_address("address", address): Holder(port_id, network, range_set)
                    for address, network, range_set, port_id in self._rows(
                        "SELECT address, network, range_set, port_id FROM addresses"
                    )
                },
                resting={
                    parse_address("address", address): Rest(released_at, port_id, network)
                    for address, network, released_at, port_id in self._rows(
                        "SELECT address, network, released_at, port_id FROM released"
                    )
                },
                cursors={
                    (network, range_set): parse_address("address", address)
                    for network, range_set, address in self._rows(
                        "SELECT network, range_set, last_address FROM cursors"
                    )
                },
            )
        except (InvalidInput, TypeError) as error:
            raise damaged(self.path, f"an address can't be read ({error})") from error

    def pools(self, network: str, pools: Sequence[Sequence[AddressRange]] | None = None) -> Pools:
        """Return the range sets a reservation would use, compiled; see :meth:`reserve`."""
        record = self.get_network(network)
        if pools is None:
            return compile_pools(network, record.pools, record.reserved, field="pools")
        return compile_pools(network, pools, record.reserved)

    def reserve(
        self,
        network: str,
        pools: Sequence[Sequence[AddressRange]] | None,
        port_id: str,
        requested: Sequence[str] = (),
        *,
        now: float,
    ) -> tuple[Allocation, ...]:
        """Give the port one address of each range set of ``network``, or nothing at all.

        ``pools`` replaces the network's own sets (CNI's ``ipRanges``: those, then its
        own); None means its own. The record of the port must be there when the
        transaction is committed. ``now`` is unix seconds. Raises NotFound (network) and
        what :func:`portwright.ipam.allocate` raises.
        """
        compiled = self.pools(network, pools)
        with self._write():
            chosen = allocate(
                compiled, self._state, requested=requested, now=now, rest_seconds=self._rest_seconds
            )
            for range_set, address in chosen:
                family, value = parse_address("address", address)
                self._run(
                    "INSERT INTO addresses VALUES (?, ?, ?, ?, ?)",
                    (address, family, network, range_set, port_id),
                )
                # There is a row if it was requested while it rested, or rested until just now.
                self._run("DELETE FROM released WHERE address = ?", (address,))
                self._run("INSERT OR REPLACE INTO cursors VALUES (?, ?, ?)", (network, range_set, address))
                self._on_rollback(self._state.take(family, value, Holder(port_id, network, range_set)))
        return tuple(chosen)

    def hold(self, network: str, port_id: str, addresses: Sequence[str]) -> None:
        """Record addresses that the port has already, so that nobody else gets them; all or nothing.

        As :meth:`reserve`, but any number of them from any of the network's sets, and none besides. Raises
        InvalidInput for one that lies in none of them, Conflict for one that a port has.
        """
        compiled = self.pools(network)
        with self._write():
            for address in addresses:
                family, value = parse_address("address", address)
                found = compiled.find(family, value)
                if found is None:
                    raise InvalidInput("address", address, f"is in no range of network {network!r}")
                holder = self._state.holder(family, value)
                if holder is not None:
                    raise Conflict("address", address, f"port {holder.port_id} has it")
                index = found[0].index
                self._run(
                    "INSERT INTO addresses VALUES (?, ?, ?, ?, ?)", (address, family, network, index, port_id)
                )
                self._run("DELETE FROM released WHERE address = ?", (address,))
                self._run("INSERT OR REPLACE INTO cursors VALUES (?, ?, ?)", (network, index, address))
                self._on_rollback(self._state.take(family, value, Holder(port_id, network, index)))

    def release(self, port_id: str, *, now: float, rest: bool = True) -> tuple[str, ...]:
        """Free all addresses of the port and return them; none is no error.

        They rest from ``now`` on. ``rest=False`` is for an ADD that is undone: no packet
        ever carried them, and a caller that tries again must not use up a small pool.
        """
        held = self._state.held_by(port_id)
        with self._write():
            self._run("DELETE FROM released WHERE released_at <= ?", (now - self._rest_seconds,))
            for family, value in held:
                address = text(family, value)
                holder = self._state.holder(family, value)
                network = holder.network if holder else ""
                self._run("DELETE FROM addresses WHERE address = ?", (address,))
                if rest:
                    self._run(
                        "INSERT OR REPLACE INTO released VALUES (?, ?, ?, ?)",
                        (address, network, now, port_id),
                    )
                self._on_rollback(self._state.release(family, value, now if rest else None))
        return tuple(text(family, value) for family, value in held)

    def addresses_of(self, port_id: str) -> tuple[str, ...]:
        """Return the addresses that the port holds, in the order in which it got them."""
        return tuple(text(family, value) for family, value in self._state.held_by(port_id))

    def address_owner(self, address: str) -> str | None:
        """Return the port_id that holds the address, or None. Raises InvalidInput."""
        holder = self._state.holder(*parse_address("address", address))
        return holder.port_id if holder else None

    def held_addresses(self) -> dict[str, str]:
        """Return address -> port_id for all of the store, from the file (for ``find_leaks``)."""
        return {row[0]: row[1] for row in self._rows("SELECT address, port_id FROM addresses")}

    def usage(self, network: str, *, now: float) -> Usage:
        """Return how full the network's own pools are, all range sets together."""
        sets = self.usage_by_set(network, now=now)
        return Usage(sum(u.used for u in sets), sum(u.resting for u in sets), sum(u.total for u in sets))

    def usage_by_set(self, network: str, *, now: float) -> tuple[Usage, ...]:
        """Return how full each range set is; () without pools. One full set stops every ADD."""
        if not self.get_network(network).pools:
            return ()
        return pool_usage(self.pools(network), self._state, now=now, rest_seconds=self._rest_seconds)

    def _network_deleted(self, name: str) -> None:
        super()._network_deleted(name)
        self._on_rollback(self._state.drop_cursors(name))
