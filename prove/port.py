"""The claims of the first part: a managed port for a real container."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prove.conformance import judge
from prove.line import Line, Proof
from prove.runner import PROJECT, Done, Runner
from prove.suite import run_tests, shown

DEMO_WITHIN, INSTALL_WITHIN = 30.0, 300.0  # seconds
#: By the three doors it can come through.
_HOSTILE = (
    (
        "hostile-cni",
        "hostile CNI input: no crash, no leak, one clear error",
        ["tests/netns/test_hostile_cni.py"],
    ),
    (
        "hostile-socket",
        "hostile socket input: no crash, no leak, a clear error",
        ["tests/netns/test_hostile_socket.py"],
    ),
    (
        "hostile-packets",
        "hostile packets: no crash, every drop counted with its reason",
        ["tests/dataplane/test_*.py", "tests/netns/test_guard_*.py"],
    ),
)
_HELD = re.compile(r"All (\d+) checks held")


def demo(runner: Runner) -> Iterator[Line]:
    """The demo from this tree, where everything is installed; then from a fresh clone with nothing built."""
    done = runner.run("demo", ["make", "--no-print-directory", "demo"], timeout=INSTALL_WITHIN)
    yield _demo_line("`make demo` under 30 s without installation", done, DEMO_WITHIN)

    work = Path(tempfile.mkdtemp(prefix="portwright-prove-"))
    try:
        clone = work / "portwright"
        _git("clone", "--quiet", str(PROJECT), str(clone))
        done = runner.run(
            "demo-fresh-clone",
            ["make", "--no-print-directory", "demo"],
            timeout=2 * INSTALL_WITHIN,
            # A clean machine has no cache of wheels, and no virtual environment to find.
            env={"PIP_NO_CACHE_DIR": "1", "VIRTUAL_ENV": ""},
            cwd=clone,
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    line = _demo_line("`make demo` in a fresh clone under 5 minutes with installation", done, INSTALL_WITHIN)
    said = [line.figure, f"commit {_git('rev-parse', '--short', 'HEAD')}"]
    if _git("status", "--porcelain"):
        said.append("uncommitted changes are not in it")
    if "setup: installing" not in done.output:
        said.append("Debian's packages were here already")
    yield Line(line.ok, line.claim, ", ".join(said))


def _demo_line(claim: str, done: Done, within: float) -> Line:
    held = _HELD.search(done.output)
    ok = done.status == 0 and held is not None and done.seconds < within
    figure = f"{done.seconds:.1f} s, {held[1] if held else 'not all'} checks held"
    return Line(ok, claim, figure)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=PROJECT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def conformance(runner: Runner) -> Iterator[Line]:
    """The 60 cases, against the plugin as `portwright install` installs it."""
    report = run_tests(runner, "conformance", ["tests/conformance/test_*.py"], "--cni-profile=portwright")
    yield judge(report)


def crashes(runner: Runner) -> Iterator[Line]:
    """SIGKILL at every operation, and at random moments under load."""
    claim = "SIGKILL before and after every operation leaves and loses nothing"
    yield shown(runner, "faults", claim, "tests/faults/test_*.py")


def differential(runner: Runner) -> Iterator[Line]:
    """R7: generated packets by both paths."""
    claim = "fast and slow path: same verdict, delivery and totals"
    yield shown(runner, "differential", claim, "tests/netns/test_differential.py")


def hostile(runner: Runner) -> Iterator[Line]:
    """Hostile input: CNI, the socket, packets."""
    for name, claim, paths in _HOSTILE:
        yield shown(runner, name, claim, *paths)


def performance(runner: Runner) -> Iterator[Line]:
    """Every goal of the benchmark's parts that are about ports."""
    yield from benchmark(runner, "stream", "latency", "verbs", "scale")


def benchmark(runner: Runner, *parts: str) -> Iterator[Line]:
    """A line for each goal of these parts of the benchmark, from one run of them."""
    with tempfile.TemporaryDirectory(prefix="portwright-prove-") as folder:
        file = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "bench", "--json", str(file), *parts]
        done = runner.run(f"bench-{parts[0]}", command, timeout=1800)
        if done.status:
            yield Line(False, f"`make bench PART={parts[0]}`", f"exit status {done.status}")
            return
        body: dict[str, Any] = json.loads(file.read_text())
    yield from goal_lines(body)


def goal_lines(body: dict[str, Any]) -> Iterable[Line]:
    """A line for each goal in the benchmark's JSON (bench/report.py)."""
    for goal in body["goals"]:
        yield Line(bool(goal["met"]), str(goal["name"]), str(goal["figure"]))


PROOFS = (
    Proof("1", "the demo", demo),
    Proof("2", "CNI conformance", conformance),
    Proof("3", "crash safety", crashes),
    Proof("4", "fast path against slow path", differential),
    Proof("5", "hostile input", hostile),
    Proof("6", "performance", performance),
)
