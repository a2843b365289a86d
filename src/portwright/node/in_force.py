"""What packets are judged by, as dry runs compare it; and which of the host's services are ports'."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from portwright.model.port import Port, PortState
from portwright.policy.host.rulings import Published
from portwright.policy.host.stages import Bound
from portwright.policy.rules import SCTP, TCP, UDP, PolicySet, Snapshot
from portwright.policy.services import BLOCKS

_PROTOCOLS: Final = {"tcp": TCP, "udp": UDP, "sctp": SCTP}


class InForce(NamedTuple):
    """What packets are judged by: the policies, the world that they speak of, and the host's interfaces."""

    policies: PolicySet
    snapshot: Snapshot
    bound: tuple[Bound, ...] = ()
    published: tuple[Published, ...] = ()


def published_by(ports: Iterable[Port]) -> Iterator[Published]:
    """The services of the host that are ports', by the first address of each family."""
    for port in ports:
        if port.state is not PortState.ATTACHED:
            continue
        first: dict[int, str] = {}
        for each in port.addresses:
            first.setdefault(ipaddress.ip_address(each.address).version, each.address)
        for mapping in port.port_mappings:
            block = BLOCKS[_PROTOCOLS[mapping.protocol]] << 16
            only = ipaddress.ip_address(mapping.host_ip).version if mapping.host_ip else None
            for version, address in first.items():
                if only in {None, version}:
                    host = mapping.host_ip
                    yield Published(address, block | mapping.container_port, host, block | mapping.host_port)
