"""What a running guest answers on its control socket: as the daemon's protocol, with methods of its own."""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from portwright.api.methods import Name, Queues
from portwright.api.registry import IntrospectParams, Method, Params
from portwright.model.errors import PortwrightError
from portwright.model.port import Port

#: Seconds that an unplug may give a guest, at most.
MAX_PATIENCE: Final = 600.0

CardName = Annotated[str, Meta(pattern=r"^eth\d{1,3}$", description="as vm list has it")]
Patience = Annotated[float, Meta(ge=0, le=MAX_PATIENCE, description="seconds")]


class NicFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A NIC of a started guest: its port's record, in the parts that matter for reaching it."""

    ifname: str
    port_id: str
    rep: str
    network: str
    tap: str
    mac: str
    mtu: int
    addresses: tuple[str, ...]
    queues: int = 1


def facts_of(port: Port) -> NicFacts:
    """What is said of the NIC on that port."""
    return NicFacts(
        ifname=port.ifname,
        port_id=port.port_id,
        rep=port.rep_name,
        network=port.network,
        tap=port.tap,
        mac=port.mac,
        mtu=port.mtu,
        addresses=tuple(address.address for address in port.addresses),
        queues=port.queues,
    )


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """A guest that has been started. ``pid`` is the hypervisor's.

    ``model`` is its ports', ``vhost`` whether vhost-net carries their packets, ``vmm`` the hypervisor.
    """

    name: str
    pid: int
    accel: str
    nics: tuple[NicFacts, ...]
    model: str = ""
    vhost: bool = False
    vmm: str = "qemu"


class ShowParams(Params[Started], frozen=True, kw_only=True):
    """Say what the guest is, and which NICs it has now."""


class PlugParams(Params[NicFacts], frozen=True, kw_only=True):
    """Create a port and give the guest a NIC on it. ``network`` None: the only one there is."""

    network: Name | None = None
    queues: Queues = 1
    labels: dict[str, str] = msgspec.field(default_factory=dict)


class UnplugParams(Params[NicFacts], frozen=True, kw_only=True):
    """Take a NIC away once the guest lets go of it, within ``patience``, and delete its port."""

    ifname: CardName
    patience: Patience = 10.0


class Frozen(msgspec.Struct, frozen=True, kw_only=True):
    """A guest has been written to ``file``, ``bytes`` long; it took ``seconds``."""

    file: str
    bytes: int
    seconds: float


class FreezeParams(Params[Frozen], frozen=True, kw_only=True):
    """Write the guest to ``file``, an absolute path that is free; it stands still meanwhile, and goes on."""

    file: Annotated[str, Meta(pattern=r"^/.", max_length=4096, description="an absolute path")]


def _method(name: str, params: type[Params[Any]], result: object) -> Method:
    return Method(name, params, (result,), (params.__doc__ or "").strip(), fds=(), stream=False)


_METHODS = (
    _method("introspect", IntrospectParams, dict[str, object]),
    _method("vm.show", ShowParams, Started),
    _method("vm.plug", PlugParams, NicFacts),
    _method("vm.unplug", UnplugParams, NicFacts),
    _method("vm.freeze", FreezeParams, Frozen),
)
#: Every method, by name.
CONTRACT: Final = MappingProxyType({method.name: method for method in _METHODS})


class GuestLost(PortwrightError):
    """A guest's `vm run` went away, or is too slow, between request and answer: it may be carried out."""

    code = "guest-lost"

    def __init__(self, guest: str, method: str, why: str) -> None:
        super().__init__(f"guest {guest!r} has not answered {method} ({why}); look before you repeat it")
        self.guest = guest
        self.method = method
        self.why = why


class CardFailed(PortwrightError):
    """The hypervisor did not take a card, or give it back; it is as it was before."""

    code = "card"

    def __init__(self, guest: str, ifname: str, why: str) -> None:
        super().__init__(f"guest {guest!r}, {ifname}: {why}")
        self.guest = guest
        self.ifname = ifname
        self.why = why


class CardHeld(PortwrightError):
    """The guest has not let go of a card in time. The card, its port and its traffic are as before."""

    code = "card-held"

    def __init__(self, guest: str, ifname: str, seconds: float) -> None:
        super().__init__(
            f"guest {guest!r} did not let go of {ifname} within {seconds:g} s: one that has not booted, or"
            " has no ACPI hotplug, can't. NIC and port work on, and end if it lets go later; try again with"
            " more --patience"
        )
        self.guest = guest
        self.ifname = ifname
        self.seconds = seconds
