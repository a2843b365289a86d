"""First packets for a generated world, from both sides of every bound that its manifests have."""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterator
from typing import Any, Final

from portwright.policy.rules import ICMP, ICMP6, SCTP, TCP, UDP, EndpointKind, Flow
from tests.policy_random.dice import ICMP_TYPES, NODES, OTHERS, STRANGERS
from tests.policy_random.world import World

#: DHCP's ports over UDP are the guard's, not policy's.
_GUARDED: Final = frozenset({67, 68, 546, 547})
_EPHEMERAL: Final = (49_152, 40_000, 1024)
#: How often each protocol comes; None is one of OTHERS, and 0 is ICMP of the other family.
_KINDS: Final = ((TCP, 40), (UDP, 22), (SCTP, 12), (ICMP, 14), (0, 2), (None, 10))


def packets(world: World, count: int) -> list[Flow]:
    """That many different ones (fewer, if the world has no more), each to a pod or from one.

    In the order of their senders, for whom it costs something to become another.
    """
    draw = _Draw(world, random.Random(f"{world.seed} packets"))
    found: dict[Flow, None] = {}
    for _ in range(2 * count):
        if len(found) == count:
            break
        found[draw.flow()] = None
    return sorted(found, key=lambda flow: (flow.source, flow.destination))


class _Draw:
    """The values that a world's packets are made of."""

    def __init__(self, world: World, dice: random.Random) -> None:
        self.dice = dice
        self.pods = [
            (int(":" in address) * 2 + 4, address)
            for end in world.snapshot.endpoints
            if end.kind is EndpointKind.WORKLOAD and not end.host_network
            for address in end.addresses
        ]
        of = {family: [a for f, a in self.pods if f == family] for family in (4, 6)}
        values = list(_leaves(world.documents))
        edges = [a for value in values for a in _edges(value)]
        #: Per family: pods' addresses, and anybody's.
        self.near = of
        self.far = {
            family: [
                *NODES[family],
                *STRANGERS[family],
                *sorted({a for a in edges if (6 if ":" in a else 4) == family} - set(of[family])),
            ]
            for family in (4, 6)
        }
        bounds = {port for value in values for port in _ports(value)}
        self.ports = sorted(
            {near for port in bounds for near in (port - 1, port, port + 1) if 0 <= near <= 65_535}
        )

    def flow(self) -> Flow:
        """One packet."""
        one = self.dice.choice
        family, pod = one(self.pods)
        other = one(self.near[family]) if self.dice.random() < 0.6 else one(self.far[family])
        if other == pod and self.dice.random() < 0.95:
            other = one(self.far[family])  # what a pod sends to itself never leaves it
        source, destination = (pod, other) if self.dice.random() < 0.5 else (other, pod)
        kinds, weights = zip(*_KINDS, strict=True)
        kind = self.dice.choices(kinds, weights)[0]
        if kind is None:
            return Flow(source=source, destination=destination, protocol=one(OTHERS))
        if kind in {0, ICMP}:
            own, foreign = (ICMP, ICMP6) if family == 4 else (ICMP6, ICMP)
            return Flow(
                source=source,
                destination=destination,
                protocol=own if kind else foreign,
                icmp_type=one(ICMP_TYPES),
                icmp_code=one((0, 0, 1, 2, 255)),
            )
        # A server answers from its port too, and rules ask for either end's.
        return Flow(
            source=source,
            destination=destination,
            protocol=kind,
            source_port=self.port(kind, one(_EPHEMERAL) if self.dice.random() < 0.6 else one(self.ports)),
            port=self.port(
                kind, one(self.ports) if self.dice.random() < 0.85 else self.dice.randint(0, 65_535)
            ),
        )

    def port(self, protocol: int, wanted: int) -> int:
        """``wanted``, unless it is not for policy to judge."""
        return 69 if protocol == UDP and wanted in _GUARDED else wanted


def _leaves(value: Any) -> Iterator[Any]:
    """Every value that is no mapping and no list."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _edges(value: Any) -> Iterator[str]:
    """The first and the last address of a net, and those around it, as far as they may be a host's."""
    try:
        net = ipaddress.ip_network(value) if isinstance(value, str) and "/" in value else None
    except ValueError:
        net = None
    if net is None:
        return
    kind = type(net.network_address)
    first, last = int(net.network_address), int(net.broadcast_address)
    for number in (first - 1, first, first + 1, (first + last) // 2, last - 1, last, last + 1):
        if 0 <= number < 1 << net.max_prefixlen and _is_host(address := kind(number)):
            yield str(address)


def _is_host(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether a packet may have it at either end: the guard and the stack refuse others."""
    if address.version == 4 and (int(address) >> 24 == 0 or int(address) >> 28 == 0xF):
        return False
    if address.version == 6 and int(address) >> 32 in {0, 0xFFFF}:
        return False
    return not (
        address.is_unspecified or address.is_loopback or address.is_multicast or address.is_link_local
    )


def _ports(value: Any) -> Iterator[int]:
    """The bounds of a port or a range of Calico's ("80:90")."""
    if isinstance(value, str):
        for part in value.split(":", 1):
            if part.isdecimal() and part.isascii():
                yield int(part)
    elif type(value) is int:
        yield value
