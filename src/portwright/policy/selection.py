"""Which policies govern whom: for every endpoint at once, in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from portwright.policy.classes import LabelIndex, bits_of, indexes_of
from portwright.policy.rules import Direction, Endpoint, EndpointKind, Peer, Policy, Tier

#: Per tier that selects, in order: the tier, and its policies that do, in order.
Selected: TypeAlias = tuple[tuple[Tier, tuple[Policy, ...]], ...]


def is_workload(endpoint: Endpoint) -> bool:
    """Whether policies of workloads govern it; not so pods on their node's address."""
    return endpoint.kind is EndpointKind.WORKLOAD and not endpoint.host_network


def is_enforced(policy: Policy) -> bool:
    """Whether workloads feel it: not staged, and not for the host interfaces' own stages alone."""
    return not (policy.staged or policy.do_not_track or policy.pre_dnat)


def is_for_hosts(policy: Policy) -> bool:
    """Whether it asks for a stage of the host interfaces: untracked, before DNAT, or on forwarded traffic."""
    return not policy.staged and (policy.do_not_track or policy.pre_dnat or policy.apply_on_forward)


class _Group(NamedTuple):
    """Policies of the same truth: (tier's place, policy's place in its tier) of each."""

    bits: int
    places: list[tuple[int, int]]


class Selection:
    """For each direction the groups of policies that select the same endpoints."""

    def __init__(
        self,
        tiers: tuple[tuple[Tier, tuple[Policy, ...]], ...],
        endpoints: tuple[Endpoint, ...],
        labels: LabelIndex,
    ) -> None:
        self._tiers = tiers
        self._count = len(endpoints)
        workloads = bits_of((i for i, e in enumerate(endpoints) if is_workload(e)), self._count)
        self._groups: dict[Direction, list[_Group]] = {}
        for direction in Direction:
            groups: dict[int, _Group] = {}
            for tier_place, (_, policies) in enumerate(tiers):
                for place, policy in enumerate(policies):
                    if not is_enforced(policy) or policy.rules(direction) is None:
                        continue
                    bits = labels.true_of(policy.subject) & workloads
                    if bits:
                        groups.setdefault(bits, _Group(bits, [])).places.append((tier_place, place))
            self._groups[direction] = list(groups.values())
        self._merged: dict[tuple[Direction, tuple[int, ...]], Selected] = {}

    def policies(self, direction: Direction) -> Iterator[Policy]:
        """Those that select somebody in ``direction``."""
        for group in self._groups[direction]:
            for tier, place in group.places:
                yield self._tiers[tier][1][place]

    def per_endpoint(self, direction: Direction) -> list[Selected]:
        """Of each endpoint, in the snapshot's order. Equal ones are the same object."""
        groups = self._groups[direction]
        found: list[list[int]] = [[] for _ in range(self._count)]
        for number, group in enumerate(groups):
            for index in indexes_of(group.bits):
                found[index].append(number)
        return [self._merge(direction, tuple(numbers)) for numbers in found]

    def _merge(self, direction: Direction, numbers: tuple[int, ...]) -> Selected:
        known = self._merged.get((direction, numbers))
        if known is None:
            by_tier: dict[int, list[int]] = {}
            for number in numbers:
                for tier, place in self._groups[direction][number].places:
                    by_tier.setdefault(tier, []).append(place)
            known = self._merged[direction, numbers] = tuple(
                (self._tiers[tier][0], tuple(self._tiers[tier][1][place] for place in sorted(places)))
                for tier, places in sorted(by_tier.items())
            )
        return known


def peers_of(policy: Policy, direction: Direction) -> Iterator[Peer]:
    """Every peer that the rules of that direction ask about, either side's."""
    for rule in policy.rules(direction) or ():
        yield from rule.peers or ()
        if rule.local is not None:
            yield rule.local
