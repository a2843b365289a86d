"""``portwright policy matrix --live``: the matrix beside what real packets say of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from portwright.cli.output import print_json, print_table

if TYPE_CHECKING:
    from portwright.policy.manifests.read import Manifests
    from portwright.policy.matrix import Cell

_WORDS = {True: "yes", False: "no", None: ""}


def show_live(
    files: Sequence[tuple[str, str]], manifests: Manifests, cells: Sequence[Cell], *, as_json: bool
) -> int:
    """Try every cell, print both verdicts of each and where they differ. The exit status: 1 if they do."""
    from portwright.live.matrix import verdicts

    found = verdicts(files, manifests, _progress)
    return report(list(zip(cells, found, strict=True)), as_json=as_json)


def report(tried: Sequence[tuple[Cell, bool | None]], *, as_json: bool) -> int:
    """Print cells with their packets' verdicts, and again those where the two differ; 1 if any do, else 0.

    None, where a cell can't be tried, is no difference.
    """
    wrong = [(cell, live) for cell, live in tried if live is not None and cell.allowed != live]
    unsent = sum(live is None for _, live in tried)
    if as_json:
        print_json({"cells": [{**msgspec.to_builtins(cell), "live": live} for cell, live in tried]})
    else:
        _print(tried)
        differ = "1 verdict differs" if len(wrong) == 1 else f"{len(wrong):,} verdicts differ"
        click.echo(f"\n{len(tried) - unsent:,} packets sent, {differ}" + (":" if wrong else ""))
        if wrong:
            _print(wrong)
    if unsent:
        click.echo(f"live: cells not tried, which no packet shows (docs/policy.md): {unsent:,}", err=True)
    return 1 if wrong else 0


def _print(tried: Sequence[tuple[Cell, bool | None]]) -> None:
    print_cells([(cell, [_WORDS[cell.allowed], _WORDS[live]]) for cell, live in tried], ["ALLOWED", "LIVE"])


def print_cells(cells: Sequence[tuple[Cell, list[str]]], verdicts: list[str]) -> None:
    """Print cells, each with its verdicts, under these headings."""
    via = any(cell.via for cell, _ in cells)
    print_table(
        ["FROM", "TO", *(["VIA"] if via else []), "PORT", *verdicts, "RULE"],
        [
            [c.source, c.target, *([c.via] if via else []), f"{c.protocol}/{c.port}", *words, c.rule]
            for c, words in cells
        ],
    )


def _progress(text: str) -> None:
    click.echo(f"live: {text}", err=True)
