"""A set's verdicts for every class of peers: made anew, or carried over from the tables in force."""

from __future__ import annotations

from typing import NamedTuple

from portwright.policy.memory import Built
from portwright.policy.sets import RuleList
from portwright.policy.tables import SetTable


class Classes(NamedTuple):
    """The class of each place; all classes, and those that were not before, and of which terms they are."""

    at: list[int]
    every: list[int]
    new: list[int]
    of_term: dict[int, list[int]]
    new_of_term: dict[int, list[int]]


def fresh(rule_list: RuleList, classes: Classes) -> Built:
    """A set that was not before."""
    defaults, columns, cells = rule_list.columns(classes.of_term, classes.every, None)
    table = SetTable(
        starts=rule_list.starts, port_classes=rule_list.port_classes, defaults=defaults, columns=columns
    )
    return Built(rule_list, table, cells)


def carried(built: Built, classes: Classes, gone: set[int]) -> Built:
    """A set that was: cells of classes that were stand, those that are gone go, new classes get theirs."""
    rule_list, table, cells = built
    _, new, more = rule_list.columns(classes.new_of_term, classes.new, table.defaults)
    lost = gone & table.columns.keys()
    if not new and not lost:
        return built
    columns = dict(table.columns)
    for class_id in lost:
        cells -= len(columns.pop(class_id))
    columns.update(new)
    changed = SetTable(
        starts=table.starts, port_classes=table.port_classes, defaults=table.defaults, columns=columns
    )
    return Built(rule_list, changed, cells + more)
