"""Which of many may be about the same, without comparing each with each.

An answer is a set as a whole number, its bit ``i`` the ``i``-th of those that were given. It may hold more
than is true, never less: whoever asks compares with these few and no others, so an index is for speed alone.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Final, TypeAlias

from portwright.policy.labels import Expr, Has, In
from portwright.policy.population import Population, terms_of, union
from portwright.policy.rules import Peer, Rule, Traffic

#: Of a rule for more ports than this, none is looked up: it may meet any.
_PORTS: Final = 64

#: A protocol and a port.
_Service: TypeAlias = tuple[int, int]


@lru_cache(1 << 15)
def network(text: str) -> Any:
    """A net that is asked for with every change of the policies that name it; either version's."""
    return ipaddress.ip_network(text)


def places(bits: int) -> Iterator[int]:
    """The numbers in a set, ascending."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


class Subjects:
    """Expressions, by whom they select: of pods that are known those, else whatever labels could come."""

    def __init__(self, subjects: Sequence[Expr], world: Population) -> None:
        self._world = world
        self._all = (1 << len(subjects)) - 1
        self._of_pod: dict[int, int] = defaultdict(int)
        self._keyed: dict[str, int] = defaultdict(int)
        self._valued: dict[tuple[str, str], int] = defaultdict(int)
        self._known: dict[Expr, int] = {}
        alike: dict[Expr, int] = defaultdict(int)
        for place, subject in enumerate(subjects):
            alike[subject] |= 1 << place
        for subject, bits in alike.items():
            if world.workloads:
                for pod in places(world.of(subject)):
                    self._of_pod[pod] |= bits
                continue
            for key, values in _values(subject).items():
                self._keyed[key] |= bits
                for value in values:
                    self._valued[key, value] |= bits

    def meeting(self, subject: Expr) -> int:
        """Those that may select somebody whom ``subject`` selects."""
        found = self._known.get(subject)
        if found is None:
            found = self._known[subject] = self._meeting(subject)
        return found

    def _meeting(self, subject: Expr) -> int:
        if self._world.workloads:
            return union(self._of_pod.get(pod, 0) for pod in places(self._world.of(subject)))
        bits = self._all
        for key, values in _values(subject).items():
            # A label has one value: who asks for another selects others. Who doesn't ask may select these.
            bits &= ~self._keyed.get(key, 0) | union(self._valued.get((key, value), 0) for value in values)
        return bits


class Covering:
    """Expressions, by a term that has to be true wherever they are: the one that fewest of them have."""

    def __init__(self, wide: Iterable[Expr]) -> None:
        self._terms = terms = {expr: terms_of(expr) for expr in wide}
        count = Counter(term for found in terms.values() for term in found)
        self._always: list[Expr] = []
        self._equal: dict[Expr, list[Expr]] = defaultdict(list)
        self._with: dict[tuple[str, str | None], list[Expr]] = defaultdict(list)
        for expr, found in terms.items():
            if not found:
                self._always.append(expr)
                continue
            rarest = min(found, key=lambda term: count[term])
            self._equal[rarest].append(expr)
            if isinstance(rarest, Has):
                self._with[rarest.key, None].append(expr)
            elif isinstance(rarest, In):
                for value in rarest.values:
                    self._with[rarest.key, value].append(expr)

    def candidates(self, narrow: Expr) -> Iterator[Expr]:
        """Those that may be true wherever ``narrow`` is, as :func:`population.covers` says; some twice."""
        terms = terms_of(narrow)
        if any(isinstance(term, In) and not term.values for term in terms):
            yield from self._terms  # true of nobody, so whatever is asked of its key holds
            return
        yield from self._always
        for term in terms:
            yield from self._equal.get(term, ())
            if isinstance(term, In):
                yield from self._with.get((term.key, None), ())
                # One value tells: it has to be among theirs.
                for value in sorted(term.values)[:1]:
                    yield from self._with.get((term.key, value), ())


class Services:
    """Rules, by protocol and port."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._any = 0
        self._of: dict[_Service, int] = defaultdict(int)
        self._alone = 0
        for place, rule in enumerate(rules):
            services = _services(rule)
            if services is None:
                self._any |= 1 << place
            else:
                self._alone |= 1 << place
                for service in services:
                    self._of[service] |= 1 << place

    def meeting(self, rule: Rule) -> int:
        """Those that may match a packet that ``rule`` matches."""
        services = _services(rule)
        if services is None:
            return self._any | self._alone
        return self._any | union(self._of.get(service, 0) for service in services)


class Blocks:
    """Peers of addresses, by their nets."""

    def __init__(self, peers: Sequence[Peer]) -> None:
        self._any = 0
        self._exact: dict[tuple[int, int, int], int] = defaultdict(int)
        firsts: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
        for place, peer in enumerate(peers):
            if peer.nets is None:
                self._any |= 1 << place
            for text in peer.nets or ():
                net = network(text)
                first = int(net.network_address)
                self._exact[net.version, net.prefixlen, first] |= 1 << place
                firsts[net.version].append((first, place))
        self._firsts = {version: sorted(found) for version, found in firsts.items()}

    def overlapping(self, text: str) -> int:
        """Those that have an address of this net, if they leave none out."""
        net = network(text)
        first, last = int(net.network_address), int(net.broadcast_address)
        bits = self._any
        for length in range(net.prefixlen + 1):
            host = net.max_prefixlen - length
            bits |= self._exact.get((net.version, length, first >> host << host), 0)
        inside = self._firsts[net.version]
        for place in range(bisect_left(inside, (first, -1)), bisect_left(inside, (last + 1, -1))):
            bits |= 1 << inside[place][1]
        return bits


def _values(subject: Expr) -> dict[str, frozenset[str]]:
    """The values that its terms ask for, by key; of several terms for one key, the first's."""
    found: dict[str, frozenset[str]] = {}
    for term in terms_of(subject):
        if isinstance(term, In):
            found.setdefault(term.key, term.values)
    return found


def _services(rule: Rule) -> set[_Service] | None:
    """What the rule is for, if that is a few ports; None if it may be anything."""
    found: set[_Service] = set()
    for part in rule.traffic or (Traffic(),):
        if part.protocol is None or not part.ports:
            return None
        for ports in part.ports:
            if len(found) + ports.last - ports.first >= _PORTS:
                return None
            found.update((part.protocol, port) for port in range(ports.first, ports.last + 1))
    return found
