"""What the commands print: JSON for programs, tables for people.

Text from the daemon (names, labels, summaries) is made printable before it meets a terminal.
Tables are drawn by rich on a terminal; elsewhere they are plain fixed columns, in which an empty
cell is ``-`` and no heading holds a space, so that awk finds its columns.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
import msgspec


def full(value: object) -> Any:
    """Return ``value`` as plain JSON-able data with every field present, defaults too, by its wire name.

    The wire leaves defaults out; a program that reads ``--json`` should not need to know them.
    """
    if isinstance(value, msgspec.Struct):
        names = zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True)
        return {wire: full(getattr(value, name)) for wire, name in names}
    if isinstance(value, Mapping):
        return {str(key): full(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [full(item) for item in value]
    return msgspec.to_builtins(value)


def print_json(value: object, *, line: bool = False) -> None:
    """Print ``value`` as JSON: indented, or on one line for a stream of values."""
    data = msgspec.json.encode(full(value))
    click.echo((data if line else msgspec.json.format(data, indent=2)).decode())


def printable(text: str, *, keep: str = "") -> str:
    """Return ``text`` with what a terminal might obey written as an escape, but for ``keep``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table. Numbers are aligned to the right."""
    lines = list(rows)
    numeric = [bool(lines) and all(isinstance(row[i], int) for row in lines) for i in range(len(headings))]
    cells = [[_cell(value) for value in row] for row in lines]
    if sys.stdout.isatty():
        _print_rich(headings, cells, numeric)
        return
    widths = [max(len(row[i]) for row in [list(headings), *cells]) for i in range(len(headings))]
    for row in [list(headings), *cells]:
        padded = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        click.echo("  ".join(padded).rstrip())


def _print_rich(headings: Sequence[str], cells: list[list[str]], numeric: list[bool]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading, right in zip(headings, numeric, strict=True):
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))  # Text: a name in brackets is not markup
    Console().print(table)


def _cell(value: object) -> str:
    return printable(str(value)) if value is not None and value != "" else "-"


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Print name and value, one pair a line. A value of None or '' is left out; a list has a line each."""
    shown = [(name, value) for name, value in facts if value not in (None, "", (), [])]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        values = value if isinstance(value, (list, tuple)) else [value]
        for index, each in enumerate(values):
            click.echo(f"{name if index == 0 else '':<{width}}  {printable(str(each))}")


def rate(bits: int) -> str:
    """Return a rate or burst as people write it: 100M; '' for unlimited."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if bits and bits % size == 0:
            return f"{bits // size}{unit}"
    return str(bits) if bits else ""
