"""The lines of `make prove`: what is a PASS, and that nothing unknown is one."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from prove import conformance, port
from prove.__main__ import PARTS
from prove.line import Line, Proof, lines_of
from prove.runner import PROJECT, Done, Runner
from prove.suite import Report, read_junit
from tests.deadline import wait_until

JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase name="test_a"><properties><property name="packets" value="40"/></properties></testcase>
<testcase name="test_b"><properties><property name="packets" value="2"/>
  <property name="seed" value="0xbeef"/></properties></testcase>
{more}
</testsuite></testsuites>"""


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path / "logs")


def test_figures_of_a_suite_are_summed() -> None:
    """Numbers of one name are added up, other values are shown; it is a pass with status 0."""
    report = read_junit(JUNIT.format(more=""))
    assert report.ok
    assert report.figures == {"packets": 42}
    assert "2 tests passed, 42 packets, seed 0xbeef" in str(report)


@pytest.mark.parametrize(
    "more",
    [
        '<testcase name="test_c"><failure message="x"/></testcase>',
        '<testcase name="leak check"><error message="x"/></testcase>',
        '<testcase name="test_c"><skipped type="pytest.skip" message="no kernel"/></testcase>',
    ],
)
def test_a_failure_an_error_and_a_skip_are_no_pass(more: str) -> None:
    """What failed, what could not be run and what was left out is named, and the claim is not shown."""
    report = read_junit(JUNIT.format(more=more))
    assert not report.ok
    assert 'name="' not in str(report)
    assert ("test_c" in str(report)) or ("leak check" in str(report))


def test_a_suite_without_tests_is_no_pass() -> None:
    """Nothing run, or pytest's own failure, shows nothing."""
    assert not Report().ok
    report = read_junit(JUNIT.format(more=""))
    report.status = 2
    assert not report.ok


def _report(cases: set[int], failed: set[int]) -> Report:
    names = {case: f"test_case_{case:02}_x[native]" for case in cases | failed}
    return Report(passed=[names[c] for c in sorted(cases)], failed=[names[c] for c in sorted(failed)])


def test_sixty_cases() -> None:
    """Every case is shown, or named as a later part's; one that has no test is a failure."""
    all_of_now = set(range(1, 61)) - set(conformance.LATER)
    line = conformance.judge(_report(all_of_now, set()))
    assert line.ok
    assert "56 of 60 cases" in line.figure
    assert "32 VLAN" in line.figure
    assert not conformance.judge(_report(all_of_now - {7}, set())).ok
    assert "without a test: 7" in conformance.judge(_report(all_of_now - {7}, set())).figure
    assert not conformance.judge(_report(all_of_now, {7})).ok


def test_a_proof_that_breaks_or_says_nothing_has_failed(runner: Runner) -> None:
    """An exception and silence are FAIL lines with the proof's number; what was said before stays."""

    def breaks(_runner: Runner) -> Iterator[Line]:
        yield Line(True, "first", "1")
        raise FileNotFoundError("no bench")

    lines = list(lines_of(Proof("6", "speed", breaks), runner))
    assert [str(line) for line in lines] == [
        "PASS  6. first: 1",
        "FAIL  6. speed: FileNotFoundError: no bench",
    ]
    assert [line.ok for line in lines_of(Proof("1", "x", lambda _r: []), runner)] == [False]


def test_goals_are_lines() -> None:
    """Each goal of the benchmark's JSON is a line, met or not."""
    goals = [{"name": "TCP", "met": True, "figure": "1.02"}, {"name": "UDP", "met": False, "figure": "0.8"}]
    lines = list(port.goal_lines({"goals": goals}))
    assert [(line.ok, line.claim, line.figure) for line in lines] == [
        (True, "TCP", "1.02"),
        (False, "UDP", "0.8"),
    ]


def test_a_command_is_run_to_its_end(runner: Runner) -> None:
    """Status, output and log are there; stdin is empty."""
    done = runner.run("x", [sys.executable, "-c", "print(input() if 0 else 'hi'); exit(3)"], timeout=20)
    assert (done.status, done.output.strip(), done.log.read_text().strip()) == (3, "hi", "hi")


def test_a_command_that_hangs_is_ended_with_its_children(runner: Runner) -> None:
    """After its time the whole session is interrupted; it is not waited for twice."""
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    done = runner.run("x", [sys.executable, "-c", script], timeout=1.0)
    assert done.status != 0
    assert done.seconds < 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_who_is_told_to_end_ends_what_it_runs(tmp_path: Path, number: signal.Signals) -> None:
    """What was run is interrupted and cleans up, as after ^C, and is not left to run on."""
    began, mark = tmp_path / "began", tmp_path / "clean"
    inner = f"""
import pathlib, time
try:
    pathlib.Path({str(began)!r}).touch()
    time.sleep(20)
finally:
    pathlib.Path({str(mark)!r}).touch()
"""
    outer = f"""
import os, pathlib, sys
from prove import __main__ as prove
from prove.line import Proof

def runs(runner):
    runner.run("x", [sys.executable, "-c", {inner!r}], timeout=99)
    return []

os.geteuid, prove.PROJECT = lambda: 0, pathlib.Path({str(tmp_path)!r})
prove.PARTS["port"] = (Proof("1", "sleep", runs),)
sys.exit(prove.main(["port"]))
"""
    with subprocess.Popen([sys.executable, "-c", outer], cwd=PROJECT, stderr=subprocess.DEVNULL) as process:
        wait_until(began.exists, 20, "the command to run")
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    assert mark.exists()


class _Idle(Runner):
    """Runs nothing, and says that it failed."""

    def __init__(self, logs: Path) -> None:
        super().__init__(logs)
        self.names: list[str] = []

    def run(self, name: str, command: Sequence[str], **_options: object) -> Done:
        self.names.append(name)
        log = self.logs / f"{name}.log"
        log.write_text("")
        return Done(1, 0.0, "", log)


@pytest.mark.parametrize("part", sorted(PARTS))
def test_every_line_of_a_part_can_be_run(part: str, tmp_path: Path) -> None:
    """Where nothing works each proof ends in FAILs, none by a mistake of its own, and each has a log."""
    idle = _Idle(tmp_path / "logs")
    for proof in PARTS[part]:
        found = list(lines_of(proof, idle))
        assert found
        assert not [line for line in found if line.ok or re.search(r"\wError: |no such tests", line.figure)]
    assert len(idle.names) == len(set(idle.names)), "two write into one log"
