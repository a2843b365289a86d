"""Policies and a snapshot become the data path's tables: pure, whole, and of known size.

::

    policies x endpoints -> who is selected (label bitsets)
                         -> per own address its effective rule list, shared by content: a set
    the sets' peers      -> terms -> per place the terms true of it: a class
    sets x classes       -> cells, where the set's default is not the verdict

``recompile`` gives what the tables in force already say the same numbers, and carries over their cells, so
that the difference is as small as the change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from portwright.model.errors import InvalidInput
from portwright.policy import sources
from portwright.policy.cells import Classes, carried, fresh
from portwright.policy.classes import ROOTS, LabelIndex, Places
from portwright.policy.engine import tiers_in_order
from portwright.policy.limits import check_tables, too_many_cells, too_many_intervals, too_many_sources
from portwright.policy.memory import Asker, Memory, SetKey, SplitKey
from portwright.policy.names import RuleNames
from portwright.policy.ranges import Ranges, intersect
from portwright.policy.resolve import Own, Resolved, Resolver, Term, Traits, own_of, traits_of
from portwright.policy.rules import (
    Action,
    Direction,
    EndpointKind,
    NamedPort,
    Policy,
    PolicySet,
    Snapshot,
)
from portwright.policy.selection import Selected, Selection, is_enforced, is_for_hosts, is_workload, peers_of
from portwright.policy.sets import RuleList, TierRules, TooManyIntervals
from portwright.policy.tables import (
    MAX_CELLS,
    MAX_INTERVALS,
    AddressEntry,
    Compiled,
    PolicyTooLarge,
    SetTable,
    Size,
    SplitTable,
)

#: Counting of cells ends here: enough to name who is to blame.
_COUNTED = 4 * MAX_CELLS


def compile_policies(policies: PolicySet, snapshot: Snapshot) -> Compiled:
    """The tables of these policies in this world.

    Raises InvalidInput for a policy of an unknown tier, for two workloads of one address, and for addresses
    or nets that are none; PolicyTooLarge where a table would not fit, naming the policy that adds most.
    """
    return _Compilation(policies, snapshot, None).run()


def recompile(previous: Compiled, policies: PolicySet, snapshot: Snapshot) -> Compiled:
    """The same decisions as compile_policies', numbered so that little differs from ``previous``.

    Every number that is in both means the same in both. ``previous`` must be what is in force, and come from
    this module. Raises as compile_policies.
    """
    before = previous.memory
    if not isinstance(before, Memory):
        raise TypeError("previous was not compiled here")
    try:
        return _Compilation(policies, snapshot, before).run()
    except PolicyTooLarge:
        # Defaults that fitted the old classes can cost the new ones cells. Choose them anew before refusing.
        return _Compilation(policies, snapshot, before, keep_sets=False).run()


class _Side(NamedTuple):
    """A workload's address, with the numbers of its sets."""

    place: int
    owner: int
    set_in: int
    set_out: int


