"""Whom two states of policy can tell apart: addresses in groups, each treated alike by both states.

The groups are read off the compiled tables, where an address is a class and two sets: so a thousand ports of
the same labels are one group, and two states are compared group by group and not port by port. Beside the
endpoints there are the nets that rules name, each less what lies in it and has a group of its own, and
:data:`ANY_OTHER`, the rest of the family.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from portwright.policy.classes import ROOTS, LabelIndex
from portwright.policy.compile import compile_policies
from portwright.policy.engine import tiers_in_order
from portwright.policy.matching import address_key, net_key
from portwright.policy.matrix import PLACEHOLDERS
from portwright.policy.rules import Direction, Endpoint, EndpointKind, PolicySet, Snapshot
from portwright.policy.selection import Selected, Selection, is_workload
from portwright.policy.tables import Tables

#: The name of what no rule names: addresses of no endpoint, in no net of a rule.
ANY_OTHER = "any other address"

_UNSELECTED: Selected = ()
_KIND_NAMES = {EndpointKind.NODE: "node ", EndpointKind.HOST: "host/"}


class Side(NamedTuple):
    """What one state makes of an address.

    ``workload``: it has sides of its own, of the sets ``set_in`` and ``set_out``; ``selected_in`` and
    ``selected_out`` are the policies of these.
    """

    class_id: int
    set_in: int
    set_out: int
    workload: bool
    local_node: bool
    selected_in: Selected
    selected_out: Selected


class Group(NamedTuple):
    """Addresses of one family that are the same to both states.

    ``names`` are sorted; ``titles``: the endpoint behind each, or the name itself of what is none.
    """

    before: Side
    after: Side
    names: tuple[str, ...]
    titles: tuple[str, ...]

    @property
    def workload(self) -> bool:
        """Whether policies may select them, in one of the states at least."""
        return self.before.workload or self.after.workload


class State:
    """Policies and the world that they are in force in, compiled. Raises as compile_policies."""

    def __init__(self, policies: PolicySet, snapshot: Snapshot) -> None:
        """Compiles them."""
        self.policies = policies
        self.snapshot = snapshot
        self.compiled = compile_policies(policies, snapshot)
        self._tables = Tables(self.compiled)
        labels = LabelIndex(snapshot.endpoints)
        selection = Selection(tiers_in_order(policies), snapshot.endpoints, labels)
        found = {direction: selection.per_endpoint(direction) for direction in Direction}
        self._selected = {
            address: (found[Direction.INGRESS][index], found[Direction.EGRESS][index])
            for index, endpoint in enumerate(snapshot.endpoints)
            if is_workload(endpoint)
            for address in endpoint.addresses
        }

    def side(self, address: str) -> Side:
        """What this state makes of an address."""
        entry = self._tables.entry(address)
        selected_in, selected_out = self._selected.get(address, (_UNSELECTED, _UNSELECTED))
        return Side(
            entry.class_id,
            entry.set_in,
            entry.set_out,
            bool(entry.owner),
            entry.local_node,
            selected_in,
            selected_out,
        )


def with_addresses(before: Snapshot, after: Snapshot) -> tuple[Snapshot, Snapshot]:
    """Both worlds, in which workloads that have no address in ``after`` have one, the same in both.

    It is nobody's, and no rule names it by accident. Such a workload that ``before`` lacks is put there as it
    will be: it is not the coming of a pod that is asked about, but what policy says of it.
    """
    lacking = sorted({e.title for e in after.endpoints if is_workload(e) and not e.addresses})
    if not lacking:
        return before, after
    given = {
        title: tuple(str(net[number]) for net in PLACEHOLDERS) for number, title in enumerate(lacking, 1)
    }

    def addressed(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
        return tuple(
            msgspec.structs.replace(e, addresses=(*e.addresses, *given[e.title]))
            if is_workload(e) and e.title in given
            else e
            for e in endpoints
        )

    known = {e.title for e in before.endpoints if is_workload(e)}
    new = (e for e in after.endpoints if is_workload(e) and e.title in given and e.title not in known)
    return (
        msgspec.structs.replace(before, endpoints=addressed((*before.endpoints, *new))),
        msgspec.structs.replace(after, endpoints=addressed(after.endpoints)),
    )


def groups_of(before: State, after: State, version: int) -> list[Group]:
    """All groups of one IP version, by the first of their names; the world's come last."""
    titles = titles_of((before.snapshot, after.snapshot))
    alike: dict[tuple[object, ...], tuple[Side, Side, list[str]]] = {}
    exact = {
        address
        for state in (before, after)
        for address in state.compiled.addresses
        if address_key(address)[0] == version
    }
    places = [(address, address) for address in exact]
    nets = {ROOTS[version], *before.compiled.prefixes, *after.compiled.prefixes}
    places += free_places((net for net in nets if net_key(net)[0] == version), exact)
    for name, address in places:
        old, new = before.side(address), after.side(address)
        key = (old[:5], new[:5], *map(id, (*old[5:], *new[5:])))  # equal selections are one object
        alike.setdefault(key, (old, new, []))[2].append(name)
    titles[ROOTS[version]] = ANY_OTHER
    split = in_several(titles, [names for _, _, names in alike.values()])
    found = []
    for old, new, names in alike.values():
        shown = {f"{titles[n]} ({n})" if n in split else titles.get(n, n): titles.get(n, n) for n in names}
        ordered = sorted(shown.items())
        found.append(Group(old, new, tuple(n for n, _ in ordered), tuple(t for _, t in ordered)))
    return sorted(found, key=lambda group: (not group.workload, group.names))


