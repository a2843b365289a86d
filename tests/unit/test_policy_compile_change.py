"""From one generation of the tables to the next: same decisions, stable numbers, small and orderly steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portwright.policy import compile as compiler
from portwright.policy.compile import compile_policies, recompile
from portwright.policy.difference import Difference, diff
from portwright.policy.labels import Has, In
from portwright.policy.rules import (
    Action,
    Endpoint,
    Peer,
    Policy,
    PolicySet,
    PortRange,
    Rule,
    Snapshot,
    Traffic,
)
from portwright.policy.services import EPHEMERAL
from portwright.policy.tables import (
    AddressEntry,
    Column,
    Compiled,
    PolicyTooLarge,
    SetTable,
    SplitTable,
    Tables,
    Verdict,
)
from tests.fix_worlds import V4, V6, flows, labels, policy_sets, relabelled, snapshots

FLOWS = flows(EPHEMERAL, 80)
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def told(compiled: Compiled, start: int = 0) -> list[tuple[object, ...]]:
    """The decisions of a part of all flows, with rules by name instead of by number."""
    tables = Tables(compiled)
    out: list[tuple[object, ...]] = []
    for flow in FLOWS[start::5]:
        answer = tables.lookup(flow)
        sides = [
            s and (s.allow, s.log, compiled.rules[s.rule].title) for s in (answer.egress, answer.ingress)
        ]
        out.append((answer.allowed, *sides))
    return out


@QUICK
@given(
    policies=st.lists(policy_sets(), min_size=2, max_size=3),
    worlds=st.lists(snapshots(), min_size=2, max_size=3),
    start=st.integers(0, 4),
)
def test_recompile_decides_as_compile(policies: list[PolicySet], worlds: list[Snapshot], start: int) -> None:
    """After any changes of policies and world, recompiled tables decide as those compiled afresh."""
    previous = compile_policies(policies[0], worlds[0])
    for now, world in itertools.product(policies, worlds):
        previous = recompile(previous, now, world)

        assert told(previous, start) == told(compile_policies(now, world), start)


@QUICK
@given(old=policy_sets(), new=policy_sets(), world=snapshots(), later=snapshots())
def test_numbers_keep_their_meaning(old: PolicySet, new: PolicySet, world: Snapshot, later: Snapshot) -> None:
    """A set's, rule's or cell's number that is in two generations means the same in both."""
    before = compile_policies(old, world)
    after = recompile(before, new, later)

    cells = dict(before.cells())
    assert [key for key, verdict in after.cells() if cells.get(key, verdict) != verdict] == []
    for number in before.sets.keys() & after.sets.keys():
        one, other = before.sets[number], after.sets[number]
        assert (one.starts, one.port_classes, one.defaults) == (
            other.starts,
            other.port_classes,
            other.defaults,
        )
    for number in before.splits.keys() & (after.sets | after.splits).keys():
        assert before.splits[number] == after.splits.get(number)
    for number in before.rules.keys() & after.rules.keys():
        assert before.rules[number].title == after.rules[number].title


class Maps:
    """The tables as the kernel holds them: changed entry by entry."""

    def __init__(self, compiled: Compiled) -> None:
        self.addresses = dict(compiled.addresses)
        self.prefixes = dict(compiled.prefixes)
        self.sets: dict[int, SetTable | SplitTable] = {**compiled.sets, **compiled.splits}
        self.cells = dict(compiled.cells())

    def steps(self, change: Difference) -> Iterator[None]:
        """Carries out a difference; yields after each entry."""
        puts: tuple[tuple[dict[Any, Any], dict[Any, Any]], ...] = (
            (self.sets, change.put_sets),
            (self.cells, change.put_cells),
            (self.prefixes, change.put_prefixes),
            (self.addresses, change.put_addresses),
        )
        deletes: tuple[tuple[dict[Any, Any], Iterable[Any]], ...] = (
            (self.addresses, change.delete_addresses),
            (self.prefixes, change.delete_prefixes),
            (self.cells, change.delete_cells),
            (self.sets, change.delete_sets),
        )
        for table, entries in puts:
            for key, value in entries.items():
                table[key] = value
                yield
        for table, keys in deletes:
            for key in keys:
                del table[key]
                yield

    def read(self, like: Compiled) -> Compiled:
        """What they hold now, as a generation that can be asked."""
        columns: dict[int, dict[int, Column]] = {}
        for (set_id, class_id, port_class), verdict in sorted(self.cells.items()):
            column = columns.setdefault(set_id, {}).get(class_id, ())
            columns[set_id][class_id] = (*column, (port_class, verdict))
        sets = {
            number: SetTable(
                starts=table.starts,
                port_classes=table.port_classes,
                defaults=table.defaults,
                columns=columns.get(number, {}),
            )
            for number, table in self.sets.items()
            if isinstance(table, SetTable)
        }
        splits = {number: table for number, table in self.sets.items() if isinstance(table, SplitTable)}
        return msgspec.structs.replace(
            like, addresses=self.addresses, prefixes=self.prefixes, sets=sets, splits=splits
        )


