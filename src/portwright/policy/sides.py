"""What one side of a connection says in one state of policy: a row of verdicts, over all services.

Rules that ask for source ports are asked for one that the sender's system picked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

from portwright.policy.parties import Side, State
from portwright.policy.ranges import Ranges, intersect, union
from portwright.policy.rules import PORT_PROTOCOLS, Direction
from portwright.policy.selection import Selected
from portwright.policy.services import EPHEMERAL, FIRST_PACKETS, SERVICES_END
from portwright.policy.tables import LOCAL_NODE_VERDICT, NO_POLICY_VERDICT, Column, SetTable, Verdict

#: (first service, verdict) of each stretch of services, ascending from 0.
Row: TypeAlias = tuple[tuple[int, Verdict], ...]


class _Part(NamedTuple):
    """A set's cells for one class of peers, on the services from ``first`` to before ``end``."""

    first: int
    end: int
    table: SetTable
    column: Column

    def verdicts(self) -> Iterator[tuple[int, Verdict]]:
        """(first service, verdict) of each stretch."""
        verdicts = list(self.table.defaults)
        for at, verdict in self.column:
            verdicts[at] = verdict
        starts = self.table.starts
        for start, end, at in zip(starts, (*starts[1:], SERVICES_END), self.table.port_classes, strict=True):
            if start < self.end and end > self.first:
                yield max(start, self.first), verdicts[at]


class Rows:
    """What the sides of one state's groups say, as numbers of rows; equal numbers say the same alike.

    ``shapes``: the number of each thing that a row allows, shared by both states.
    """

    def __init__(self, state: State, shapes: dict[Ranges, int]) -> None:
        self._state = state
        self._known_shapes = shapes
        self._numbers: dict[tuple[int, int, Direction, tuple[int, ...]], int] = {}
        # By row. The policies are kept for the keys above too, which have their identities.
        self._made_of: list[tuple[_Part, ...]] = []
        self._parts_of: dict[int, list[tuple[int, int, SetTable]]] = {}
        self._directions: list[Direction] = []
        self._selected: list[Selected] = []
        #: Of each row the number of what it allows.
        self.shapes: list[int] = []
        #: Of no workload.
        self.silent = self._add(_only(NO_POLICY_VERDICT), Direction.EGRESS, ())
        self._unselected = {d: self._add(_only(NO_POLICY_VERDICT), d, ()) for d in Direction}
        self._local_node = self._add(_only(LOCAL_NODE_VERDICT), Direction.INGRESS, ())

    def of(self, own: Side, other: Side, direction: Direction) -> int:
        """The row of ``own``'s side in ``direction``, for traffic with ``other``."""
        if not own.workload:
            return self.silent
        if direction is Direction.INGRESS and other.local_node:
            return self._local_node
        set_id, selected = set_of(own, direction)
        if not set_id:
            return self._unselected[direction]
        parts = tuple(
            _Part(first, end, table, table.columns.get(other.class_id, ()))
            for first, end, table in self._tables(set_id)
        )
        key = (set_id, id(selected), direction, tuple(id(part.column) for part in parts))
        known = self._numbers.get(key)
        if known is None:
            known = self._numbers[key] = self._add(parts, direction, selected)
        return known

    def classes(self, own: Side, direction: Direction) -> Iterable[int]:
        """The classes of others of which ``own``'s set says something else than of the rest."""
        set_id, _ = set_of(own, direction)
        if not own.workload or not set_id:
            return ()
        return {class_id for _, _, table in self._tables(set_id) for class_id in table.columns}

    def row(self, number: int) -> Row:
        """The verdicts of a row."""
        return tuple(stretch for part in self._made_of[number] for stretch in part.verdicts())

    def text(self, number: int, verdict: Verdict) -> str:
        """What decided a verdict of a row, for people; '' of a side that says nothing."""
        if number == self.silent:
            return ""
        direction = self._directions[number]
        info = self._state.compiled.rules[verdict.rule]
        if info.policy and info.index is not None:
            owner = f"{info.namespace}/{info.policy}" if info.namespace else info.policy
            where = f" {info.where}" if str(info.where) else ""
            return f"{direction} {owner} rule {info.index + 1}{where}"
        if not info.tier:
            return f"{direction} {info.implicit}"
        first, *more = next(those for tier, those in self._selected[number] if tier.name == info.tier)
        where = f" {first.where}" if str(first.where) else ""
        others = f" and {len(more)} more" if more else ""
        return f"{direction} {info.implicit} of {info.tier}, by {first.title}{where}{others}"

    def _tables(self, set_id: int) -> list[tuple[int, int, SetTable]]:
        """The set, or those that it is by source port: (first service, end, set) of each."""
        known = self._parts_of.get(set_id)
        if known is None:
            compiled = self._state.compiled
            split = compiled.splits.get(set_id)
            if split is None:
                known = [(0, SERVICES_END, compiled.sets[set_id])]
            else:
                starts = [block << 16 for block in range(len(PORT_PROTOCOLS))]
                rest = len(PORT_PROTOCOLS) << 16
                known = [(s, s + (1 << 16), compiled.sets[split.at(s | EPHEMERAL)]) for s in starts]
                known.append((rest, SERVICES_END, compiled.sets[split.at(rest)]))
            self._parts_of[set_id] = known
        return known

    def _add(self, parts: tuple[_Part, ...], direction: Direction, selected: Selected) -> int:
        number = len(self._made_of)
        self._made_of.append(parts)
        self._directions.append(direction)
        self._selected.append(selected)
        row = self.row(number)
        ends = (*(start for start, _ in row[1:]), SERVICES_END)
        allowed = union(
            (start, end) for (start, verdict), end in zip(row, ends, strict=True) if verdict.allow
        )
        shape = intersect(allowed, ((0, FIRST_PACKETS),))
        self.shapes.append(self._known_shapes.setdefault(shape, len(self._known_shapes)))
        return number


def _only(verdict: Verdict) -> tuple[_Part, ...]:
    table = SetTable(starts=(0,), port_classes=(0,), defaults=(verdict,), columns={})
    return (_Part(0, SERVICES_END, table, ()),)


def set_of(side: Side, direction: Direction) -> tuple[int, Selected]:
    """The number of the set of a side's ``direction``, and the policies of it."""
    if direction is Direction.INGRESS:
        return side.set_in, side.selected_in
    return side.set_out, side.selected_out
