"""A rule's conditions as nft matches: lines that are ORed, each a list of matches that are ANDed.

Several addresses stand in a named set, one for each content, whose name is its hash: what is the same in two
renderings has the same name.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Final, NamedTuple, TypeAlias

from portwright.policy.labels import Expr, matches
from portwright.policy.rules import (
    ICMP,
    ICMP6,
    PORT_PROTOCOLS,
    Direction,
    EndpointKind,
    Peer,
    PortRange,
    Rule,
    Snapshot,
    Traffic,
)

#: The IP version that it is confined to, or None, and matches that all hold.
Line: TypeAlias = tuple[int | None, tuple[str, ...]]

_FAMILIES: Final = (4, 6)


class Words(NamedTuple):
    """What the addresses and ports of a packet are called, ``{}`` being ``ip`` or ``ip6``."""

    source: str
    destination: str
    source_port: str
    port: str


#: As they stand in the packet.
HEADER: Final = Words("{} saddr", "{} daddr", "th sport", "th dport")
#: As they stood in its connection's first packet, before anybody translated them.
ORIGINAL: Final = Words(
    "ct original {} saddr", "ct original {} daddr", "ct original proto-src", "ct original proto-dst"
)


class AddressSets:
    """Named sets of addresses, by content. ``elements``: how many they have together."""

    def __init__(self) -> None:
        self.sets: dict[str, tuple[int, tuple[str, ...]]] = {}
        self.elements = 0
        self._names: dict[tuple[int, tuple[str, ...]], str] = {}

    def among(self, word: str, family: int, nets: Iterable[str], *, negate: bool = False) -> list[str] | None:
        """Matches of an address being one of these, or none of these; None where that can't be."""
        found = collapsed(family, nets)
        if not found:
            return [] if negate else None
        if len(found) == 1 and found[0].endswith("/0"):
            return None if negate else []
        # One net is no set: of ten thousand sets the kernel finds each by walking through a list.
        what = found[0] if len(found) == 1 else f"@{self._name(family, found)}"
        return [f"{word} {'!= ' if negate else ''}{what}"]

    def _name(self, family: int, nets: tuple[str, ...]) -> str:
        name = self._names.get((family, nets))
        if name is None:
            digest = hashlib.sha256(" ".join(nets).encode()).hexdigest()[:16]
            name = self._names[family, nets] = f"a{family}_{digest}"
            self.sets[name] = family, nets
            self.elements += len(nets)
        return name


