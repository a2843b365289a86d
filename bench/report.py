"""The result of a run: as JSON, for a terminal, and as docs/performance.md."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench.figures import Goal, Part, Series
from bench.lab import OURS, spinning

DOC = Path(__file__).parents[1] / "docs" / "performance.md"
_NOTES = Path(__file__).with_name("notes.md")


class Report(msgspec.Struct):
    """Where, when, what."""

    machine: dict[str, str]
    begun: float
    parts: list[Part]
    seconds: float = 0

    @property
    def goals(self) -> list[Goal]:
        """Of all parts."""
        return [goal for part in self.parts for goal in part.goals]

    def as_json(self) -> dict[str, Any]:
        """``goals`` (name, met, figure) and ``parts`` with every sample."""
        return {
            "machine": self.machine,
            "begun": self.begun,
            "seconds": round(self.seconds, 1),
            "goals": self.goals,
            "parts": self.parts,
        }


def machine() -> dict[str, str]:
    """What the figures depend on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "kernel": platform.release(),
        "cpu": f"{os.cpu_count()} x {model}",
        "load before": spinning(),
    }


def text(report: Report) -> str:
    """For a terminal."""
    lines = [f"{key}: {value}" for key, value in report.machine.items()]
    for part in report.parts:
        for series in part.series:
            lines += ["", f"{series.name} ({series.unit})"]
            width = max(18, *map(len, series.samples))
            for name in series.samples:
                against = ""
                if series.reference:
                    if name != series.reference:
                        against = f"   {series.ratio(name, series.reference)} of {series.reference}"
                elif name != OURS and OURS in series.samples:
                    against = f"   {OURS} is {series.ratio(OURS, name)} of it"
                lines.append(f"  {name:{width}} {series.spread(name)!s:32}{against}")
        lines += ["", *(f"{key}: {value}" for key, value in part.facts.items())] if part.facts else []
    lines += [""]
    lines += [f"{'MET   ' if goal.met else 'MISSED'} {goal.name}: {goal.figure}" for goal in report.goals]
    lines += [f"({report.seconds:.0f} s)", ""]
    return "\n".join(lines)


def document(report: Report, counted: Sequence[str] = ()) -> str:
    """docs/performance.md: goals, every figure with its command, and the notes of bench/notes.md.

    ``counted``: lines of what is counted and not timed, before the notes.
    """
    when = time.strftime("%Y-%m-%d", time.gmtime(report.begun))
    lines = [
        "# Performance",
        "",
        "<!-- Written by `make bench`. The notes at the end are bench/notes.md: change them there. -->",
        "",
        f"Measured {when} by `make bench` in {report.seconds:.0f} s: all contenders side by side, in turn,",
        "in one run. Figures are medians with quartiles in brackets; a ratio is the rounds' median ratio.",
        "Everything, plugins and daemons too, runs at one real-time priority (SCHED_RR), so that other",
        "processes of the machine don't count.",
        "Absolute figures are this machine's: two virtual CPUs, noisy. The ratios are what carries over.",
        "",
        *(f"- {key}: {value}" for key, value in report.machine.items()),
        "",
        "## Goals",
        "",
        "| goal | figure | |",
        "|---|---|---|",
        *(f"| {g.name} | {g.figure} | {'met' if g.met else '**missed**'} |" for g in report.goals),
        "",
    ]
    for part in report.parts:
        lines += [f"## {part.name}", "", f"`python -m bench {part.name}`", ""]
        for series in part.series:
            lines += _table(series)
        for key, value in part.facts.items():
            lines.append(f"- {key}: {value}")
        if part.facts:
            lines.append("")
    return "\n".join([*lines, *counted]) + "\n" + _NOTES.read_text()


def _table(series: Series) -> list[str]:
    first = next(iter(series.samples))
    lines = [f"**{series.name}**, {series.unit} ({series.better} is better): {series.what}.", ""]
    base = series.reference or (OURS if OURS in series.samples else first)
    compared = f"it to {base}" if series.reference else f"{base} to it"
    lines += [f"| contender | {series.unit} | {compared} |", "|---|---|---|"]
    for name in series.samples:
        pair = (name, base) if series.reference else (base, name)
        ratio = "" if name == base else str(series.ratio(*pair))
        lines.append(f"| {name} | {series.spread(name)} | {ratio} |")
    return [*lines, ""]
