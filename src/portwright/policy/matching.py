"""What an address is and what a packet is: the conditions of a rule, each a function of its own.

The engine decides with these, :mod:`portwright.policy.lacks` explains them. Addresses and nets are text;
their numbers are remembered, since the same few are asked about again and again.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable, Iterator

from portwright.model.errors import InvalidInput
from portwright.policy.labels import Expr, matches
from portwright.policy.rules import Endpoint, EndpointKind, Flow, Peer, Rule, Snapshot, Traffic


@functools.lru_cache(maxsize=1 << 16)
def address_key(address: str) -> tuple[int, int]:
    """An address as (IP version, number). Raises InvalidInput for text that is none."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        raise InvalidInput("address", address, "is no IP address") from None
    return parsed.version, int(parsed)


@functools.lru_cache(maxsize=1 << 16)
def net_key(net: str) -> tuple[int, int, int]:
    """A net as (IP version, first address, host bits). Raises InvalidInput for text that is none."""
    try:
        parsed = ipaddress.ip_network(net)
    except ValueError:
        raise InvalidInput("net", net, "is no IP network") from None
    return parsed.version, int(parsed.network_address), parsed.max_prefixlen - parsed.prefixlen


def in_net(address: str, net: str) -> bool:
    """Whether ``address`` lies in ``net``; families never mix."""
    version, number = address_key(address)
    net_version, first, bits = net_key(net)
    return version == net_version and number >> bits == first >> bits


def in_nets(address: str, nets: Iterable[str]) -> bool:
    """Whether ``address`` lies in one of ``nets``."""
    return any(in_net(address, net) for net in nets)


def named_ports(endpoints: Iterable[Endpoint], names: tuple[str, ...], protocol: int) -> frozenset[int]:
    """The numbers that these endpoints give to one of ``names`` under ``protocol``."""
    return frozenset(
        named.port
        for endpoint in endpoints
        for named in endpoint.named_ports
        if named.name in names and named.protocol == protocol
    )


class World:
    """A snapshot, found by address. Raises InvalidInput for an address or net that is none.

    Two endpoints may share an address (a host endpoint and its node; duplicates are the reader's to refuse).
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._at: dict[str, list[Endpoint]] = {}
        self._nodes: dict[str, list[Endpoint]] = {}
        self._sets: list[Endpoint] = []
        self._domains = {name: frozenset(found) for name, found in snapshot.domains.items()}
        for endpoint in snapshot.endpoints:
            if endpoint.kind is EndpointKind.NETWORK_SET:
                self._sets.append(endpoint)
            elif not endpoint.host_network:
                where = self._nodes if endpoint.kind is EndpointKind.NODE else self._at
                for address in endpoint.addresses:
                    address_key(address)
                    where.setdefault(address, []).append(endpoint)

    def at(self, address: str) -> tuple[Endpoint, ...]:
        """The workloads and host endpoints with this address."""
        return tuple(self._at.get(address, ()))

    def workload(self, address: str) -> Endpoint | None:
        """The workload with this address; pods on the host's network have none of their own."""
        return next((e for e in self._at.get(address, ()) if e.kind is EndpointKind.WORKLOAD), None)

    def known(self, address: str) -> Iterator[Endpoint]:
        """All that a selector may find behind ``address``: its endpoints, and network sets around it."""
        yield from self._at.get(address, ())
        for network_set in self._sets:
            if in_nets(address, network_set.nets):
                yield network_set

    def found(self, address: str, selector: Expr) -> bool:
        """Whether ``selector`` is true of something behind ``address``."""
        return any(matches(selector, endpoint.labels) for endpoint in self.known(address))

    def nodes(self, address: str) -> tuple[Endpoint, ...]:
        """The nodes with this address."""
        return tuple(self._nodes.get(address, ()))

    def is_node(self, address: str, selector: Expr) -> bool:
        """Whether ``address`` is a node's, of whose labels ``selector`` is true."""
        return any(matches(selector, node.labels) for node in self.nodes(address))

    def is_local_node(self, address: str) -> bool:
        """Whether ``address`` is one of the node on which the workloads run."""
        return any(node.local_node for node in self.nodes(address))

    def resolved(self, name: str) -> frozenset[str]:
        """The addresses that a domain name or pattern stands for now."""
        return self._domains.get(name, frozenset())


def traffic_matches(traffic: Traffic, flow: Flow, world: World) -> bool:
    """Whether the packet is what ``traffic`` describes: each field that is there holds."""
    if traffic.protocol is not None and traffic.protocol != flow.protocol:
        return False
    if traffic.ip_version is not None and traffic.ip_version != address_key(flow.destination)[0]:
        return False
    if traffic.icmp_type is not None and traffic.icmp_type != flow.icmp_type:
        return False
    if traffic.icmp_code is not None and traffic.icmp_code != flow.icmp_code:
        return False
    if (traffic.ports or traffic.names) and not (
        flow.port is not None
        and (
            any(flow.port in ports for ports in traffic.ports)
            or flow.port in named_ports(world.at(flow.destination), traffic.names, flow.protocol)
        )
    ):
        return False
    return not (traffic.source_ports or traffic.source_names) or (
        flow.source_port is not None
        and (
            any(flow.source_port in ports for ports in traffic.source_ports)
            or flow.source_port in named_ports(world.at(flow.source), traffic.source_names, flow.protocol)
        )
    )


def rule_traffic_matches(rule: Rule, flow: Flow, world: World) -> bool:
    """Whether one of the rule's ``traffic`` holds (None: any, (): none) and no ``not_traffic``."""
    if rule.traffic is not None and not any(traffic_matches(each, flow, world) for each in rule.traffic):
        return False
    return not any(traffic_matches(each, flow, world) for each in rule.not_traffic)


def peer_matches(peer: Peer, address: str, world: World) -> bool:
    """Whether ``address`` is one of ``peer``: each field that is there holds."""
    if peer.nets is not None and not in_nets(address, peer.nets):
        return False
    if in_nets(address, peer.not_nets):
        return False
    if peer.selector is not None and not world.found(address, peer.selector):
        return False
    if peer.not_selector is not None and world.found(address, peer.not_selector):
        return False
    if peer.nodes is not None and not world.is_node(address, peer.nodes):
        return False
    return peer.domains is None or any(address in world.resolved(name) for name in peer.domains)


def rule_peers_match(rule: Rule, own: str, other: str, world: World) -> bool:
    """Whether the rule's addresses hold: the other side's (None: anybody, (): nobody) and its own."""
    if rule.peers is not None and not any(peer_matches(peer, other, world) for peer in rule.peers):
        return False
    return rule.local is None or peer_matches(rule.local, own, world)