def titles_of(snapshots: tuple[Snapshot, Snapshot]) -> dict[str, str]:
    """Whose an address is: a workload's before a node's or a host's, what is there after before what was."""
    return {
        address: _KIND_NAMES.get(endpoint.kind, "") + endpoint.title
        for workloads in (False, True)
        for snapshot in snapshots
        for endpoint in snapshot.endpoints
        if is_workload(endpoint) == workloads and not endpoint.host_network
        for address in endpoint.addresses
    }


def in_several(titles: dict[str, str], groups: list[list[str]]) -> set[str]:
    """The addresses of those endpoints that are in several groups: there a title alone would not do."""
    where: dict[str, set[int]] = defaultdict(set)
    for number, names in enumerate(groups):
        for name in names:
            if name in titles:
                where[titles[name]].add(number)
    return {name for names in groups for name in names if name in titles and len(where[titles[name]]) > 1}


def free_places(nets: Iterable[str], exact: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(net, an address) of each net of which something lies in no smaller net and is no exact address.

    All are of one family, whose root is among ``nets``.
    """
    spans: list[tuple[int, int, str]] = []
    version = 4
    for net in nets:
        version, first, bits = net_key(net)
        spans.append((first, -(first + (1 << bits) - 1), net))
    spans += [(number, -number, "") for _, number in map(address_key, exact)]
    # A net before what lies in it, an address after the net of its full length.
    spans.sort(key=lambda span: (span[0], span[1], not span[2]))
    around: list[tuple[str, int]] = []  # (net, its last address) around the present span
    next_free: dict[str, int] = {}
    free: dict[str, int] = {}
    for first, negative, net in spans:
        while around and around[-1][1] < first:
            around.pop()
        if around:
            outer = around[-1][0]
            if next_free[outer] < first:
                free.setdefault(outer, next_free[outer])
            next_free[outer] = 1 - negative
        if net:
            around.append((net, -negative))
            next_free[net] = first
    for _, negative, net in spans:
        if net and next_free[net] <= -negative:
            free.setdefault(net, next_free[net])
        if net in free:
            yield net, str(_address(version, free[net]))


def _address(version: int, number: int) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.IPv4Address(number) if version == 4 else ipaddress.IPv6Address(number)
