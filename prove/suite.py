"""Runs tests for a proof, and reads what they found from junit's XML.

A test hands a figure to the proof by pytest's ``record_property("packets", 4096)``: whole numbers of one
name are summed over the suite, other values are shown once each.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree

from prove.line import Line
from prove.runner import PROJECT, Runner

_COUNTED = r" (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b"
_NO_SUCH_TESTS = 4  # pytest's own status for wrong usage
_SHOWN = 3  # names of failed tests in a figure


@dataclass(slots=True)
class Report:
    """The outcome of one pytest run: names of tests by outcome, and the figures that they recorded."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    status: int = 0
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Every test ran and passed, and there was one. An expected failure is declared, a skip is not."""
        return self.status == 0 and bool(self.passed) and not self.failed and not self.skipped

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        parts = [f"{len(self.passed)} tests passed"]
        parts += [f"{value:,} {name.replace('_', ' ')}" for name, value in sorted(self.figures.items())]
        parts += [f"{name.replace('_', ' ')} {text}" for name, text in sorted(self.notes.items())]
        if self.expected:
            parts.append(f"{len(self.expected)} declared as expected failures")
        for what, names in (("FAILED", self.failed), ("skipped", self.skipped)):
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                parts.append(f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})")
        if not self.passed and not self.failed:
            parts.append(f"pytest ended with {self.status}")
        return ", ".join(parts) + f", in {self.seconds:.0f} s"


def run_tests(
    runner: Runner,
    name: str,
    paths: Sequence[str],
    *options: str,
    timeout: float = 1800,
    env: Mapping[str, str] | None = None,
) -> Report:
    """Run the tests at ``paths`` (of the project; ``*`` is allowed), each of which has to match something.

    ``env`` is added to the environment.
    """
    found: list[str] = []
    for path in paths:
        file, _, test = path.partition("::")
        matches = sorted(PROJECT.glob(file))
        if not matches:
            return Report(status=_NO_SUCH_TESTS, problem=f"no such tests: {path}")
        found += [f"{match.relative_to(PROJECT)}{'::' + test if test else ''}" for match in matches]
    junit = runner.logs / f"{name}-{uuid.uuid4().hex[:8]}.xml"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    command += [f"--junitxml={junit}", "-o", "junit_logging=no", *options, *found]
    done = runner.run(name, command, timeout=timeout, counting=_COUNTED, env=env)
    try:
        report = read_junit(junit.read_text()) if junit.exists() else Report()
    finally:
        junit.unlink(missing_ok=True)
    report.status, report.seconds = done.status, done.seconds
    return report


def shown(runner: Runner, name: str, claim: str, *paths: str, env: Mapping[str, str] | None = None) -> Line:
    """A claim that the tests at ``paths`` show; the line's figure is their report."""
    report = run_tests(runner, name, paths, env=env)
    return Line(report.ok, claim, str(report))


def read_junit(text: str) -> Report:
    """Read junit's XML as pytest writes it. Pure."""
    report = Report()
    for case in ElementTree.fromstring(text).iter("testcase"):  # noqa: S314 - our own pytest wrote it
        name = case.get("name", "?")
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            report.failed.append(name)
        elif skipped is not None:
            known = report.expected if skipped.get("type") == "pytest.xfail" else report.skipped
            known.append(name)
        else:
            report.passed.append(name)
        for one in case.iter("property"):
            key, value = one.get("name", ""), one.get("value", "")
            if value.isdecimal():
                report.figures[key] = report.figures.get(key, 0) + int(value)
            else:
                report.notes[key] = value
    return report