class Matcher:
    """Renders the conditions of rules against one snapshot, its sets into ``sets``."""

    def __init__(self, snapshot: Snapshot, sets: AddressSets) -> None:
        self._sets = sets
        there = [e for e in snapshot.endpoints if not e.host_network]
        self._ends = [e for e in there if e.kind in {EndpointKind.WORKLOAD, EndpointKind.HOST}]
        self._network_sets = [e for e in there if e.kind is EndpointKind.NETWORK_SET]
        self._nodes = [e for e in there if e.kind is EndpointKind.NODE]
        self._found: dict[Expr, tuple[str, ...]] = {}
        self._named: dict[tuple[str, int], dict[int, list[str]]] = {}
        for end in self._ends:
            for port in end.named_ports:
                at = self._named.setdefault((port.name, port.protocol), {})
                at.setdefault(port.port, []).extend(end.addresses)

    def lines(self, rule: Rule, direction: Direction, words: Words) -> list[str]:
        """What it takes for the rule to match, but for what it excludes."""
        addresses = list(self._addresses(rule, direction, words))
        if rule.traffic is None:
            traffic: list[Line] = [(None, ())]
        else:
            traffic = [line for each in rule.traffic for line in self._traffic(each, words)]
        return list(dict.fromkeys(_joined(product(addresses, traffic))))

    def exclusions(self, rule: Rule, words: Words) -> list[str]:
        """What the rule excludes."""
        found = (line for each in rule.not_traffic for line in self._traffic(each, words))
        return list(dict.fromkeys(_joined((line,) for line in found)))

    def _addresses(self, rule: Rule, direction: Direction, words: Words) -> Iterator[Line]:
        own, other = words.destination, words.source
        if direction is Direction.EGRESS:
            own, other = other, own
        peers = rule.peers if rule.peers is not None else (Peer(),)
        for peer in peers:
            found = [
                (*mine, *theirs)
                if (mine := self._peer(rule.local or Peer(), own, family)) is not None
                and (theirs := self._peer(peer, other, family)) is not None
                else None
                for family in _FAMILIES
            ]
            if found == [(), ()]:
                yield None, ()
                continue
            yield from (
                (family, line) for family, line in zip(_FAMILIES, found, strict=True) if line is not None
            )

    def _peer(self, peer: Peer, word: str, family: int) -> list[str] | None:
        """Matches of an address of this family being the peer's; None where the peer has none."""
        word = word.format("ip" if family == 4 else "ip6")
        wanted: list[Iterable[str]] = []
        if peer.nets is not None:
            wanted.append(peer.nets)
        if peer.selector is not None:
            wanted.append(self.found(peer.selector))
        if peer.nodes is not None:
            nodes = (n for n in self._nodes if matches(peer.nodes, n.labels))
            wanted.append([a for node in nodes for a in node.addresses])
        if peer.domains is not None:
            wanted.append(())  # nobody's: stages.refuse has said so
        parts = [self._sets.among(word, family, nets) for nets in wanted]
        parts.append(self._sets.among(word, family, peer.not_nets, negate=True))
        if peer.not_selector is not None:
            parts.append(self._sets.among(word, family, self.found(peer.not_selector), negate=True))
        found: list[str] = []
        for part in parts:
            if part is None:
                return None
            found += part
        return found

    def found(self, selector: Expr) -> tuple[str, ...]:
        """The addresses and nets of whatever the selector is true of."""
        known = self._found.get(selector)
        if known is None:
            ends = (e for e in self._ends if matches(selector, e.labels))
            sets = (e for e in self._network_sets if matches(selector, e.labels))
            known = self._found[selector] = (
                *(a for end in ends for a in end.addresses),
                *(net for each in sets for net in each.nets),
            )
        return known

    def _traffic(self, traffic: Traffic, words: Words) -> Iterator[Line]:
        """The alternatives of what a packet is."""
        version = traffic.ip_version
        if traffic.icmp_type is not None or traffic.icmp_code is not None:
            if traffic.protocol not in {None, ICMP, ICMP6} or _asks_ports(traffic):
                return
            kind = [] if traffic.icmp_type is None else [f"@th,0,8 {traffic.icmp_type}"]
            code = [] if traffic.icmp_code is None else [f"@th,8,8 {traffic.icmp_code}"]
            for number in (ICMP, ICMP6) if traffic.protocol is None else (traffic.protocol,):
                yield version, (f"meta l4proto {number}", *kind, *code)
            return
        if not _asks_ports(traffic):
            yield version, () if traffic.protocol is None else (f"meta l4proto {traffic.protocol}",)
            return
        for number in sorted(PORT_PROTOCOLS if traffic.protocol is None else {traffic.protocol}):
            if number not in PORT_PROTOCOLS:
                continue
            of_source = self._ports(
                traffic.source_ports, traffic.source_names, number, words.source, words.source_port
            )
            of_destination = self._ports(traffic.ports, traffic.names, number, words.destination, words.port)
            for one, other in product(of_source, of_destination):
                family = _family((version, one[0], other[0]))
                if family is not None:
                    yield family or None, (f"meta l4proto {number}", *one[1], *other[1])

    def _ports(
        self, ranges: tuple[PortRange, ...], names: tuple[str, ...], protocol: int, address: str, port: str
    ) -> list[Line]:
        """A port being in a range, or being what the endpoint of the address calls so."""
        if not ranges and not names:
            return [(None, ())]
        found: list[Line] = []
        if ranges:
            found.append((None, (f"{port} {_port_set(ranges)}",)))
        at: dict[int, list[str]] = {}
        for name in names:
            for number, addresses in self._named.get((name, protocol), {}).items():
                at.setdefault(number, []).extend(addresses)
        for number, addresses in sorted(at.items()):
            for family in _FAMILIES:
                word = address.format("ip" if family == 4 else "ip6")
                among = self._sets.among(word, family, addresses)
                if among is not None:
                    found.append((family, (*among, f"{port} {number}")))
        return found


def _asks_ports(traffic: Traffic) -> bool:
    return bool(traffic.ports or traffic.names or traffic.source_ports or traffic.source_names)


def _family(versions: Iterable[int | None]) -> int | None:
    """The one that all are confined to, 0 for any; None where there is none."""
    found = {version for version in versions if version is not None}
    return None if len(found) > 1 else next(iter(found), 0)


def _joined(lines: Iterable[Iterable[Line]]) -> Iterator[str]:
    """Each combination that can be, as text; it says its IP version where no address does."""
    for parts in map(tuple, lines):
        family = _family(version for version, _ in parts)
        if family is None:
            continue
        found = [match for _, part in parts for match in part]
        word = "ip" if family == 4 else "ip6"
        if family and not any(f"{word} " in match for match in found):
            found.insert(0, f"meta nfproto ipv{family}")
        # A protocol is said before what depends on it: nft reads ports and ct's by it.
        found.sort(key=lambda match: not match.startswith("meta "))
        yield " ".join(dict.fromkeys(found))


def _port_set(ranges: Iterable[PortRange]) -> str:
    merged: list[list[int]] = []
    for each in sorted(ranges):
        if merged and each.first <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], each.last)
        else:
            merged.append([each.first, each.last])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in merged]
    return texts[0] if len(texts) == 1 else f"{{ {', '.join(texts)} }}"


def collapsed(family: int, nets: Iterable[str]) -> tuple[str, ...]:
    """Those of a family, sorted, joined where they touch; one address without its length."""
    if family == 4:
        found4 = ipaddress.collapse_addresses(ipaddress.IPv4Network(n) for n in nets if ":" not in n)
        return tuple(_text(net) for net in found4)
    found6 = ipaddress.collapse_addresses(ipaddress.IPv6Network(n) for n in nets if ":" in n)
    return tuple(_text(net) for net in found6)


def _text(net: ipaddress.IPv4Network | ipaddress.IPv6Network) -> str:
    return str(net.network_address) if net.prefixlen == net.max_prefixlen else str(net)