class _Compilation:
    def __init__(
        self, policies: PolicySet, snapshot: Snapshot, before: Memory | None, *, keep_sets: bool = True
    ) -> None:
        self.snapshot = snapshot
        self.memory = Memory(policies, before, keep_sets=keep_sets)
        self.built_before = before.built if before is not None and keep_sets else {}
        self.classes_before = set(before.classes.used.values()) if before is not None else set[int]()
        self.tiers = tiers_in_order(policies)
        self.host_policies = tuple(policy for policy in policies.policies if is_for_hosts(policy))
        labels = (
            before.labels.again(snapshot.endpoints) if before is not None else LabelIndex(snapshot.endpoints)
        )
        self.selection = Selection(self.tiers, snapshot.endpoints, labels)
        self.in_use = [(policy, d) for d in Direction for policy in self.selection.policies(d)]
        # Of all that could select somebody: what can't be done is refused now, not when a workload comes.
        enforced = [policy for policy in policies.policies if is_enforced(policy)]
        self.traits = self.memory.traits
        for asked in ((p, d) for p in enforced for d in Direction if (id(p), d) not in self.traits):
            self.traits[id(asked[0]), asked[1]] = traits_of(*asked)
        peers = [peer for policy, d in self.in_use for peer in peers_of(policy, d)]
        self.places = (
            Places(snapshot, labels, peers)
            if before is None
            else before.places.again(snapshot, labels, peers)
        )
        self.memory.labels, self.memory.places = labels, self.places
        self.names = RuleNames(self.memory.rules, before.infos if before is not None else {})
        self.memory.infos = self.names.infos
        self.resolver = Resolver(self.places, self.names.of_rule, self.memory.terms.of)
        self.lists: dict[int, tuple[Resolved, ...]] = {}
        self._sourced: set[int] = set()  # those that ask for source ports
        self._resolved: dict[Asker, int] = {}
        #: By selected policies (their id): what all of these ask about the own address, and the sets.
        self._sets: dict[int, tuple[Traits, dict[Own, int]]] = {}
        self.rule_lists: dict[SetKey, RuleList] = {}

    def run(self) -> Compiled:
        """The whole of it, in the order of the module's picture."""
        sides = list(self._sides())
        classes = self._classify()
        prefixes = self._prefixes(classes.at)
        addresses = self._addresses(sides, classes.at)
        check_tables(
            addresses=len(addresses),
            prefixes=len(prefixes),
            classes=len(self.memory.classes.used) + 1,
            sets=len(self.memory.sets.used),
            policies=self.in_use,
        )
        sets, cells = self._tables(classes)
        splits = self._splits()
        return Compiled(
            addresses=addresses,
            prefixes=prefixes,
            sets=sets,
            splits=splits,
            rules=self.names.infos,
            owners={number: title for (title, _), number in self.memory.owners.used.items()},
            host_policies=self.host_policies,
            size=Size(
                addresses=len(addresses),
                prefixes=len(prefixes),
                classes=len(self.memory.classes.used) + 1,
                sets=len(sets) + len(splits),
                intervals=sum(len(table.starts) for table in sets.values()),
                cells=cells,
                rules=len(self.names.infos),
            ),
            memory=self.memory,
        )

    # --- who is selected by what: sets ---

    def _sides(self) -> Iterator[_Side]:
        selected_in = self.selection.per_endpoint(Direction.INGRESS)
        selected_out = self.selection.per_endpoint(Direction.EGRESS)
        ports_at = self._ports_at()
        titles: dict[str, int] = {}
        taken: dict[str, str] = {}
        for index, endpoint in enumerate(self.snapshot.endpoints):
            if not is_workload(endpoint) or not endpoint.addresses:
                continue
            title = endpoint.title
            nth = titles[title] = titles.get(title, -1) + 1
            owner = self.memory.owners.of((title, nth))
            for address in endpoint.addresses:
                if address in taken:
                    raise InvalidInput(
                        f"endpoint {title}: addresses",
                        address,
                        f"{taken[address]} has it too; remove one of them",
                    )
                taken[address] = title
                place = self.places.of(address)
                ports = ports_at.get(address, ())
                yield _Side(
                    place,
                    owner,
                    self._set(selected_in[index], Direction.INGRESS, place, ports),
                    self._set(selected_out[index], Direction.EGRESS, place, ports),
                )

    def _ports_at(self) -> dict[str, tuple[NamedPort, ...]]:
        found: dict[str, tuple[NamedPort, ...]] = {}
        for endpoint in self.snapshot.endpoints:
            if endpoint.named_ports and not endpoint.host_network and endpoint.kind is not EndpointKind.NODE:
                for address in endpoint.addresses:
                    found[address] = (*found.get(address, ()), *endpoint.named_ports)
        return found

    def _set(self, selected: Selected, direction: Direction, place: int, ports: tuple[NamedPort, ...]) -> int:
        if not selected:
            return 0
        asked = self._sets.get(id(selected))
        if asked is None:
            each = (self.traits[id(policy), direction] for _, policies in selected for policy in policies)
            asked = self._sets[id(selected)] = (Traits.of_all(each), {})
        own = own_of(asked[0], self.places, place, ports)
        known = asked[1].get(own)
        if known is not None:
            return known
        key: SetKey = tuple(
            (
                self.names.of_default(tier, direction, policies),
                tier.default is Action.DENY,
                tuple(self._list(policy, direction, place, ports) for policy in policies),
            )
            for tier, policies in selected
        )
        number = asked[1][own] = self.memory.sets.of(self._by_source(key))
        return number

    def _by_source(self, key: SetKey) -> SetKey | SplitKey:
        """The set of a key; where its rules ask for source ports, one for each stretch of these."""
        if self._sourced.isdisjoint(number for _, _, numbers in key for number in numbers):
            if key not in self.rule_lists:
                self.rule_lists[key] = self._rule_list(key)
            return key
        rules = [rule for _, _, numbers in key for number in numbers for rule in self.lists[number]]
        need = len(sources.cuts(rules))
        if need > MAX_INTERVALS:
            raise too_many_sources(need, rules, self.names.infos)
        starts, covers = sources.stretches(rules)
        split = SplitKey(starts, tuple(self._at(key, cover) for cover in covers))
        for each in split.sets:
            self._by_source(each)
            self.memory.sets.of(each)
        return split

    def _at(self, key: SetKey, cover: sources.Cover) -> SetKey:
        """The set of a key on a stretch of source ports."""
        return tuple(
            (
                default,
                deny,
                tuple(self._numbered(sources.at(self.lists[number], cover)) for number in numbers),
            )
            for default, deny, numbers in key
        )

    def _numbered(self, rules: tuple[Resolved, ...]) -> int:
        number = self.memory.lists.of(rules)
        self.lists[number] = rules
        if sources.asks(rules):
            self._sourced.add(number)
        return number

    def _list(self, policy: Policy, direction: Direction, place: int, ports: tuple[NamedPort, ...]) -> int:
        traits = self.traits[id(policy), direction]
        asker = (id(policy), direction, own_of(traits, self.places, place, ports))
        known = self._resolved.get(asker)
        if known is not None:
            return known
        found = self.memory.resolutions_before.get(asker)
        if found is None:
            found = self.resolver.resolve(policy, direction, traits, asker[2])
        else:
            # An earlier snapshot's is this one's too: its numbers are kept.
            for index in found.indexes:
                self.names.again(policy, direction, index)
            for term in found.terms:
                self.memory.terms.of(term)
        if found.lasting:
            self.memory.resolutions[asker] = found
        known = self._resolved[asker] = self._numbered(found.rules)
        return known

    def _rule_list(self, key: SetKey) -> RuleList:
        before = self.built_before.get(key)
        if before is not None:
            return before.rules
        try:
            return RuleList(
                [
                    TierRules(default, deny, tuple(rule for number in numbers for rule in self.lists[number]))
                    for default, deny, numbers in key
                ]
            )
        except TooManyIntervals as error:
            raise too_many_intervals(error.need, error.rules, self.names.infos) from None

    # --- the other side: classes ---

    def _classify(self) -> Classes:
        asked = {term for rule_list in self.rule_lists.values() for term in rule_list.terms}
        true_of: list[list[int]] = [[] for _ in range(self.places.count)]
        for term, number in self.memory.terms.used.items():
            if number in asked:
                for first, end in self._extent(term):
                    for place in range(first, end):
                        true_of[place].append(number)
        at: list[int] = []
        every, new = [0], list[int]()
        of_term: dict[int, list[int]] = {}
        new_of_term: dict[int, list[int]] = {}
        numbers = self.memory.classes
        for terms in true_of:
            key = tuple(sorted(terms))
            known = key in numbers.used
            class_id = numbers.of(key) if key else 0
            at.append(class_id)
            if key and not known:
                every.append(class_id)
                for number in key:
                    of_term.setdefault(number, []).append(class_id)
                if numbers.is_new(key):
                    new.append(class_id)
                    for number in key:
                        new_of_term.setdefault(number, []).append(class_id)
        return Classes(at, every, new, of_term, new_of_term)

    def _extent(self, term: Term) -> Ranges:
        peer, port = term
        if port is None:
            return self.places.extent(peer) if peer is not None else ((0, self.places.count),)
        named = self.places.port_extent(port)
        return named if peer is None else intersect(self.places.extent(peer), named)

    def _prefixes(self, at: list[int]) -> dict[str, int]:
        """Classes by net, without nets whose class is that of the next larger one (of none: 0)."""
        out: dict[str, int] = {}
        around: list[tuple[int, int]] = []  # (one past the last place inside, class) of the nets around
        for place, class_id in enumerate(at):
            if self.places.is_address(place):
                continue
            while around and around[-1][0] <= place:
                around.pop()
            name = self.places.names[place]
            # The data path has both families in one trie, IPv4 under ::ffff:0:0/96. Its root is always there:
            # else what is said of ::/0 would be said of IPv4 too.
            if class_id != (around[-1][1] if around else 0) or name == ROOTS[4]:
                out[name] = class_id
            around.append((self.places.end(place), class_id))
        return out

    def _addresses(self, sides: list[_Side], at: list[int]) -> dict[str, AddressEntry]:
        local = {
            address
            for endpoint in self.snapshot.endpoints
            if endpoint.kind is EndpointKind.NODE and endpoint.local_node and not endpoint.host_network
            for address in endpoint.addresses
        }
        side_of = {side.place: side for side in sides}
        out: dict[str, AddressEntry] = {}
        for place, class_id in enumerate(at):
            if self.places.is_address(place):
                name = self.places.names[place]
                side = side_of.get(place)
                out[name] = (
                    AddressEntry(class_id, local_node=name in local)
                    if side is None
                    else AddressEntry(class_id, side.set_in, side.set_out, side.owner, name in local)
                )
        return out

    # --- sets x classes: cells ---

    def _tables(self, classes: Classes) -> tuple[dict[int, SetTable], int]:
        """The sets by number, and how many cells they have."""
        out: dict[int, SetTable] = {}
        gone = self.classes_before - set(classes.every)
        total = 0
        for key, number in self.memory.sets.used.items():
            if isinstance(key, SplitKey):
                continue
            before = self.built_before.get(key)
            built = fresh(self.rule_lists[key], classes) if before is None else carried(before, classes, gone)
            self.memory.built[key] = built
            out[number] = built.table
            total += built.cells
            if total > _COUNTED:
                break
        if total > MAX_CELLS:
            raise too_many_cells(out.values(), self.names.infos, total, MAX_CELLS)
        return out, total

    def _splits(self) -> dict[int, SplitTable]:
        numbers = self.memory.sets
        return {
            number: SplitTable(starts=key.starts, sets=tuple(map(numbers.of, key.sets)))
            for key, number in numbers.used.items()
            if isinstance(key, SplitKey)
        }