@QUICK
@given(old=policy_sets(), new=policy_sets(), world=snapshots(), later=snapshots())
def test_difference_leads_to_the_new(
    old: PolicySet, new: PolicySet, world: Snapshot, later: Snapshot
) -> None:
    """Carried out on the old tables, a difference makes exactly the new ones."""
    before = compile_policies(old, world)
    after = recompile(before, new, later)
    maps = Maps(before)
    done = sum(1 for _ in maps.steps(diff(before, after)))

    assert done == diff(before, after).entries
    assert (maps.addresses, maps.prefixes) == (after.addresses, after.prefixes)
    assert (maps.sets.keys(), maps.cells) == ((after.sets | after.splits).keys(), dict(after.cells()))


@QUICK
@given(policies=policy_sets(), world=snapshots(), who=st.integers(0, 9), new=labels, start=st.integers(0, 4))
def test_relabelling_never_mixes(
    policies: PolicySet, world: Snapshot, who: int, new: dict[str, str], start: int
) -> None:
    """While one workload's labels change entry by entry, each flow's verdict is the old or the new one."""
    before = compile_policies(policies, world)
    after = recompile(before, policies, relabelled(world, who, new))
    change = diff(before, after)
    if not change.atomic:
        return
    maps = Maps(before)
    every = msgspec.structs.replace(after, rules={**before.rules, **after.rules})
    old_told, new_told = told(before, start), told(after, start)
    for _ in maps.steps(change):
        for now, was, will in zip(told(maps.read(every), start), old_told, new_told, strict=True):
            assert now in (was, will)


@QUICK
@given(old=policy_sets(), new=policy_sets(), world=snapshots())
def test_nets_are_found_as_old_or_new(old: PolicySet, new: PolicySet, world: Snapshot) -> None:
    """While nets change one by one, every address has its old or its new class, never one between."""
    before = compile_policies(old, world)
    after = recompile(before, new, world)
    maps = Maps(before)

    def found(compiled: Compiled) -> list[int]:
        tables = Tables(compiled)
        return [tables.entry(address).class_id for address in (*V4, *V6)]

    was, will = found(before), found(after)
    for _ in maps.steps(diff(before, after)):
        for now, one, other in zip(found(maps.read(after)), was, will, strict=True):
            assert now in (one, other)


def pods(count: int) -> tuple[Endpoint, ...]:
    """Workloads with a label of their own and one that ten share."""
    return tuple(
        Endpoint(
            name=f"w{index}",
            labels={"name": f"w{index}", "app": f"a{index // 10}"},
            addresses=(f"10.0.{index >> 8}.{index & 255}",),
        )
        for index in range(count)
    )


def app_policies(count: int) -> PolicySet:
    """Each app lets the next one in, on one port."""
    return PolicySet(
        policies=tuple(
            Policy(
                kind="NetworkPolicy",
                name=f"p{index}",
                tier="default",
                order=1.0,
                subject=In("app", frozenset({f"a{index}"})),
                ingress=(
                    Rule(
                        action=Action.ALLOW,
                        peers=(Peer(selector=In("app", frozenset({f"a{(index + 1) % count}"}))),),
                        traffic=(Traffic(protocol=6, ports=(PortRange(80, 80),)),),
                    ),
                ),
            )
            for index in range(count)
        )
    )


def test_label_change_is_as_small_as_itself() -> None:
    """One of 100 workloads moves to another app: its own entry is all that is written."""
    world, policies = Snapshot(endpoints=pods(100)), app_policies(10)
    before = compile_policies(policies, world)
    after = recompile(before, policies, relabelled(world, 5, {"name": "w5", "app": "a7"}))
    change = diff(before, after)

    assert (change.entries, change.atomic) == (1, True)
    assert change.put_addresses.keys() == {"10.0.0.5"}


def test_new_policy_leaves_the_others() -> None:
    """One more policy for ten of 100 workloads writes its set, cells and these ten, and nothing else."""
    world = Snapshot(endpoints=pods(100))
    before = compile_policies(app_policies(10), world)
    more = msgspec.structs.replace(app_policies(10).policies[3], name="more", egress=())
    after = recompile(before, PolicySet(policies=(*app_policies(10).policies, more)), world)
    change = diff(before, after)

    assert len(change.put_addresses) == 10
    assert (len(change.put_sets), len(change.delete_sets), change.put_prefixes) == (2, 1, {})
    assert not change.atomic


