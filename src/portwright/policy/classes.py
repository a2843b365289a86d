"""Who is meant: label expressions and peers, evaluated for all endpoints and nets at once.

Every address that the policies can tell apart is a *place*: the exact addresses (endpoints', nodes', those
that domain names resolved to) and the distinct nets in use, in one order in which all that lies in a net
follows it. So a net is one range of places, and a peer is ranges (``extent``), made by the algebra of ranges.
A place that is a net stands for those of its addresses that no longer net and no exact address covers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import TypeVar

from portwright.policy.labels import And, Contains, EndsWith, Everything, Expr, Has, In, Not, Or, StartsWith
from portwright.policy.matching import address_key, net_key
from portwright.policy.ranges import EMPTY, Ranges, complement, intersect, union
from portwright.policy.rules import Endpoint, EndpointKind, NamedPort, Peer, Snapshot

#: The nets that hold a whole family.
ROOTS = {4: "0.0.0.0/0", 6: "::/0"}

_Key = tuple[int, int, int]


def bits_of(indexes: Iterable[int], count: int) -> int:
    """The number whose bits at ``indexes`` (each below ``count``) are 1."""
    whole = bytearray((count >> 3) + 1)
    for index in indexes:
        whole[index >> 3] |= 1 << (index & 7)
    return int.from_bytes(whole, "little")


def indexes_of(bits: int) -> Iterator[int]:
    """The places of the 1 bits, ascending."""
    text = bin(bits)[:1:-1]
    at = text.find("1")
    while at >= 0:
        yield at
        at = text.find("1", at + 1)


K = TypeVar("K")
V = TypeVar("V")


class Known(dict[K, V]):
    """What was found, and at the next age what of it was asked for in the last one."""

    def __init__(self) -> None:
        self._before: dict[K, V] = {}

    def find(self, key: K) -> V | None:
        """As get."""
        found = self.get(key)
        if found is None:
            found = self._before.get(key)
            if found is not None:
                self[key] = found
        return found

    def age(self) -> None:
        """Forgets what nobody has asked for since this was last called."""
        self._before = dict(self)
        self.clear()


class LabelIndex:
    """Endpoints by label: the truth of an expression for all of them, as the bits of one number."""

    def __init__(self, endpoints: tuple[Endpoint, ...]) -> None:
        self.endpoints = endpoints
        self._count = len(endpoints)
        self._all = (1 << self._count) - 1
        self._indexes: dict[str, dict[str, list[int]]] = {}
        for index, endpoint in enumerate(endpoints):
            for key, value in endpoint.labels.items():
                self._indexes.setdefault(key, {}).setdefault(value, []).append(index)
        self._known: Known[Expr, int] = Known()

    def again(self, endpoints: tuple[Endpoint, ...]) -> LabelIndex:
        """Of these endpoints: this one if they are the same, with what was asked since it was last had."""
        if endpoints != self.endpoints:
            return LabelIndex(endpoints)
        self._known.age()
        return self

    def true_of(self, expr: Expr) -> int:
        """The endpoints that ``expr`` is true of; the meaning is labels.matches'."""
        known = self._known.find(expr)
        if known is None:
            known = self._known[expr] = self._evaluate(expr)
        return known

    def _having(self, key: str, values: Iterable[str]) -> int:
        by_value = self._indexes.get(key, {})
        found = [index for value in values for index in by_value.get(value, ())]
        return bits_of(found, self._count) if found else 0

    def _evaluate(self, expr: Expr) -> int:
        match expr:
            case Everything():
                return self._all
            case Has(key):
                return self._having(key, self._indexes.get(key, {}))
            case In(key, values):
                return self._having(key, values)
            case Contains(key, text):
                return self._having(key, [value for value in self._indexes.get(key, {}) if text in value])
            case StartsWith(key, text):
                return self._having(key, [v for v in self._indexes.get(key, {}) if v.startswith(text)])
            case EndsWith(key, text):
                return self._having(key, [v for v in self._indexes.get(key, {}) if v.endswith(text)])
            case Not(term):
                return self._all & ~self.true_of(term)
            case And(terms):
                found = self._all
                for term in terms:
                    found &= self.true_of(term)
                return found
            case Or(terms):
                found = 0
                for term in terms:
                    found |= self.true_of(term)
                return found


