"""A guest's network as words of the kernel's command line, which ``init.sh`` of our initramfs reads. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from portwright.model.network import Route
from portwright.model.port import Port

_LINK = 253  # RT_SCOPE_LINK


def network_words(ports: Sequence[Port], besides: Sequence[Port] = ()) -> list[str]:
    """What the guest's NICs are set to: as the device of a container would be on the same ports.

    ``besides``: the ports of NICs that it has already.
    """
    words: list[str] = []
    reached = {address.gateway for port in besides for address in port.addresses}
    for port in ports:
        words.append(f"portwright.nic={port.ifname},{port.mac},{port.mtu}")
        words += [f"portwright.addr={port.ifname},{_host(a.address)}" for a in port.addresses]
        words += [f"portwright.route={port.ifname},{_written(route)}" for route in _routes(port, reached)]
    return words


def _routes(port: Port, reached: set[str]) -> list[Route]:
    """To the gateways first, then the port's own, each through its own gateway or its family's first.

    ``reached``: gateways that another port of the guest has the route to, which can be there once; added to.
    """
    gateways = list(dict.fromkeys(a.gateway for a in port.addresses))
    routes = [
        Route(dst=_host(gateway), scope=None if ":" in gateway else _LINK)
        for gateway in gateways
        if not gateway.startswith("fe80:") and gateway not in reached
    ]
    reached.update(gateways)
    first = {_version(gateway): gateway for gateway in reversed(gateways)}
    for route in port.routes:
        through = route.gw or (first.get(_version(route.dst)) if route.scope != _LINK else None)
        routes.append(
            Route(
                dst=route.dst,
                gw=through,
                mtu=route.mtu,
                advmss=route.advmss,
                priority=route.priority,
                table=route.table,
                scope=route.scope,
            )
        )
    return routes


def _written(route: Route) -> str:
    """The keys are those of ``ip route``, in the order in which init.sh passes them on."""
    keys = {
        "via": route.gw,
        "mtu": route.mtu,
        "advmss": route.advmss,
        "metric": route.priority,
        "table": route.table,
        "scope": route.scope,
    }
    return ",".join([route.dst, *(f"{key}={value}" for key, value in keys.items() if value is not None)])


def _host(address: str) -> str:
    return f"{address}/{ipaddress.ip_address(address).max_prefixlen}"


def _version(text: str) -> int:
    return 6 if ":" in text else 4
