"""Refusing what does not fit, before anything is written, with the name of the policy that adds most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from portwright.policy.ranges import Ranges
from portwright.policy.resolve import Resolved
from portwright.policy.rules import Direction, Policy
from portwright.policy.selection import peers_of
from portwright.policy.tables import (
    MAX_ADDRESSES,
    MAX_CLASSES,
    MAX_INTERVALS,
    MAX_PREFIXES,
    MAX_SETS,
    Column,
    PolicyTooLarge,
    RuleInfo,
    SetTable,
)


def owner_of(info: RuleInfo) -> str:
    """``NetworkPolicy default/web``, or the name of what is no policy's."""
    if info.implicit:
        return info.title
    return f"{info.kind} {info.namespace}/{info.policy}" if info.namespace else f"{info.kind} {info.policy}"


def too_many_cells(
    sets: Iterable[SetTable], rules: Mapping[int, RuleInfo], need: int, limit: int
) -> PolicyTooLarge:
    """``need`` may be less than the whole: counting ends well above the limit."""
    of_rule: Counter[int] = Counter()
    classes: dict[int, set[int]] = {}
    services: dict[int, int] = {}
    in_sets: Counter[int] = Counter()
    for table in sets:
        users: dict[int, list[int]] = {}
        columns: dict[int, Column] = {}
        for class_id, column in table.columns.items():
            columns[id(column)] = column
            users.setdefault(id(column), []).append(class_id)
        seen: set[int] = set()
        for key, members in users.items():
            for rule, wide in Counter(verdict.rule for _, verdict in columns[key]).items():
                of_rule[rule] += wide * len(members)
                classes.setdefault(rule, set()).update(members)
                services[rule] = max(services.get(rule, 0), wide)
                seen.add(rule)
        in_sets.update(seen)
    of_policy: Counter[str] = Counter()
    for rule, added in of_rule.items():
        of_policy[owner_of(rules[rule])] += added
    policy, added = of_policy.most_common(1)[0]
    rule = max((r for r in of_rule if owner_of(rules[r]) == policy), key=lambda r: of_rule[r])
    return PolicyTooLarge(
        "cells",
        need,
        limit,
        policy,
        f"adds {added:,}, most of them by {rules[rule].title}: its peers make {len(classes[rule]):,} classes "
        f"x {services[rule]} classes of ports x {in_sets[rule]} sets; use fewer ports or wider selectors",
    )


def too_many_intervals(
    need: int, listed: Iterable[Resolved], rules: Mapping[int, RuleInfo]
) -> PolicyTooLarge:
    """For one endpoint's rules that cut the services too finely."""
    cut = ((r, covered) for r in listed for _, covered in (*r.alternatives, *r.exceptions))
    return _too_finely("intervals of ports for one endpoint", need, cut, rules, "use ranges (endPort)")


def too_many_sources(need: int, listed: Iterable[Resolved], rules: Mapping[int, RuleInfo]) -> PolicyTooLarge:
    """For one endpoint's rules that cut the source ports too finely."""
    cut = ((r, sources) for r in listed for _, _, sources in (*r.sourced, *r.sourced_exceptions))
    return _too_finely("intervals of source ports for one endpoint", need, cut, rules, "use ranges")


def _too_finely(
    what: str,
    need: int,
    cut: Iterable[tuple[Resolved, Ranges]],
    rules: Mapping[int, RuleInfo],
    way_out: str,
) -> PolicyTooLarge:
    cuts: dict[str, set[int]] = {}
    for rule, ranges in cut:
        found = cuts.setdefault(owner_of(rules[rule.rule]), set())
        found.update(number for pair in ranges for number in pair)
    policy = max(cuts, key=lambda name: len(cuts[name]))
    why = f"adds {len(cuts[policy]):,}: each port or range that stands alone adds two; {way_out}"
    return PolicyTooLarge(what, need, MAX_INTERVALS, policy, why)


def check_tables(
    *, addresses: int, prefixes: int, classes: int, sets: int, policies: Iterable[tuple[Policy, Direction]]
) -> None:
    """Raises PolicyTooLarge for the first of these that is above its limit."""
    needs = (
        ("addresses", addresses, MAX_ADDRESSES),
        ("prefixes", prefixes, MAX_PREFIXES),
        ("peer classes", classes, MAX_CLASSES),
        ("sets", sets, MAX_SETS),
    )
    for what, need, limit in needs:
        if need <= limit:
            continue
        peers: dict[str, set[object]] = {}
        for policy, direction in policies:
            asked = peers.setdefault(f"{policy.kind} {policy.title}", set())
            for peer in peers_of(policy, direction):
                asked.update(peer.nets or (), peer.not_nets, peer.domains or ())
                asked.update(
                    expr for expr in (peer.selector, peer.not_selector, peer.nodes) if expr is not None
                )
        name = max(peers, key=lambda n: len(peers[n]), default="no policy")
        count = len(peers.get(name, ()))
        why = f"asks for {count:,} different nets, names and selectors; use larger nets, or fewer endpoints"
        raise PolicyTooLarge(what, need, limit, name, why)