class Places:
    """All places of a snapshot and of the peers that may be asked about (``peers``: each of these)."""

    def __init__(self, snapshot: Snapshot, labels: LabelIndex, peers: Iterable[Peer]) -> None:
        self._snapshot = snapshot
        self._labels = labels
        self._asked = _asked(snapshot, peers)
        nets, domains = set(self._asked[0]), self._asked[1]
        findable: list[int] = []
        nodes: list[int] = []
        exact: set[str] = {found for addresses in domains.values() for found in addresses}
        for index, endpoint in enumerate(snapshot.endpoints):
            if endpoint.host_network:
                continue
            if endpoint.kind is EndpointKind.NETWORK_SET:
                nets.update(endpoint.nets)
            else:
                exact.update(endpoint.addresses)
            (nodes if endpoint.kind is EndpointKind.NODE else findable).append(index)
        self._findable = bits_of(findable, len(snapshot.endpoints))
        self._nodes = bits_of(nodes, len(snapshot.endpoints))
        # Larger nets come before what they hold; an address comes after the net of its full length.
        keyed: list[tuple[_Key, str]] = [(_net_place(net), net) for net in nets]
        keyed += [((*address_key(address), 1), address) for address in exact]
        keyed.sort()
        self._keys = [key for key, _ in keyed]
        #: The nets and addresses, as text, in order.
        self.names = [name for _, name in keyed]
        self.count = len(keyed)
        self._at = {name: index for index, name in enumerate(self.names)}
        self._extents: Known[Peer, Ranges] = Known()
        self._found: Known[Expr, Ranges] = Known()
        self._named: dict[tuple[str, int], dict[int, Ranges]] | None = None

    def again(self, snapshot: Snapshot, labels: LabelIndex, peers: Iterable[Peer]) -> Places:
        """Those of a snapshot and peers, these if they are the same; ``labels`` is what its again gave."""
        peers = list(peers)
        if labels is not self._labels or _asked(snapshot, peers) != self._asked:
            return Places(snapshot, labels, peers)
        self._extents.age()
        self._found.age()
        return self

    def is_address(self, place: int) -> bool:
        """Whether a place is an exact address."""
        return self._keys[place][2] == 1

    def version(self, place: int) -> int:
        """The IP version of a place."""
        return self._keys[place][0]

    def end(self, place: int) -> int:
        """One past the last place inside the net that ``place`` is."""
        version, first, bits = self._keys[place]
        if bits == 1:
            return place + 1
        return bisect_left(self._keys, (version, first + (1 << -bits), -1 << 8))

    def of(self, name: str) -> int:
        """The place of an address, or of a net in use."""
        return self._at[name]

    def extent(self, peer: Peer) -> Ranges:
        """The places that ``peer`` is true of."""
        known = self._extents.find(peer)
        if known is None:
            known = self._extents[peer] = self._evaluate(peer)
        return known

    def named(self, name: str, protocol: int) -> dict[int, Ranges]:
        """By port number: the addresses whose endpoint calls it ``name`` under ``protocol``."""
        if self._named is None:
            found: dict[tuple[str, int], dict[int, list[int]]] = {}
            for index in indexes_of(self._findable):
                endpoint = self._snapshot.endpoints[index]
                for port in endpoint.named_ports:
                    by_port = found.setdefault((port.name, port.protocol), {})
                    by_port.setdefault(port.port, []).extend(self._at[a] for a in endpoint.addresses)
            self._named = {
                key: {port: union((at, at + 1) for at in places) for port, places in by_port.items()}
                for key, by_port in found.items()
            }
        return self._named.get((name, protocol), {})

    def port_extent(self, port: NamedPort) -> Ranges:
        """The addresses whose endpoint has this named port."""
        return self.named(port.name, port.protocol).get(port.port, EMPTY)

    def _evaluate(self, peer: Peer) -> Ranges:
        parts: list[Ranges] = []
        if peer.nets is not None:
            parts.append(self._of_nets(peer.nets))
        if peer.not_nets:
            parts.append(complement(self._of_nets(peer.not_nets), self.count))
        if peer.selector is not None:
            parts.append(self._of_selector(peer.selector))
        if peer.not_selector is not None:
            parts.append(complement(self._of_selector(peer.not_selector), self.count))
        if peer.nodes is not None:
            parts.append(self._of_endpoints(self._labels.true_of(peer.nodes) & self._nodes))
        if peer.domains is not None:
            parts.append(
                union(
                    (self._at[address], self._at[address] + 1)
                    for name in peer.domains
                    for address in self._snapshot.domains.get(name, ())
                )
            )
        if not parts:
            return ((0, self.count),)
        found = parts[0]
        for part in parts[1:]:
            found = intersect(found, part)
        return found

    def _of_nets(self, nets: Iterable[str]) -> Ranges:
        return union((self._at[net], self.end(self._at[net])) for net in nets)

    def _of_selector(self, expr: Expr) -> Ranges:
        known = self._found.find(expr)
        if known is None:
            known = self._of_endpoints(self._labels.true_of(expr) & self._findable)
            self._found[expr] = known
        return known

    def _of_endpoints(self, bits: int) -> Ranges:
        pairs: list[tuple[int, int]] = []
        for index in indexes_of(bits):
            endpoint = self._snapshot.endpoints[index]
            if endpoint.kind is EndpointKind.NETWORK_SET:
                pairs += [(self._at[net], self.end(self._at[net])) for net in endpoint.nets]
            else:
                pairs += [(self._at[address], self._at[address] + 1) for address in endpoint.addresses]
        return union(pairs)


def narrow(peer: Peer, version: int) -> Peer | None:
    """What of ``peer`` can be true of addresses of one IP version; None: nothing.

    ``Peer()`` is anybody: so a net that holds the whole family says nothing.
    """
    nets = peer.nets
    if nets is not None:
        nets = tuple(net for net in nets if (":" in net) == (version == 6))
        if not nets:
            return None
    not_nets = tuple(net for net in peer.not_nets if (":" in net) == (version == 6))
    if nets is not None and ROOTS[version] in nets:
        # Where something is taken away, the family's net keeps the other family's addresses out of the class.
        nets = (ROOTS[version],) if not_nets or peer.not_selector is not None else None
    if ROOTS[version] in not_nets:
        return None
    if (nets, not_nets) == (peer.nets, peer.not_nets):
        return peer
    return Peer(
        selector=peer.selector,
        not_selector=peer.not_selector,
        nets=nets,
        not_nets=not_nets,
        nodes=peer.nodes,
        domains=peer.domains,
    )


def _asked(snapshot: Snapshot, peers: Iterable[Peer]) -> tuple[set[str], dict[str, tuple[str, ...]]]:
    """The nets that peers name, and what the domain names that they name stand for."""
    nets: set[str] = set(ROOTS.values())
    domains: set[str] = set()
    for peer in peers:
        if peer.nets is not None:
            nets.update(peer.nets)
        if peer.not_nets:
            nets.update(peer.not_nets)
        if peer.domains is not None:
            domains.update(peer.domains)
    return nets, {name: snapshot.domains.get(name, ()) for name in sorted(domains)}


def _net_place(net: str) -> _Key:
    version, first, bits = net_key(net)
    return version, first, -bits
