"""A second reading of the rule model: an nftables ruleset, and what the kernel says of real packets by it.

Written from the model's words (portwright/policy/rules.py) and knows neither the engine nor the compiler: it
takes labels.matches alone, to learn which addresses a selector means. A tier is a chain for each direction;
a pass returns from it, any other end of it is a ``goto`` that never comes back. A rule is a small ladder that
the packet's mark climbs, one step for each of the rule's fields::

    meta mark set 0
    <the selected side>         meta mark set 1     one line for each alternative
    meta mark 1 <a peer>        meta mark set 2     likewise
    meta mark 2 <traffic>       meta mark set 3     likewise
    meta mark 3 <not traffic>   meta mark set 0     likewise
    meta mark 3                 goto, or return

No connection tracking: each packet is the first of its connection.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import itertools
import json
import os
import struct
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from portwright.policy.labels import Expr, matches
from portwright.policy.rules import (
    ICMP,
    ICMP6,
    PORT_PROTOCOLS,
    TCP,
    Action,
    Direction,
    Endpoint,
    EndpointKind,
    Flow,
    Peer,
    Policy,
    PolicySet,
    PortRange,
    Rule,
    Snapshot,
    Tier,
    Traffic,
)
from tests.dataplane import frames
from tests.fix_bpf import ip

_DEVICE: Final = "pwt"
#: What the number of a packet may be: IPv4's identification has 16 bits, IPv6's flow label 20.
MOST_PACKETS: Final = 65_535
_WORD: Final = {4: "ip", 6: "ip6"}
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000

_HEAD: Final = """\
flush ruleset
table inet pw {
  set allowed4 { typeof ip id; size 65535; flags dynamic; }
  set allowed6 { typeof ip6 flowlabel; size 65535; flags dynamic; }
  set denied4 { typeof ip id; size 65535; flags dynamic; }
  set denied6 { typeof ip6 flowlabel; size 65535; flags dynamic; }
  chain allowed {
    meta nfproto ipv4 add @allowed4 { ip id } drop
    add @allowed6 { ip6 flowlabel } drop
  }
  chain denied {
    meta nfproto ipv4 add @denied4 { ip id } drop
    add @denied6 { ip6 flowlabel } drop
  }
"""


def ruleset(policies: PolicySet, snapshot: Snapshot) -> str:
    """Text for ``nft -f``: every packet ends in one of the sets ``allowed`` and ``denied``, by its number."""
    return _HEAD + "".join(_Rendering(policies, snapshot).chains()) + "}\n"


class _Rendering:
    def __init__(self, policies: PolicySet, snapshot: Snapshot) -> None:
        self.policies, self.snapshot = policies, snapshot
        #: Whom selectors find, beside network sets; of these, whom policies select; nodes.
        there = [end for end in snapshot.endpoints if not end.host_network]
        self.known = [e for e in there if e.kind in {EndpointKind.WORKLOAD, EndpointKind.HOST}]
        self.pods = [e for e in there if e.kind is EndpointKind.WORKLOAD]
        self.nodes = [e for e in there if e.kind is EndpointKind.NODE]
        self.sets = [e for e in snapshot.endpoints if e.kind is EndpointKind.NETWORK_SET]

    # --- chains ---

    def chains(self) -> Iterator[str]:
        tiers = sorted(self.policies.tiers, key=lambda tier: (tier.order, tier.name))
        for direction in Direction:
            for number, tier in enumerate(tiers):
                yield _chain(f"{direction}{number}", self.tier(tier, direction))
            yield _chain(direction, (f"jump {direction}{number}" for number in range(len(tiers))))
        yield _chain("receiver", self.receiver())
        yield _chain("packet", self.packet())

    def packet(self) -> Iterator[str]:
        """What a pod sends to itself passes; else the sender's part, then the receiver's."""
        yield "type filter hook prerouting priority raw; policy drop;"
        for pod in self.pods:
            for family in (4, 6):
                yield from _line(
                    _among("saddr", family, pod.addresses),
                    _among("daddr", family, pod.addresses),
                    "goto allowed",
                )
        for family in (4, 6):
            yield from _line(_among("saddr", family, _addresses(self.pods)), "jump egress")
        yield "goto receiver"

    def receiver(self) -> Iterator[str]:
        """What the pods' own node sends passes; no word of a policy is an allow."""
        local = _addresses(node for node in self.nodes if node.local_node)
        for family in (4, 6):
            yield from _line(_among("saddr", family, local), "goto allowed")
        for family in (4, 6):
            yield from _line(_among("daddr", family, _addresses(self.pods)), "jump ingress")
        yield "goto allowed"

    def tier(self, tier: Tier, direction: Direction) -> Iterator[str]:
        """The rules of its policies in order, then its default for whom these select."""
        selected: set[str] = set()
        own = "daddr" if direction is Direction.INGRESS else "saddr"
        for policy in sorted(self.policies.policies, key=lambda p: (p.order, p.name, p.namespace, p.kind)):
            rules = policy.rules(direction)
            if rules is None or policy.tier != tier.name or _not_in_force(policy):
                continue
            subjects = _addresses(e for e in self.pods if matches(policy.subject, e.labels))
            selected.update(subjects)
            for rule in rules:
                yield from self.rule(rule, direction, subjects)
        if tier.default is Action.DENY:
            for family in (4, 6):
                yield from _line(_among(own, family, selected), "goto denied")

    # --- rules ---

    def rule(self, rule: Rule, direction: Direction, subjects: Iterable[str]) -> Iterator[str]:
        """The ladder of a rule; none for one that only logs."""
        allow = "goto allowed" if direction is Direction.INGRESS else "goto receiver"
        ends = {Action.ALLOW: allow, Action.DENY: "goto denied", Action.PASS: "return"}
        if rule.action not in ends:
            return
        own, other = ("daddr", "saddr") if direction is Direction.INGRESS else ("saddr", "daddr")
        selected: list[str] = []
        for family in (4, 6):
            local = "" if rule.local is None else self.peer(rule.local, own, family)
            selected += _line(_among(own, family, subjects), local, "meta mark set 1")
        if not selected:
            return
        yield from ("meta mark set 0", *selected)
        if rule.peers is None:
            yield "meta mark 1 meta mark set 2"
        for peer in rule.peers or ():
            for family in (4, 6):
                yield from _line("meta mark 1", self.peer(peer, other, family), "meta mark set 2")
        if rule.traffic is None:
            yield "meta mark 2 meta mark set 3"
        for traffic in rule.traffic or ():
            for match in self.traffic(traffic):
                yield f"meta mark 2 {match} meta mark set 3"
        for traffic in rule.not_traffic:
            for match in self.traffic(traffic):
                yield f"meta mark 3 {match} meta mark set 0"
        yield f"meta mark 3 {ends[rule.action]}"

    def peer(self, peer: Peer, side: str, family: int) -> str | None:
        """The match of a peer's addresses of a family; None where it has none of it."""
        parts: list[str | None] = [f"meta nfproto ipv{family}"]
        if peer.nets is not None:
            parts.append(_among(side, family, peer.nets))
        if peer.selector is not None:
            parts.append(_among(side, family, self.found(peer.selector)))
        if peer.nodes is not None:
            chosen = _addresses(n for n in self.nodes if matches(peer.nodes, n.labels))
            parts.append(_among(side, family, chosen))
        if peer.domains is not None:
            resolved = [a for name in peer.domains for a in self.snapshot.domains.get(name, ())]
            parts.append(_among(side, family, resolved))
        parts.append(_not_among(side, family, peer.not_nets))
        if peer.not_selector is not None:
            parts.append(_not_among(side, family, self.found(peer.not_selector)))
        given = [part for part in parts if part is not None]
        return " ".join(given) if len(given) == len(parts) else None

    def found(self, selector: Expr) -> list[str]:
        """The addresses and nets that a selector means."""
        nets = [net for end in self.sets if matches(selector, end.labels) for net in end.nets]
        return [*_addresses(end for end in self.known if matches(selector, end.labels)), *nets]

    def traffic(self, traffic: Traffic) -> Iterator[str]:
        """The matches of what a packet is; each alternative has its own."""
        families = (4, 6) if traffic.ip_version is None else (traffic.ip_version,)
        version = "" if traffic.ip_version is None else f"meta nfproto ipv{traffic.ip_version} "
        protocol = "" if traffic.protocol is None else f"meta l4proto {traffic.protocol} "
        if traffic.icmp_type is not None or traffic.icmp_code is not None:
            if traffic.protocol not in {None, ICMP, ICMP6}:
                return
            kind = "" if traffic.icmp_type is None else f"@th,0,8 {traffic.icmp_type} "
            code = "" if traffic.icmp_code is None else f"@th,8,8 {traffic.icmp_code} "
            yield version + (protocol or f"meta l4proto {{ {ICMP}, {ICMP6} }} ") + kind + code
            return
        asked = {
            end: (ports, names)
            for end, ports, names in (
                ("d", traffic.ports, traffic.names),
                ("s", traffic.source_ports, traffic.source_names),
            )
            if ports or names
        }
        if not asked:
            yield version + protocol
            return
        for number in sorted(PORT_PROTOCOLS if traffic.protocol is None else {traffic.protocol}):
            if number not in PORT_PROTOCOLS:
                continue
            for family in families:
                ways = (list(self.ports(end, *of, number, family)) for end, of in asked.items())
                for both in itertools.product(*ways):
                    yield " ".join((f"meta nfproto ipv{family} meta l4proto {number}", *both))

    def ports(
        self, end: str, ports: tuple[PortRange, ...], names: tuple[str, ...], protocol: int, family: int
    ) -> Iterator[str]:
        """The matches of one end's port ("s" or "d"), by number and by the name that this end gives it."""
        for each in ports:
            yield f"th {end}port {each.first}-{each.last}"
        if named := self.named(names, protocol, family):
            yield f"{_WORD[family]} {end}addr . th {end}port {{ {', '.join(named)} }}"

    def named(self, names: tuple[str, ...], protocol: int, family: int) -> list[str]:
        """``address . port`` of each endpoint that calls one of its ports so under this protocol."""
        found = {
            f"{address} . {given.port}"
            for end in self.known
            for given in end.named_ports
            if given.name in names and given.protocol == protocol
            for address in end.addresses
            if _family(address) == family
        }
        return sorted(found)


def _not_in_force(policy: Policy) -> bool:
    """Dry runs, and what the host's interfaces do before workloads."""
    return policy.staged or policy.do_not_track or policy.pre_dnat


def _chain(name: str, lines: Iterable[str]) -> str:
    return "".join([f"  chain {name} {{\n", *(f"    {line}\n" for line in lines), "  }\n"])


def _line(*parts: str | None) -> Iterator[str]:
    """One line, unless a part of it is a match of nothing."""
    given = [part for part in parts if part is not None]
    if len(given) == len(parts):
        yield " ".join(filter(None, given))


def _family(net: str) -> int:
    return 6 if ":" in net else 4


def _addresses(endpoints: Iterable[Endpoint]) -> list[str]:
    return [address for endpoint in endpoints for address in endpoint.addresses]


def _collapsed(family: int, nets: Iterable[str]) -> list[str]:
    """Those of a family, without those inside others, which nft refuses."""
    chosen = [net for net in nets if _family(net) == family]
    if family == 4:
        return [str(net) for net in ipaddress.collapse_addresses(map(ipaddress.IPv4Network, chosen))]
    return [str(net) for net in ipaddress.collapse_addresses(map(ipaddress.IPv6Network, chosen))]


def _among(side: str, family: int, nets: Iterable[str]) -> str | None:
    """A match of the address being one of these; None where there is none of the family."""
    found = _collapsed(family, nets)
    return f"{_WORD[family]} {side} {{ {', '.join(found)} }}" if found else None


def _not_among(side: str, family: int, nets: Iterable[str]) -> str:
    """A match of the address being none of these."""
    found = _collapsed(family, nets)
    return f"{_WORD[family]} {side} != {{ {', '.join(found)} }}" if found else ""


# --- real packets ---


class Nft:
    """A tun device of this thread's network namespace, whose packets the ruleset judges as they come in."""

    def __init__(self, device: int) -> None:
        self._device = device

    def load(self, rules: str) -> None:
        """Put rules in the place of all that there are; the sets of verdicts are empty then."""
        done = subprocess.run(["nft", "-f", "-"], input=rules, text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{done.stderr[:2000]}\n{rules}"

    def verdicts(self, flows: Sequence[Flow]) -> list[bool]:
        """Send the first packet of each; whether it was allowed. Every one of them must have been judged."""
        assert len(flows) <= MOST_PACKETS
        for number, flow in enumerate(flows, 1):
            os.write(self._device, packet(flow, number))
        listed = subprocess.run(
            ["nft", "-j", "list", "sets", "inet"], capture_output=True, text=True, check=True
        ).stdout
        sets = [item["set"] for item in json.loads(listed)["nftables"] if "set" in item]
        found = {name: set[int]() for name in ("allowed", "denied")}
        for one in sets:
            found[one["name"][:-1]].update(one.get("elem", ()))
        allowed, denied = found["allowed"], found["denied"]
        assert not allowed & denied
        assert allowed | denied == set(range(1, len(flows) + 1)), "a packet without a verdict"
        return [number in allowed for number in range(1, len(flows) + 1)]


@contextlib.contextmanager
def nft() -> Iterator[Nft]:
    """In a namespace of one's own (fix_bpf.own_netns), which has no other ruleset."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", _DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
        ip("link", "set", _DEVICE, "up")
        yield Nft(device)
    finally:
        os.close(device)


def packet(flow: Flow, number: int) -> bytes:
    """The flow's first packet with its number in it. Checksums of layer 4 are nobody's concern here."""
    match flow.protocol:
        case p if p == TCP:
            body = struct.pack("!HHIIHHI", flow.source_port or 0, flow.port or 0, 1, 0, 0x5002, 1000, 0)
        case p if p in PORT_PROTOCOLS:
            body = struct.pack("!HHHHI", flow.source_port or 0, flow.port or 0, 12, 0, 0)
        case p if p in (ICMP, ICMP6):
            body = struct.pack("!BBHI", flow.icmp_type or 0, flow.icmp_code or 0, 0, 0)
        case _:
            body = bytes(8)
    if _family(flow.source) == 4:
        return frames.ipv4(flow.source, flow.destination, flow.protocol, body, ident=number)
    whole = frames.ipv6(flow.source, flow.destination, flow.protocol, body)
    return struct.pack("!I", 6 << 28 | number) + whole[4:]
