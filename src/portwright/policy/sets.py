"""One policy set: an effective rule list becomes intervals of services, default verdicts and cells.

Services that the same rules cover behave alike whoever the peer is: they are one *port class*, so intervals
depend on the rules alone. A class of peers to which none but the rules for anybody apply has the *base*
verdicts. Default per port class is what most classes get, so that only the others need cells.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
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
        services: dict[Ranges, int] = {}
        for tier in reduced:
            for rule in tier.rules:
                for _, covered in (*rule.alternatives, *rule.exceptions):
                    services[covered] = 0
        need = len(_cuts(services))
        if need > MAX_INTERVALS:
            raise TooManyIntervals(need, [rule for tier in reduced for rule in tier.rules])
        self.starts, self.port_classes = _partition(services)
        self.count = max(self.port_classes) + 1
        self._all = (1 << self.count) - 1
        self._steps: list[_Step] = []
        for tier in reduced:
            self._add(tier, services)
            self._ends.append((len(self._steps), tier.rule, tier.deny))
        self._anybody = [place for place, step in enumerate(self._steps) if step.anybody]
        self._verdicts: dict[tuple[bool, int, bool], Verdict] = {}
        #: By term's number: the steps that ask for it.
        self.terms: dict[int, list[_Hit]] = {}
        for place, step in enumerate(self._steps):
            for term, mask in step.terms:
                self.terms.setdefault(term, []).append((place, mask, False))
            for term, mask in step.exceptions:
                self.terms.setdefault(term, []).append((place, mask, True))
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

    def hits(self, classes_of: dict[int, list[int]]) -> dict[int, list[_Hit]]:
        """By class: the steps whose terms are true of it, given each term's classes."""
        found: dict[int, list[_Hit]] = {}
        for term, asked in self.terms.items():
            for class_id in classes_of.get(term, ()):
                got = found.get(class_id)
                if got is None:
                    found[class_id] = asked.copy()
                else:
                    got += asked
        return found

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
            while at < len(places) and places[at] < end:
                step = self._steps[places[at]]
                mask = step.anybody | extra.get(places[at], 0)
                hit = alive & mask & ~minus.get(places[at], 0)
                at += 1
                if not hit:
                    continue
                if step.action is Action.LOG:
                    logged |= hit
                    continue
                alive &= ~hit
                if step.action is Action.PASS:
                    passed |= hit
                else:
                    self._put(out, hit, step.action is Action.ALLOW, step.rule, logged)
            if deny:
                self._put(out, alive, False, default, logged)
            else:
                passed |= alive
            open_ = passed
            if not open_:
                break
        self._put(out, open_, True, ALL_PASSED, logged)
        return tuple(out)

    def _put(self, out: list[Verdict], mask: int, allow: bool, rule: int, logged: int) -> None:
        for log, part in ((False, mask & ~logged), (True, mask & logged)):
            if part:
                key = (allow, rule, log)
                verdict = self._verdicts.get(key)
                if verdict is None:
                    verdict = self._verdicts[key] = Verdict(allow, rule, log)
                for port_class in indexes_of(part):
                    out[port_class] = verdict

    def columns(
        self, hits: dict[int, list[_Hit]], classes: Sequence[int], defaults: tuple[Verdict, ...] | None
    ) -> tuple[tuple[Verdict, ...], dict[int, Column]]:
        """The default verdicts, and the cells of ``classes``, of which ``hits`` are all that are hit.

        ``defaults``: those to keep; None chooses them.
        """
        groups: dict[tuple[_Hit, ...], list[int]] = {}
        for class_id, found in hits.items():
            groups.setdefault(tuple(found), []).append(class_id)
        decided = [(self.decide(key), members) for key, members in groups.items()]
        if defaults is None:
            defaults = self._defaults(decided, len(classes) - len(hits))
        if defaults != self.base:
            decided.append((self.base, [class_id for class_id in classes if class_id not in hits]))
        out: dict[int, Column] = {}
        for verdicts, members in decided:
            column = tuple(
                (port_class, verdict)
                for port_class, verdict in enumerate(verdicts)
                if verdict != defaults[port_class]
            )
            if column:
                out.update(dict.fromkeys(members, column))
        return defaults, out

    def _defaults(
        self, decided: list[tuple[tuple[Verdict, ...], list[int]]], others: int
    ) -> tuple[Verdict, ...]:
        if others >= sum(len(members) for _, members in decided):
            return self.base
        out = []
        for port_class, base in enumerate(self.base):
            votes = {base: others}
            for verdicts, members in decided:
                verdict = verdicts[port_class]
                votes[verdict] = votes.get(verdict, 0) + len(members)
            best = max(votes.values())
            out.append(base if votes[base] == best else next(v for v, n in votes.items() if n == best))
        return tuple(out)


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


def _partition(services: dict[Ranges, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Starts and port classes of the intervals; the value of each key becomes its port classes, as bits."""
    cuts = _cuts(services)
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
    for covered, mask in zip(list(services), masks, strict=True):
        services[covered] = mask
    return tuple(cuts), port_classes
