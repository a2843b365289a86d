"""The world that policies are about: the ports that there are and what manifests describe, as endpoints.

With a thousand ports it takes longer to find than many a change of policy to compile, and most changes are of
policy alone: so it is found anew only when something of it is another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import msgspec

from portwright.domains.names import foreign
from portwright.model.network import Isolation, Network
from portwright.model.port import Port, PortState
from portwright.node.endpoints import snapshot_of
from portwright.policy.manifests.read import Manifests
from portwright.policy.rules import Endpoint, Snapshot

#: Addresses by the domain name or pattern that rules ask for.
Domains = dict[str, tuple[str, ...]]


class Ports(Protocol):
    """What is needed of the store."""

    @property
    def ports_version(self) -> int:
        """The same as long as no port is another than before."""

    def ports(self) -> Iterator[Port]:
        """All of them."""

    def networks(self) -> list[Network]:
        """All of them."""


class _Of(NamedTuple):
    """What endpoints are made of."""

    version: int
    described: tuple[Endpoint, ...]
    namespaces: dict[str, dict[str, str]]
    isolating: dict[str, Isolation]


class World:
    """One for the node. Not for two threads."""

    def __init__(self, store: Ports) -> None:
        """Reads nothing yet."""
        self._store = store
        self._kept: tuple[_Of, tuple[Endpoint, ...]] | None = None

    def isolating(self) -> dict[str, Isolation]:
        """The networks that are not open: while there is one, a generation is in force."""
        return {n.name: n.isolation for n in self._store.networks() if n.isolation != "open"}

    def snapshot(
        self, manifests: Manifests, domains: Domains, *, port: Port | None = None, without: Port | None = None
    ) -> Snapshot:
        """Whom there is now; ``port`` as given and without ``without``, whatever is on record of them."""
        endpoints = self._endpoints(manifests, port, without)
        known = foreign(domains, endpoints)
        return msgspec.structs.replace(manifests.snapshot, endpoints=endpoints, domains=known)

    def _endpoints(
        self, manifests: Manifests, port: Port | None, without: Port | None
    ) -> tuple[Endpoint, ...]:
        of = _Of(
            self._store.ports_version, manifests.snapshot.endpoints, manifests.namespaces, self.isolating()
        )
        if port is None and without is None and self._kept is not None and self._kept[0] == of:
            return self._kept[1]
        ports = {p.port_id: p for p in self._store.ports() if p.state is not PortState.DELETING}
        if port is not None:
            ports[port.port_id] = port
        if without is not None:
            ports.pop(without.port_id, None)
        found = snapshot_of(manifests, list(ports.values()), of.isolating).endpoints
        if port is None and without is None:
            self._kept = of, found
        return found
