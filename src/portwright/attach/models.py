"""The attachment models that there are: each says how a port gets its device and how that goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from portwright.attach import tcfilter, veth
from portwright.model.errors import NotSupported
from portwright.model.port import Port
from portwright.plan.operations import ForgetPort, Operation

Plan = tuple[Operation, ...]


class Model(NamedTuple):
    """One of them. ``taps``: whether a tap for a hypervisor belongs to the device."""

    attach: Callable[[Port], Plan]
    detach: Callable[[Port], Plan]
    taps: bool = False


MODELS = {
    veth.MODEL: Model(veth.attach, veth.detach),
    tcfilter.MODEL: Model(tcfilter.attach, tcfilter.detach, taps=True),
}


def of(name: str) -> Model:
    """The model of that name. Raises NotSupported for one that this release does not attach with."""
    if name == "bridge":
        why = "in a broadcast domain everyone sees everyone; use tcfilter for a VM, veth for a container"
        raise NotSupported(name, "attachment", why)
    found = MODELS.get(name)
    if found is None:
        raise NotSupported(name, "attachment", f"this release attaches with {' and '.join(MODELS)}")
    return found


def attach(port: Port) -> Plan:
    """The plan that gives a recorded port its device."""
    return of(port.model).attach(port)


def detach(port: Port) -> Plan:
    """The plan that takes the device away and keeps the port."""
    return of(port.model).detach(port)


def delete(port: Port) -> Plan:
    """The plan that ends the port. Needs the record alone, and may run any number of times."""
    return (*detach(port), ForgetPort(port_id=port.port_id))