@pytest.mark.parametrize("reverse", [False, True])
def test_unchanged_is_nothing_to_do(reverse: bool) -> None:
    """Policies that come again, in whatever order, are no entry to write."""
    world = Snapshot(endpoints=pods(50))
    before = compile_policies(app_policies(5), world)
    again = app_policies(5).policies[:: -1 if reverse else 1]

    assert diff(before, recompile(before, PolicySet(policies=again), world)).entries == 0


def test_the_same_world_is_not_found_anew() -> None:
    """Who is meant by what is kept while nobody, no net and no name's address is another; else it is not."""
    names = Rule(action=Action.ALLOW, peers=(Peer(domains=("example.com",)), Peer(nets=("192.0.2.0/24",))))
    told = msgspec.structs.replace(app_policies(2).policies[0], name="names", egress=(names,))
    policies = PolicySet(policies=(*app_policies(2).policies, told))
    world = Snapshot(endpoints=pods(20), domains={"example.com": ("198.51.100.1",)})
    first = compile_policies(policies, world)
    same = recompile(first, policies, Snapshot(endpoints=pods(20), domains=world.domains))
    assert same.memory.places is first.memory.places  # type: ignore[attr-defined]

    moved = msgspec.structs.replace(world, domains={"example.com": ("198.51.100.2",)})
    narrowed = msgspec.structs.replace(names, peers=(*(names.peers or ()), Peer(nets=("192.0.2.0/25",))))
    more = msgspec.structs.replace(told, egress=(narrowed,))
    for other in (
        (policies, moved),
        (policies, relabelled(world, 5, {"name": "w5", "app": "a1"})),
        (PolicySet(policies=(*app_policies(2).policies, more)), world),
    ):
        after, anew = recompile(same, *other), compile_policies(*other)
        assert after.memory.places is not first.memory.places  # type: ignore[attr-defined]
        assert after.addresses.keys() == anew.addresses.keys()
        assert after.prefixes.keys() == anew.prefixes.keys()
        assert after.size == anew.size


def test_entry_and_verdict_are_values() -> None:
    """Entries are compared by what they say, so that a difference has none that are equal."""
    assert AddressEntry(1, 2, 3) == AddressEntry(1, 2, 3)
    assert Verdict(True, 16) != Verdict(True, 16, True)


def test_defaults_are_chosen_anew_before_refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults that became a waste are kept while they fit; then they are chosen anew under a new number."""
    some: dict[str, str] = {}
    every = {"half": ""}
    by_name = tuple(
        Rule(
            action=Action.ALLOW,
            peers=(Peer(selector=In("name", frozenset({f"w{index}"}))),),
            traffic=(Traffic(protocol=17, ports=(PortRange(53, 53),)),),
        )
        for index in range(20)
    )
    half = Rule(action=Action.ALLOW, peers=(Peer(selector=Has("half")),))
    policies = PolicySet(
        policies=(
            Policy(kind="NetworkPolicy", name="p", tier="default", order=1.0, ingress=(half,)),
            Policy(kind="NetworkPolicy", name="q", tier="default", order=1.0, egress=by_name),
        )
    )
    few, all_ = (
        Snapshot(
            endpoints=tuple(msgspec.structs.replace(pod, labels={**pod.labels, **extra}) for pod in pods(20))
        )
        for extra in (some, every)
    )
    before = compile_policies(policies, few)
    kept = recompile(before, policies, all_)
    monkeypatch.setattr(compiler, "MAX_CELLS", kept.size.cells - 1)
    anew = recompile(before, policies, all_)

    assert before.sets.keys() == kept.sets.keys()
    assert anew.size.cells < kept.size.cells
    assert not before.sets.keys() & anew.sets.keys()
    assert told(anew) == told(kept)
    monkeypatch.setattr(compiler, "MAX_CELLS", anew.size.cells - 1)
    with pytest.raises(PolicyTooLarge):
        recompile(before, policies, all_)


def test_nets_go_in_longest_first_and_out_shortest_first() -> None:
    """A net that is put around another is put after it, and one around another is deleted before it."""

    def of(*nets: str) -> PolicySet:
        rules = tuple(Rule(action=Action.ALLOW, peers=(Peer(nets=(net,)),)) for net in nets)
        return PolicySet(policies=(Policy(kind="T", name="p", tier="default", order=1.0, ingress=rules),))

    nets, world = ("10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24"), Snapshot(endpoints=pods(1))
    none, some = compile_policies(of(), world), compile_policies(of(*nets), world)

    assert tuple(diff(none, some).put_prefixes) == nets[::-1]
    assert diff(some, none).delete_prefixes == nets
