"""What a Kubernetes policy's form alone shows."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from portwright.policy.lints.entry import SIDES, Entry, Lint
from portwright.policy.manifests.documents import Path
from portwright.policy.population import describe
from portwright.policy.rules import Direction


def written(entry: Entry) -> Iterator[Lint]:
    """Rules that do nothing, empty lists, two dashes for one, networks with bits beyond their prefix."""
    spec = entry.document.body.get("spec") or {}
    types = spec.get("policyTypes") or []
    for direction in Direction:
        rules = spec.get(direction) or []
        kind = direction.capitalize()
        if rules and types and kind not in types:
            yield entry.lint(
                ("spec", str(direction)),
                "dead-rules",
                f"these {direction} rules do nothing: policyTypes does not have {kind}",
                f"Add {kind} to policyTypes, or remove the rules.",
            )
        for index, rule in enumerate(rules):
            yield from _written_rule(entry, direction, index, rule)


def _written_rule(entry: Entry, direction: Direction, index: int, rule: dict[str, Any]) -> Iterator[Lint]:
    side = SIDES[direction]
    path: Path = ("spec", str(direction), index)
    for name, anything in ((side, "anybody, outside the cluster too"), ("ports", "every port and protocol")):
        if rule.get(name) == []:
            yield entry.lint(
                (*path, name),
                "empty-list",
                f"`{name}: []` means {anything}, not none",
                f"Remove `{name}` if that is meant; to allow nothing, remove the whole rule.",
            )
    peers = rule.get(side) or []
    for number, (first, second) in enumerate(pairwise(peers), 1):
        if {frozenset(_given(first)), frozenset(_given(second))} == {
            frozenset({"namespaceSelector"}),
            frozenset({"podSelector"}),
        }:
            yield entry.lint(
                (*path, side, number),
                "two-dashes",
                f"two items mean either: {_said(entry, direction, index, number)}",
                f"If the pods of those namespaces are meant, remove the dash on line "
                f"{entry.document.line((*path, side, number))}, so that both selectors are one item.",
            )
    for number, peer in enumerate(peers):
        block = peer.get("ipBlock") or {}
        spots: list[tuple[Path, Any]] = [(("cidr",), block.get("cidr"))]
        spots += [(("except", hole), text) for hole, text in enumerate(block.get("except") or [])]
        for spot, text in spots:
            if text and (net := ipaddress.ip_network(text, strict=False)) and not _same(text, net):
                yield entry.lint(
                    (*path, side, number, "ipBlock", *spot),
                    "host-bits",
                    f"{text} has bits beyond its prefix and is read as {net}",
                    f"Write {net}, or {text.partition('/')[0]}/{net.max_prefixlen} for the one address.",
                )


def _same(text: str, net: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    return ipaddress.ip_address(text.partition("/")[0]) == net.network_address


def _given(peer: dict[str, Any]) -> set[str]:
    return {name for name, value in peer.items() if value is not None}


def _said(entry: Entry, direction: Direction, index: int, number: int) -> str:
    """The two peers in words. Dead rules are not in the policy, so have none."""
    rules = entry.policy.rules(direction)
    peers = rules[index].peers if rules else None
    if peers is None:
        return "one selector or the other"
    left, right = (peers[place].selector for place in (number - 1, number))
    return f"({describe(left)}) or ({describe(right)})" if left and right else ""
