"""Two states of policy, group by group: which pairs change, and what of them.

The sides of a connection are compared each for itself first. Of most pairs neither side differs; these are
never looked at. All that is kept of a side's others is one bit for each group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from portwright.policy.classes import bits_of, indexes_of
from portwright.policy.parties import Group, State
from portwright.policy.ranges import Ranges, intersect, union
from portwright.policy.rules import Direction
from portwright.policy.services import FIRST_PACKETS
from portwright.policy.sides import Rows, set_of
from portwright.policy.tables import NO_POLICY, Verdict

#: The bounds of the work and of what is kept: groups of a family, comparisons, and different outcomes of one
#: group. Beyond, what is told is a part.
MOST_GROUPS, MOST_COMPARED, MOST_KEPT = 1 << 13, 1 << 20, 1 << 17

#: A row's number in both states.
_Both: TypeAlias = tuple[int, int]


class Outcome(NamedTuple):
    """What becomes of some services, and what decides before and after."""

    allowed: bool
    before: str
    after: str
    services: Ranges


class Rectangle(NamedTuple):
    """All pairs of some sources and some targets, by the bits of the groups, have this outcome."""

    sources: int
    targets: int
    outcome: Outcome


class Pairs:
    """The groups of one IP version in two states; ``groups`` are those that are looked at."""

    def __init__(self, before: State, after: State, groups: Sequence[Group]) -> None:
        self.groups = groups[:MOST_GROUPS]
        #: False once there is more than the bounds let be looked at.
        self.counted = len(groups) <= MOST_GROUPS
        self._left = MOST_COMPARED
        self._shapes: dict[Ranges, int] = {}
        self._allowed: list[Ranges] = []  # of each shape; refilled when there are more
        self._rows = (Rows(before, self._shapes), Rows(after, self._shapes))
        self._by_class: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self._local = 0  # groups that are the local node's to one of the states
        for bit, group in ((1 << index, group) for index, group in enumerate(self.groups)):
            for of_class, side in zip(self._by_class, (group.before, group.after), strict=True):
                of_class[side.class_id] = of_class.get(side.class_id, 0) | bit
            if group.before.local_node or group.after.local_node:
                self._local |= bit
        self._everyone = (1 << len(self.groups)) - 1
        self._differ: dict[tuple[int, int, int, int], bool] = {}
        self._outcomes: dict[tuple[int, int, int, int], list[int]] = {}
        self._numbers: dict[Outcome, int] = {}

    def rectangles(self) -> Iterator[Rectangle]:
        """All that changes, or as much as the bounds let be found."""
        egress, ingress = self._kinds(Direction.EGRESS), self._kinds(Direction.INGRESS)
        # One by one the groups whose sides are of more kinds, each with all of the others at once.
        by_target = len(ingress) >= len(egress)
        many: dict[tuple[int, int], int] = {}
        for one, others, numbers in self._changed(*((ingress, egress) if by_target else (egress, ingress))):
            for number in numbers:
                if (number, one) not in many and len(many) >= MOST_KEPT:
                    self.counted = False
                    break
                many[number, one] = many.get((number, one), 0) | others
        ones: dict[tuple[int, int], int] = {}
        for (number, one), others in many.items():
            ones[number, others] = ones.get((number, others), 0) | 1 << one
        outcomes = list(self._numbers)
        for (number, others), those in ones.items():
            yield Rectangle(*((others, those) if by_target else (those, others)), outcomes[number])

    def _changed(self, near: list[_Kind], far: list[_Kind]) -> Iterator[tuple[int, int, list[int]]]:
        """(group, others, outcomes' numbers) of what changes between a group of ``near`` and its others."""
        moved = [kind for kind in far if kind.differs]
        for side in near:
            partition: list[tuple[_Both, int]] = []
            for kind in far if side.differs else moved:
                those = side.members if side.differs else side.members & kind.differs
                partition = partition or (self._partition(side) if those else [])
                for one in indexes_of(those):
                    facing = self._both(kind, one)
                    for both, alike in partition:
                        self._left -= 1
                        if self._left < 0:
                            self.counted = False
                            return
                        others = alike & kind.members
                        if others and (numbers := self._outcome(side.direction, both, facing)):
                            yield one, others, numbers

    def _kinds(self, direction: Direction) -> list[_Kind]:
        """The groups by what their own sides are made of."""
        members: dict[tuple[object, ...], int] = {}
        for index, group in enumerate(self.groups):
            key = tuple(
                (side.workload, set_id, id(selected))
                for side in (group.before, group.after)
                for set_id, selected in [set_of(side, direction)]
            )
            members[key] = members.get(key, 0) | 1 << index
        return [self._kind(those, direction) for those in members.values()]

    def _kind(self, members: int, direction: Direction) -> _Kind:
        """Most others are alike to it: only those with a class that its sets speak of are looked at."""
        own = self.groups[next(indexes_of(members))]
        special = self._local if direction is Direction.INGRESS else 0
        for of_class, side, rows in zip(self._by_class, (own.before, own.after), self._rows, strict=True):
            for class_id in rows.classes(side, direction):
                special |= of_class.get(class_id, 0)
        rest = self._everyone & ~special
        kind = _Kind(own, direction, members, special, 0)
        differ = [index for index in indexes_of(special) if self._side_differs(self._both(kind, index))]
        differs = bits_of(differ, len(self.groups))
        if rest and self._side_differs(self._both(kind, next(indexes_of(rest)))):
            differs |= rest
        return kind._replace(differs=differs)

    def _partition(self, kind: _Kind) -> list[tuple[_Both, int]]:
        """All groups by the rows that the side has for them, as bits."""
        rest = self._everyone & ~kind.special
        found = {self._both(kind, next(indexes_of(rest))): rest} if rest else {}
        for index in indexes_of(kind.special):
            both = self._both(kind, index)
            found[both] = found.get(both, 0) | 1 << index
        return list(found.items())

    def _both(self, kind: _Kind, other: int) -> _Both:
        group = self.groups[other]
        before, after = self._rows
        return (
            before.of(kind.own.before, group.before, kind.direction),
            after.of(kind.own.after, group.after, kind.direction),
        )

    def _side_differs(self, both: _Both) -> bool:
        before, after = self._rows
        return before.shapes[both[0]] != after.shapes[both[1]]

    def _outcome(self, direction: Direction, own: _Both, facing: _Both) -> list[int]:
        """The numbers of what becomes of the services of such a pair; of none if nothing changes."""
        egress, ingress = (facing, own) if direction is Direction.INGRESS else (own, facing)
        if not self._pair_differs(egress, ingress):
            return []
        key = (egress[0], ingress[0], egress[1], ingress[1])
        known = self._outcomes.get(key)
        if known is None:
            known = self._outcomes[key] = [
                self._numbers.setdefault(outcome, len(self._numbers)) for outcome in self._compared(key)
            ]
        return known

    def _pair_differs(self, egress: _Both, ingress: _Both) -> bool:
        """Whether the two sides together allow something else than they did."""
        shapes = [
            rows.shapes[side[state]] for state, rows in enumerate(self._rows) for side in (egress, ingress)
        ]
        key = (shapes[0], shapes[1], shapes[2], shapes[3])
        known = self._differ.get(key)
        if known is None:
            if len(self._allowed) < len(self._shapes):
                self._allowed = list(self._shapes)
            was, becomes = (intersect(self._allowed[a], self._allowed[b]) for a, b in (key[:2], key[2:]))
            known = self._differ[key] = was != becomes
        return known

    def _compared(self, key: tuple[int, int, int, int]) -> Iterator[Outcome]:
        before, after = self._rows
        numbers = list(zip((before, before, after, after), key, strict=True))
        rows = [rows.row(number) for rows, number in numbers]
        cuts = sorted({start for row in rows for start, _ in row if start < FIRST_PACKETS})
        self._left -= 24 + len(cuts)  # as many comparisons as this costs
        places = [0, 0, 0, 0]
        spans: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # by the four rules that decide
        deciding: dict[tuple[int, ...], list[Verdict]] = {}
        for first, end in zip(cuts, [*cuts[1:], FIRST_PACKETS], strict=True):
            for at, row in enumerate(rows):
                while places[at] + 1 < len(row) and row[places[at] + 1][0] <= first:
                    places[at] += 1
            verdicts = [row[place][1] for row, place in zip(rows, places, strict=True)]
            was, becomes = (all(v.allow for v in pair) for pair in (verdicts[:2], verdicts[2:]))
            if was != becomes:
                rules = tuple(verdict.rule for verdict in verdicts)
                deciding[rules] = verdicts
                spans.setdefault(rules, []).append((first, end))
        found: dict[tuple[bool, str, str], list[tuple[int, int]]] = {}
        for rules, verdicts in deciding.items():
            told = [(rows.text(n, v), v) for (rows, n), v in zip(numbers, verdicts, strict=True)]
            outcome = (all(v.allow for v in verdicts[2:]), _deciding(told[:2]), _deciding(told[2:]))
            found.setdefault(outcome, []).extend(spans[rules])
        for (allowed, old, new), those in found.items():
            yield Outcome(allowed, old, new, union(those))


class _Kind(NamedTuple):
    """Groups (``members``) whose own side is the same, as that of ``own``, one of them.

    ``special``: the others for which its rows are not those that it has for the rest. ``differs``: those for
    which it allows something else in the two states.
    """

    own: Group
    direction: Direction
    members: int
    special: int
    differs: int


def _deciding(sides: Iterable[tuple[str, Verdict]]) -> str:
    """What decided: the denying sides, else the sides that a policy has something to say of, else both."""
    said = [(text, verdict) for text, verdict in sides if text]
    denied = [text for text, verdict in said if not verdict.allow]
    spoken = [text for text, verdict in said if verdict.rule != NO_POLICY]
    return "; ".join(denied or spoken) or "no policy"
