"""Ports that leave nothing in their sandbox (``attach.tap``): what it has of them stands on record alone."""

from __future__ import annotations

from portwright.model.errors import Conflict
from portwright.model.port import Port
from portwright.store import Store


def destinations(store: Store, port: Port) -> set[str]:
    """Where the sandbox is to have routes to by its other ports, as its guest is told of them.

    Raises Conflict where another such port of the sandbox has the device's name: there is no device that
    would be in the way.
    """
    found: set[str] = set()
    mine = (port.sandbox.cookie, port.sandbox.boot_id)
    for other in store.ports():
        if (other.sandbox.cookie, other.sandbox.boot_id) != mine or other.port_id == port.port_id:
            continue
        if other.ifname == port.ifname and other.model == port.model:
            why = f"is port {other.port_id}'s in {port.sandbox.path}; choose another name or delete that"
            raise Conflict("interface", port.ifname, why)
        found |= {route.dst for route in other.routes}
    return found
