"""Routes and name servers as a caller wrote them, checked before anything is recorded.

A network's routes are applied in every sandbox that joins it: a wrong one that was recorded would fail each
of them, with an error that names no field of whoever asked for the port.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final

import msgspec

from portwright.ipam import parse_gateway
from portwright.model.errors import InvalidInput
from portwright.model.network import Dns, Route

#: Bounds of rtnetlink's fields; a scope is a byte (struct rtmsg).
_NUMBERS: Final = {"mtu": 65535, "advmss": 65535, "priority": 2**32 - 1, "table": 2**32 - 1, "scope": 255}
_MAX_ROUTES: Final = 1024
_MAX_SERVERS: Final = 64


def canonical_routes(routes: Sequence[Route], field: str = "routes") -> tuple[Route, ...]:
    """The same routes with addresses in canonical text. Raises InvalidInput naming the field."""
    if len(routes) > _MAX_ROUTES:
        raise InvalidInput(field, len(routes), f"at most {_MAX_ROUTES} routes")
    return tuple(_canonical(route, f"{field}[{i}]") for i, route in enumerate(routes))


def check_dns(dns: Dns, field: str = "dns") -> Dns:
    """The same Dns if its servers are addresses; raises InvalidInput naming the one that is not."""
    if len(dns.nameservers) > _MAX_SERVERS:
        raise InvalidInput(f"{field}.nameservers", len(dns.nameservers), f"at most {_MAX_SERVERS}")
    for i, server in enumerate(dns.nameservers):
        try:
            ipaddress.ip_address(server)
        except ValueError:
            raise InvalidInput(f"{field}.nameservers[{i}]", server, "not an IP address") from None
    return dns


def _canonical(route: Route, field: str) -> Route:
    host, slash, _ = route.dst.partition("/")
    try:
        dst = ipaddress.ip_network(route.dst)
    except ValueError as error:
        raise InvalidInput(f"{field}.dst", route.dst, str(error)) from None
    if not slash or "%" in host:
        raise InvalidInput(f"{field}.dst", route.dst, "write ADDRESS/PREFIX_LENGTH, such as 10.1.2.0/24")
    gw = route.gw
    if gw is not None:
        family, _ = parse_gateway(f"{field}.gw", gw)
        if family != dst.version:
            raise InvalidInput(f"{field}.gw", gw, f"must be of the family of dst {dst}")
        gw = str(ipaddress.ip_address(gw))
    for name, most in _NUMBERS.items():
        value = getattr(route, name)
        if value is not None and not 0 <= value <= most:
            raise InvalidInput(f"{field}.{name}", value, f"must be 0 to {most}")
    return msgspec.structs.replace(route, dst=str(dst), gw=gw)
