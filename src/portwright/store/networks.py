"""The networks table; all networks are kept in memory, as every reservation needs one."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec

from portwright.ipam.ranges import canonical_pools, compile_pools
from portwright.model.errors import Conflict, InvalidInput, NotFound
from portwright.model.network import Network
from portwright.store.database import Database, damaged


class NetworkTable(Database):
    """Networks by name."""

    def __init__(self, state_dir: Path) -> None:
        """Open the file and load the networks."""
        super().__init__(state_dir)
        self._networks: dict[str, Network] = {}

    def _load_networks(self) -> None:
        for net_id, name, body in self._rows("SELECT net_id, name, body FROM networks ORDER BY net_id"):
            try:
                network = msgspec.json.decode(body, type=Network)
            except msgspec.MsgspecError as error:
                raise damaged(self.path, f"network {name!r} can't be read ({error})") from error
            if (network.net_id, network.name) != (net_id, name):
                raise damaged(self.path, f"network {name!r} contradicts its row")
            self._networks[name] = network

    def add_network(self, network: Network) -> Network:
        """Record a new network and return it with its ``net_id``.

        ``network.net_id`` must be 0; the one that it gets was never used in this store.
        Pools are stored in canonical text. Raises InvalidInput (pools, reserved) and
        Conflict if the name is taken.
        """
        if network.net_id != 0:
            raise InvalidInput("net_id", network.net_id, "is given by the store; leave it 0")
        if network.name in self._networks:
            raise Conflict("network", network.name, "exists already")
        network = _checked(network)
        with self._write():
            # The id is needed inside of the body: an empty one first, replaced in the same transaction.
            cursor = self._run("INSERT INTO networks(name, body) VALUES (?, x'')", (network.name,))
            network = msgspec.structs.replace(network, net_id=cursor.lastrowid or 0)
            self._set_network(network)
        return network

    def update_network(self, network: Network) -> Network:
        """Replace the record of the network of this name; its ``net_id`` can't change.

        Addresses given out stay with their ports, also outside the new pools. Raises
        NotFound, InvalidInput.
        """
        before = self.get_network(network.name)
        if network.net_id not in {0, before.net_id}:
            raise InvalidInput("net_id", network.net_id, f"network {network.name!r} has {before.net_id}")
        network = _checked(msgspec.structs.replace(network, net_id=before.net_id))
        with self._write():
            self._set_network(network)
        return network

    def delete_network(self, name: str) -> None:
        """Delete a network. Raises NotFound, and Conflict while it has ports."""
        before = self.get_network(name)
        with self._write():
            try:
                self._run("DELETE FROM networks WHERE name = ?", (name,), may_refuse=True)
            except sqlite3.IntegrityError:
                count = self._rows("SELECT count(*) FROM ports WHERE network = ?", (name,))[0][0]
                why = f"has {count} port{'s' if count > 1 else ''}; delete them first"
                raise Conflict("network", name, why) from None
            self._run("DELETE FROM cursors WHERE network = ?", (name,))
            del self._networks[name]
            self._on_rollback(lambda: self._networks.update({name: before}))
            self._network_deleted(name)

    def get_network(self, name: str) -> Network:
        """Return the network. Raises NotFound."""
        try:
            return self._networks[name]
        except KeyError:
            raise NotFound("network", name) from None

    def networks(self) -> list[Network]:
        """Return all networks, by ``net_id``."""
        return sorted(self._networks.values(), key=lambda n: n.net_id)

    def _network_deleted(self, name: str) -> None:
        """Drop what other tables keep in memory of a deleted network."""

    def _set_network(self, network: Network) -> None:
        before = self._networks.get(network.name)
        body = msgspec.json.encode(network)
        self._run("UPDATE networks SET body = ? WHERE name = ?", (body, network.name))
        self._networks[network.name] = network

        def undo() -> None:
            if before is None:
                del self._networks[network.name]
            else:
                self._networks[network.name] = before

        self._on_rollback(undo)


def _checked(network: Network) -> Network:
    """Return the network with canonical pools; one without pools takes foreign IPAM or none."""
    if not network.pools:
        return network
    compile_pools(network.name, network.pools, network.reserved, field="pools")
    return msgspec.structs.replace(network, pools=canonical_pools(network.pools, field="pools"))
