"""The lab's runner with a guest: that it can't take a failure for a success, and cleans up."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import boot, kernels

pytestmark = [
    pytest.mark.lab,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root"),
]

LIMIT = 300.0

RunTest = Callable[..., boot.Outcome]


@pytest.fixture
def run_test() -> Iterator[RunTest]:
    """Run the text of a test file under 6.1; what it printed is in the list ``shown``."""
    # Below the project, because that is what the guest sees.
    folder = boot.PROJECT / "build" / f"labtest-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    outcomes: list[boot.Outcome] = []

    def run(text: str, *, limit: float = LIMIT, shown: list[str] | None = None) -> boot.Outcome:
        file = folder / "test_in_guest.py"
        file.write_text(text)
        show = shown.append if shown is not None else len
        outcomes.append(boot.run(kernels.fetch("6.1"), ["-v", str(file)], limit=limit, show=show))
        return outcomes[-1]

    yield run
    shutil.rmtree(folder)
    for outcome in outcomes:
        if outcome.kept is not None:
            shutil.rmtree(outcome.kept)


def guests() -> list[str]:
    """Processes of a guest that this process started."""
    tag = f"6.1-{os.getpid()}"
    return [
        text
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if tag in (text := path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    ]


def test_failures_are_counted_and_shown(run_test: RunTest) -> None:
    """One test passes and one fails in the guest: the outcome is a failure, with both counted and shown."""
    shown: list[str] = []
    outcome = run_test("def test_a(): pass\ndef test_b(): assert 7 == 8\n", shown=shown)

    assert (outcome.ok, outcome.status, outcome.passed, outcome.failed) == (False, 1, 1, 1)
    assert "assert 7 == 8" in "".join(shown)
    assert outcome.kept is not None
    assert "failures=" in (outcome.kept / "junit.xml").read_text()
    assert guests() == []


def test_dead_guest_is_a_failure(run_test: RunTest) -> None:
    """A test that crashes the kernel is the guest's death, and what is shown of its console has the panic."""
    crash = "from pathlib import Path\ndef test_a(): Path('/proc/sysrq-trigger').write_text('c')\n"
    outcome = run_test(crash)

    assert (outcome.ok, outcome.status) == (False, None)
    assert "the guest died" in outcome.problem
    assert "panic" in outcome.problem
    assert guests() == []


def test_limit_ends_the_guest(run_test: RunTest) -> None:
    """A guest that takes too long is ended with all its processes, and that is a failure."""
    outcome = run_test("def test_a(): pass\n", limit=2.0)

    assert not outcome.ok
    assert "not done after 2 s" in outcome.problem
    assert guests() == []


def test_no_test_is_a_failure(run_test: RunTest) -> None:
    """A run in which nothing was collected does not pass."""
    outcome = run_test("")

    assert not outcome.ok
    assert outcome.problem == "no test was run"
