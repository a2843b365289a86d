"""Which pairs a change of policy changes, as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

import click

from portwright.api.policy import PolicyChange, PolicyChanges
from portwright.cli.output import print_table

#: How many rows are printed, and of each how many names on either side and how many services.
_MOST_ROWS, _MOST_NAMES, _MOST_SERVICES = 40, 3, 4
_ALL_BUT = "all but "


def print_changes(changes: PolicyChanges) -> None:
    """Print the table, and what of it is left off here."""
    if not changes.rows:
        click.echo("no pair changes: every verdict stays")
        return
    header = ["BECOMES", "FROM", "TO", "SERVICES", "IP", "BEFORE", "AFTER"]
    rows = [_row(row) for row in changes.rows[:_MOST_ROWS]]
    if any(row.via for row in changes.rows[:_MOST_ROWS]):
        header.insert(3, "VIA")
        for row, change in zip(rows, changes.rows, strict=False):
            row.insert(3, change.via)
    print_table(header, rows)
    rest = changes.rows[_MOST_ROWS:]
    pairs = sum(row.pairs for row in rest) + changes.more_pairs
    if rest or changes.more_rows:
        click.echo(
            f"and {pairs:,} pairs more in {len(rest) + changes.more_rows:,} rows; "
            f"--json has the first {len(changes.rows):,} rows"
        )
    if not changes.counted:
        click.echo("and more that nobody counted: too many pairs differ; try a part of the files")


def _row(row: PolicyChange) -> list[str]:
    return [
        "allowed" if row.allowed else "denied",
        _some(row.sources, row.more_from, _MOST_NAMES),
        _some(row.targets, row.more_to, _MOST_NAMES),
        _services(row.services),
        "+".join(map(str, row.families)),
        row.before,
        row.after,
    ]


def _services(texts: Sequence[str]) -> str:
    """The first of them; what is nearly all, too, by the first of those that it lacks."""
    if len(texts) == 1 and texts[0].startswith(_ALL_BUT):
        return _ALL_BUT + _some(texts[0].removeprefix(_ALL_BUT).split(", "), 0, _MOST_SERVICES)
    return _some(texts, 0, _MOST_SERVICES)


def _some(texts: Sequence[str], more: int, most: int) -> str:
    left = len(texts[most:]) + more
    return ", ".join(texts[:most]) + (f" and {left:,} more" if left else "")
