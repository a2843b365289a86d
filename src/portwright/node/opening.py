"""What a name may open on a host of sandboxes, and whom the proxy may ask for one of them.

The proxy is the host: it reaches what a sandbox must not, and who answers for a name may name anything. So
both are judged here, against the host's own addresses and the ports that there are.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import NamedTuple

from portwright.domains.names import faces, may_open
from portwright.kernel import rtnl
from portwright.model.port import Port, PortMapping
from portwright.node.core import Core, reach_pairs
from portwright.policy.rules import Flow

_PROTOCOLS = {"udp": 17, "tcp": 6}


class Fence(NamedTuple):
    """What names don't open to the ports of a host: its own addresses, and its networks' subnets."""

    own: frozenset[str]
    nets: frozenset[ipaddress.IPv4Network | ipaddress.IPv6Network]


def fence(core: Core, port: Port) -> Fence:
    """That of the port's host, as it is now. Raises KernelFailed."""
    nets = (one.subnet for network in core.store.networks() for pool in network.pools for one in pool)
    return Fence(frozenset(_own_addresses(core, port)), frozenset(map(ipaddress.ip_network, nets)))


def openable(fence: Fence, found: Iterable[str]) -> tuple[str, ...]:
    """What of an answer may be opened to a port: nothing of this host's, of its networks', or of a link's.

    Else whoever answers for a name could open what the host or another tenant keeps to itself.
    """
    return tuple(
        address
        for address in found
        if may_open(address)
        and not any(
            face in fence.own or any(ipaddress.ip_address(face) in net for net in fence.nets)
            for face in faces(address)
        )
    )


def may_ask(
    core: Core,
    asking: Port,
    behind: Iterable[tuple[Port, PortMapping]],
    *,
    source: tuple[str, int],
    resolver: str,
    protocol: int,
) -> bool:
    """Whether a port may be brought to this resolver: the host's own way to it must open nothing.

    The data path has judged the packet to the resolver's address. Behind a published port of the host it is
    a sandbox that answers, to whom the proxy is the host: its policy and network are asked here. ``behind``:
    the ports that the host's port 53 leads to.
    """
    address = ipaddress.ip_address(resolver)
    if address.is_loopback or address.is_multicast or address.is_unspecified:
        return False
    if address.version == 6 and address.is_link_local:
        return False
    behind = tuple(behind)
    if not any(resolver in _own_addresses(core, port) for port, _ in behind):
        return True
    for port, mapping in behind:
        if _PROTOCOLS.get(mapping.protocol) != protocol or mapping.host_ip not in {"", *_any(resolver)}:
            continue
        if port.net_id != asking.net_id and not _reach(core, asking, port):
            return False
        for target in port.addresses:
            flow = Flow(
                source=source[0],
                destination=target.address,
                protocol=protocol,
                source_port=source[1],
                port=mapping.container_port,
            )
            if (":" in target.address) == (":" in source[0]) and not core.policies.allows(flow):
                return False
    return True


def _any(resolver: str) -> tuple[str, str]:
    """The addresses of a mapping that includes this one."""
    return ("::" if ":" in resolver else "0.0.0.0", resolver)  # noqa: S104 - compared, not bound


def _own_addresses(core: Core, port: Port) -> set[str]:
    """The addresses of the port's host."""
    switch = core.switch_of(port)
    return {a.address for a in rtnl.addresses(switch.rtnl)} if switch is not None else set()


def _reach(core: Core, one: Port, other: Port) -> bool:
    return any(
        (a.net_id, b.net_id) == (one.net_id, other.net_id) for a, b in reach_pairs(core.store.networks())
    )
