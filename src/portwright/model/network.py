"""Networks, ranges and routes as values. Addresses are strings in canonical form."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

#: What a sandbox sees as its router unless a range names another (answered in BPF).
GATEWAY4 = "169.254.1.1"
GATEWAY6 = "fe80::1"
#: MAC of every representor; each sandbox link is a segment of its own (RFC 7042: locally administered).
GATEWAY_MAC = "ee:ee:ee:ee:ee:ee"

#: What holds for a network's ports where no policy decides (docs/policy.md).
Isolation: TypeAlias = Literal["open", "tenant", "strict"]


class AddressRange(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An inclusive range inside a subnet, host-local's shape.

    ``subnet`` is canonical CIDR (no host bits); ``start``/``end`` inclusive addresses or None
    for the whole subnet; ``gateway`` an address that is never given out, or None.
    """

    subnet: str
    start: str | None = None
    end: str | None = None
    gateway: str | None = None


class Route(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A route of the sandbox; fields as in CNI 1.1 results. ``None`` = kernel default."""

    dst: str
    gw: str | None = None
    mtu: int | None = None
    advmss: int | None = None
    priority: int | None = None
    table: int | None = None
    scope: int | None = None


class Dns(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a runtime writes to resolv.conf; the shape of CNI's ``dns``. Portwright passes it on."""

    nameservers: tuple[str, ...] = ()
    domain: str = ""
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class Network(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What ports join. Routed (layer 3): no shared broadcast domain.

    ``pools`` is a tuple of range sets; a port gets one address from each set.
    ``reach`` names networks whose ports may exchange traffic with ours; both sides must name
    each other, or one side name ``*``. Nothing else crosses networks.
    ``isolation`` is what holds for its ports where no policy decides.
    """

    name: str
    net_id: int
    pools: tuple[tuple[AddressRange, ...], ...] = ()
    reserved: tuple[str, ...] = ()
    mtu: int | None = None
    masquerade: bool = False
    reach: tuple[str, ...] = ()
    isolation: Isolation = "open"
    routes: tuple[Route, ...] = ()
    dns: Dns = Dns()
    source: Literal["cli", "cni", "api"] = "api"
