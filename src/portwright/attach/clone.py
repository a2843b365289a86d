"""What makes a port of the model ``tcfilter`` a clone's: the addresses that its guest has inside.

Guests that were restored from one snapshot all have the addresses of the guest that was frozen. Each has a
port with addresses of its own, which are put in their place where tap and device are joined.
"""

from __future__ import annotations

import ipaddress

from portwright.model.errors import InvalidInput, NotSupported
from portwright.model.port import Port
from portwright.plan.clone_operations import JoinClone

MODEL = "tcfilter"


def judge(inner: tuple[str, ...], model: str) -> tuple[str, ...]:
    """What a guest may have inside, in canonical form. Raises InvalidInput, NotSupported; pure."""
    if inner and model != MODEL:
        raise NotSupported(
            model, "inner addresses", "they are rewritten where a tap is joined with its device: use tcfilter"
        )
    found: dict[int, str] = {}
    for at, text in enumerate(inner):
        field = f"inner_addresses[{at}]"
        try:
            address = ipaddress.ip_interface(text).ip
        except ValueError as error:
            raise InvalidInput(field, text, "is not an IP address") from error
        if address.version in found:
            other = found[address.version]
            raise InvalidInput(
                field, text, f"a guest has one of each family, and IPv{address.version}'s is {other}"
            )
        mapped = address.version == 6 and address.ipv4_mapped
        if mapped or address.is_multicast or address.is_loopback or address.is_unspecified:
            raise InvalidInput(field, text, "no device has such an address: give the guest's own")
        if (address.version == 6 and address.is_link_local) or str(address) == "255.255.255.255":
            raise InvalidInput(
                field, text, "is not rewritten, each link has its own: give the guest's global one"
            )
        found[address.version] = str(address)
    return tuple(found.values())


def paired(port: Port) -> tuple[str, ...]:
    """The port's own address for each inner one, in their order. Raises InvalidInput where that isn't one."""
    found = []
    for inner in port.inner_addresses:
        own = [a for a in port.addresses if (":" in a.address) == (":" in inner)]
        family = "IPv6" if ":" in inner else "IPv4"
        if len(own) != 1:
            has = f"the port has {len(own) or 'no'} {family} address{'es' if len(own) > 1 else ''}"
            raise InvalidInput("inner_addresses", inner, f"{has}, and needs one for it to stand for")
        if inner == own[0].gateway:
            raise InvalidInput(
                "inner_addresses", inner, "is the port's gateway: give the guest's own address"
            )
        found.append(own[0].address)
    return tuple(found)


def join(port: Port) -> JoinClone:
    """The operation that joins the port's tap and device. Raises as :func:`paired`."""
    return JoinClone(
        port_id=port.port_id,
        index=port.clone,
        device=port.ifname,
        tap=port.tap,
        inner=port.inner_addresses,
        addresses=paired(port),
    )
