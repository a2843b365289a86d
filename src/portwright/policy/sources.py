"""Rules that ask for the sender's port: one rule list for each stretch of source ports that they cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from portwright.policy.ranges import EMPTY, Ranges, contains, subtract, union
from portwright.policy.resolve import ANYBODY, Resolved

#: The rules of one stretch: of those that ask for source ports, the ranges that are true there.
Cover = frozenset[Ranges]


class Stretches(NamedTuple):
    """Stretch ``i`` begins at ``starts[i]``, ascending from 0; equal covers are alike."""

    starts: tuple[int, ...]
    covers: tuple[Cover, ...]


def asks(rules: Iterable[Resolved]) -> bool:
    """Whether one of them asks for source ports."""
    return any(rule.sourced or rule.sourced_exceptions for rule in rules)


def cuts(rules: Iterable[Resolved]) -> list[int]:
    """Where their stretches of source ports begin."""
    return sorted({0, *(number for ranges in _ranges(rules) for pair in ranges for number in pair)})


def stretches(rules: Sequence[Resolved]) -> Stretches:
    """All of the stretches that rules cut, neighbours of one cover together."""
    ranges = _ranges(rules)
    starts: list[int] = []
    covers: list[Cover] = []
    for start in cuts(rules):
        cover = frozenset(each for each in ranges if contains(each, start))
        if not covers or covers[-1] != cover:
            starts.append(start)
            covers.append(cover)
    return Stretches(tuple(starts), tuple(covers))


def at(rules: Iterable[Resolved], cover: Cover) -> tuple[Resolved, ...]:
    """The rules as they are on a stretch, without those that match nothing there."""
    found = (_at(rule, cover) for rule in rules)
    return tuple(rule for rule in found if rule.alternatives)


def _at(rule: Resolved, cover: Cover) -> Resolved:
    alternatives = _together(rule.alternatives, rule.sourced, cover)
    exceptions = _together(rule.exceptions, rule.sourced_exceptions, cover)
    never = exceptions.pop(ANYBODY, EMPTY)
    left = ((term, subtract(services, never)) for term, services in alternatives.items())
    return Resolved(
        rule.rule,
        rule.action,
        tuple((term, services) for term, services in left if services),
        tuple(exceptions.items()),
    )


def _ranges(rules: Iterable[Resolved]) -> set[Ranges]:
    return {sources for rule in rules for _, _, sources in (*rule.sourced, *rule.sourced_exceptions)}


def _together(
    always: tuple[tuple[int, Ranges], ...], there: tuple[tuple[int, Ranges, Ranges], ...], cover: Cover
) -> dict[int, Ranges]:
    found = dict(always)
    for term, services, sources in there:
        if sources in cover:
            found[term] = union((*found.get(term, ()), *services))
    return found
