"""One policy set: an effective rule list becomes intervals of services, default verdicts and cells.

Services that the same rules cover behave alike whoever the peer is: they are one *port class*, so intervals
depend on the rules alone. A class of peers to which none but the rules for anybody apply has the *base*
verdicts. Default per port class is what most classes get, so that only the others need cells.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from portwright.policy.classes import indexes_of
from portwright.policy.ranges import Ranges
from portwright.policy.resolve import ANYBODY, Resolved
from portwright.policy.rules import Action
from portwright.policy.services import ALL_SERVICES, SERVICES_END
from portwright.policy.tables import ALL_PASSED, MAX_INTERVALS, Column, Verdict

_TERMINAL = {Action.ALLOW, Action.DENY, Action.PASS}
#: (place in the list, port classes, whether an exception)
_Hit: TypeAlias = tuple[int, int, bool]
#: The number of the group that it came out of, and what it has beside the hits of that one.
_Group: TypeAlias = tuple[int, tuple[_Hit, ...]]


class TierRules(NamedTuple):
    """A tier that selects the endpoint: its default's number, whether it denies, and the rules in order."""

    rule: int
    deny: bool
    rules: tuple[Resolved, ...]


class _Step(NamedTuple):
    """A rule with port classes (as bits) for services."""

    rule: int
    action: Action
    anybody: int
    terms: tuple[tuple[int, int], ...]
    exceptions: tuple[tuple[int, int], ...]


class TooManyIntervals(Exception):
    """A set needs ``need`` intervals because of ``rules``; the compiler names the policy (PolicyTooLarge)."""

    def __init__(self, need: int, rules: list[Resolved]) -> None:
        super().__init__(need)
        self.need = need
        self.rules = rules


class RuleList:
    """An effective rule list; ``starts`` and ``port_classes`` are SetTable's.

    Raises TooManyIntervals where the rules cut the services finer than the data path searches.
    """

    def __init__(self, tiers: Sequence[TierRules]) -> None:
        reduced = _without_dead(tiers)
        self._ends: list[tuple[int, int, bool]] = []  # per tier: one past its last step, default, deny
        asked = dict.fromkeys(
            covered
            for tier in reduced
            for rule in tier.rules
            for _, covered in (*rule.alternatives, *rule.exceptions)
        )
        cut = _partition(tuple(asked))
        if cut is None:
            raise TooManyIntervals(len(_cuts(asked)), [rule for tier in reduced for rule in tier.rules])
        self.starts, self.port_classes, masks = cut
        services = dict(zip(asked, masks, strict=True))
        self.count = max(self.port_classes) + 1
        self._all = (1 << self.count) - 1
        self._steps: list[_Step] = []
        for tier in reduced:
            self._add(tier, services)
            self._ends.append((len(self._steps), tier.rule, tier.deny))
        self._anybody = [place for place, step in enumerate(self._steps) if step.anybody]
        self._verdicts: dict[tuple[bool, int, bool], Verdict] = {}
        hits: dict[int, list[_Hit]] = {}
        for place, step in enumerate(self._steps):
            for term, mask in step.terms:
                hits.setdefault(term, []).append((place, mask, False))
            for term, mask in step.exceptions:
                hits.setdefault(term, []).append((place, mask, True))
        #: The numbers of the terms that are asked for.
        self.terms = hits.keys()
        self._asking: dict[tuple[_Hit, ...], list[int]] = {}
        for term, found in hits.items():
            self._asking.setdefault(tuple(found), []).append(term)
        #: The port classes, as bits, whose verdict may be another than anybody's.
        self._touched = 0
        for asked_for in self._asking:
            for _, mask, _ in asked_for:
                self._touched |= mask
        self.base = self._decided([Verdict(True, ALL_PASSED)] * self.count, self._all, {}, {})

    def _add(self, tier: TierRules, services: dict[Ranges, int]) -> None:
        done = 0  # port classes that an earlier rule of the tier decides for everybody
        for rule in tier.rules:
            anybody = 0
            terms: list[tuple[int, int]] = []
            for term, covered in rule.alternatives:
                mask = services[covered] & ~done
                if term == ANYBODY:
                    anybody = mask
                elif mask:
                    terms.append((term, mask))
            exceptions = tuple((term, services[covered]) for term, covered in rule.exceptions)
            if anybody or terms:
                self._steps.append(_Step(rule.rule, rule.action, anybody, tuple(terms), exceptions))
                if rule.action in _TERMINAL and not exceptions:
                    done |= anybody

    def _groups(self, classes_of: dict[int, list[int]]) -> tuple[dict[int, int], list[_Group]]:
        """The group of each class that a term is true of, given each term's classes; and the groups.

        All of a group have the same hits: the group's own, those of the group that it came out of, and so on
        to the first, which has none.
        """
        of_class: dict[int, int] = {}
        groups: list[_Group] = [(0, ())]
        for hits, terms in self._asking.items():
            came: dict[int, int] = {}
            first = len(groups)
            for term in terms:
                for class_id in classes_of.get(term, ()):
                    before = of_class.get(class_id, 0)
                    if before >= first:
                        continue  # another of these terms is true of it too
                    after = came.get(before)
                    if after is None:
                        after = came[before] = len(groups)
                        groups.append((before, hits))
                    of_class[class_id] = after
        return of_class, groups

    def decide(self, hits: Iterable[_Hit]) -> tuple[Verdict, ...]:
        """The verdict of each port class for a peer that these hits are all of."""
        extra: dict[int, int] = {}
        minus: dict[int, int] = {}
        touched = 0
        for place, mask, exception in hits:
            side = minus if exception else extra
            side[place] = side.get(place, 0) | mask
            touched |= mask
        return self._decided(list(self.base), touched, extra, minus)

    def _decided(
        self, out: list[Verdict], open_: int, extra: dict[int, int], minus: dict[int, int]
    ) -> tuple[Verdict, ...]:
        """``out`` with the verdicts of port classes ``open_``; by step, which more and fewer it is of."""
        places = sorted({*self._anybody, *extra}) if extra else self._anybody
        logged, at = 0, 0
        for end, default, deny in self._ends:
            alive, passed = open_, 0
            while at < len(places) and (place := places[at]) < end:
                rule, action, anybody, _, _ = self._steps[place]
                at += 1
                hit = alive & (anybody | extra.get(place, 0)) & ~minus.get(place, 0)
                if not hit:
                    continue
                if action is Action.LOG:
                    logged |= hit
                    continue
                alive &= ~hit
                if action is Action.PASS:
                    passed |= hit
                else:
                    self._put(out, hit, action is Action.ALLOW, rule, logged)
            if deny:
                if alive:
                    self._put(out, alive, False, default, logged)
            else:
                passed |= alive
            open_ = passed
            if not open_:
                break
        if open_:
            self._put(out, open_, True, ALL_PASSED, logged)
        return tuple(out)

    def _put(self, out: list[Verdict], mask: int, allow: bool, rule: int, logged: int) -> None:
        if mask & logged:
            self._fill(out, mask & logged, (allow, rule, True))
            mask &= ~logged
        if mask:
            self._fill(out, mask, (allow, rule, False))

    def _fill(self, out: list[Verdict], mask: int, key: tuple[bool, int, bool]) -> None:
        verdict = self._verdicts.get(key)
        if verdict is None:  # else it is the same object: equal ones are told by that
            verdict = self._verdicts[key] = Verdict(*key)
        while mask:
            low = mask & -mask
            out[low.bit_length() - 1] = verdict
            mask ^= low

    def columns(
        self, classes_of: dict[int, list[int]], classes: Sequence[int], defaults: tuple[Verdict, ...] | None
    ) -> tuple[tuple[Verdict, ...], dict[int, Column], int]:
        """The default verdicts, the cells of ``classes``, which those of each term are among, and how many.

        ``defaults``: those to keep, which this rule list gave; None chooses them.
        """
        of_class, groups = self._groups(classes_of)
        members_of: dict[int, list[int]] = {}
        for class_id, group in of_class.items():
            known = members_of.get(group)
            if known is None:
                members_of[group] = [class_id]
            else:
                known.append(class_id)
        decided = [(self.decide(_hits(groups, group)), members) for group, members in members_of.items()]
        if defaults is None:
            defaults = self._defaults(decided, len(classes) - len(of_class))
        if defaults != self.base:
            decided.append((self.base, [class_id for class_id in classes if class_id not in of_class]))
        out: dict[int, Column] = {}
        cells = 0
        for verdicts, members in decided:
            column = tuple(
                (port_class, verdict)
                for port_class, verdict in enumerate(verdicts)
                if verdict is not defaults[port_class]
            )
            if column:
                out.update(dict.fromkeys(members, column))
                cells += len(members) * len(column)
        return defaults, out, cells

    def _defaults(
        self, decided: list[tuple[tuple[Verdict, ...], list[int]]], others: int
    ) -> tuple[Verdict, ...]:
        if others >= sum(len(members) for _, members in decided):
            return self.base
        out = list(self.base)
        for port_class in indexes_of(self._touched):
            base = out[port_class]
            votes = {base: others}
            for verdicts, members in decided:
                verdict = verdicts[port_class]
                votes[verdict] = votes.get(verdict, 0) + len(members)
            best = max(votes.values())
            if votes[base] != best:
                out[port_class] = next(v for v, n in votes.items() if n == best)
        return tuple(out)


