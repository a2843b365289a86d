"""The attachment models that there are: each says how a port gets its device and how that goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from portwright.attach import adopt, macvtap, tap, tcfilter, veth
from portwright.model.errors import NotSupported
from portwright.model.port import Port, rep_name, tap_name
from portwright.plan.operations import Operation
from portwright.plan.path_operations import ForgetPort

Plan = tuple[Operation, ...]


class Model(NamedTuple):
    """One of them. ``taps``: whether there is a tap for a hypervisor; ``inside``: a device in the sandbox."""

    attach: Callable[[Port], Plan]
    detach: Callable[[Port], Plan]
    taps: bool = False
    inside: bool = True

    def tap(self, port_id: str) -> str:
        """The name of what a hypervisor opens, '' for none."""
        return (tap_name(port_id) if self.inside else rep_name(port_id)) if self.taps else ""


MODELS = {
    veth.MODEL: Model(veth.attach, veth.detach),
    tcfilter.MODEL: Model(tcfilter.attach, tcfilter.detach, taps=True),
    macvtap.MODEL: Model(macvtap.attach, macvtap.detach, taps=True),
    tap.MODEL: Model(tap.attach, tap.detach, taps=True, inside=False),
}


_ADOPT = Model(adopt.take_over, adopt.detach)


def of(name: str) -> Model:
    """The model of that name. Raises NotSupported for one that this release does not attach with."""
    if name == "bridge":
        why = "in a broadcast domain everyone sees everyone; use tcfilter for a VM, veth for a container"
        raise NotSupported(name, "attachment", why)
    if name == adopt.MODEL:
        why = "only `portwright port migrate` makes one, of a sandbox on a bridge; create a port of another"
        raise NotSupported(name, "attachment", why)
    found = MODELS.get(name)
    if found is None:
        raise NotSupported(name, "attachment", f"this release attaches with {', '.join(MODELS)}")
    return found


def _recorded(name: str) -> Model:
    """As ``of``, for what is done with a device that is there: that may be one of ``adopt``."""
    return _ADOPT if name == adopt.MODEL else of(name)


def attach(port: Port) -> Plan:
    """The plan that gives a recorded port its device."""
    return of(port.model).attach(port)


def detach(port: Port) -> Plan:
    """The plan that takes the device away and keeps the port."""
    return _recorded(port.model).detach(port)


def delete(port: Port) -> Plan:
    """The plan that ends the port. Needs the record alone, and may run any number of times."""
    return (*detach(port), ForgetPort(port_id=port.port_id))
