"""``port.migrate`` on the node's service."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence

from portwright.api import methods as m
from portwright.api import migrate as mm
from portwright.model.errors import InvalidInput
from portwright.node.migrate import Migration, Wish


def migrate(service: Migration, params: mm.PortMigrateParams) -> mm.Migrated:
    """Judges all bridges before the first is touched; then one after the other. Raises as the service."""
    moves = service.plan(
        Wish(
            bridge=params.bridge or "",
            network=params.network or "",
            addresses=_named(params.addresses),
            remove_bridge=params.remove_bridge,
            forwarding=params.forwarding_accepted,
        )
    )
    done = []
    for move in moves:
        steps = service.steps(move) if params.dry_run else ()
        done.append(
            mm.Moved(
                bridge=move.bridge.link.name,
                ports=move.ports if params.dry_run else service.move(move),
                removed=move.remove,
                plan=tuple(m.Step(op=type(o).__name__, command=o.render()) for o in steps),
            )
        )
    return mm.Migrated(bridges=tuple(done))


def _named(given: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for mac, addresses in given.items():
        try:
            canonical = tuple(str(ipaddress.ip_address(a)) for a in addresses)
        except ValueError as error:
            raise InvalidInput(f"addresses[{mac}]", list(addresses), str(error)) from None
        found[mac.lower()] = canonical
    return found