def _hits(groups: list[_Group], group: int) -> Iterator[_Hit]:
    while group:
        group, hits = groups[group]
        yield from hits


def _without_dead(tiers: Sequence[TierRules]) -> list[TierRules]:
    """The same decisions, without what stands after a rule that decides everything."""
    out: list[TierRules] = []
    for tier in tiers:
        kept: list[Resolved] = []
        last: Action | None = None
        for rule in tier.rules:
            kept.append(rule)
            everything = (ANYBODY, ALL_SERVICES) in rule.alternatives and not rule.exceptions
            if everything and rule.action in _TERMINAL:
                last = rule.action
                break
        out.append(TierRules(tier.rule, tier.deny, tuple(kept)))
        ends = tier.deny or last in {Action.ALLOW, Action.DENY}
        if ends and all(r.action is not Action.PASS for r in kept):
            break
    return out


def _cuts(services: Iterable[Ranges]) -> list[int]:
    """Where an interval starts."""
    ends = {number for covered in services for pair in covered for number in pair}
    return sorted({0, *ends} - {SERVICES_END})


@lru_cache(1024)
def _partition(
    services: tuple[Ranges, ...],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Starts and port classes of the intervals, and each's port classes as bits; None for too many intervals.

    Remembered, as rule lists of many endpoints are for the same services, whoever their peers are.
    """
    cuts = _cuts(services)
    if len(cuts) > MAX_INTERVALS:
        return None
    covers: list[list[int]] = [[] for _ in cuts]
    for index, covered in enumerate(services):
        for first, end in covered:
            for at in range(bisect_left(cuts, first), bisect_left(cuts, end)):
                covers[at].append(index)
    numbers: dict[tuple[int, ...], int] = {}
    port_classes = tuple(numbers.setdefault(tuple(cover), len(numbers)) for cover in covers)
    masks = [0] * len(services)
    for cover, number in numbers.items():
        for index in cover:
            masks[index] |= 1 << number
    return tuple(cuts), port_classes, tuple(masks)
