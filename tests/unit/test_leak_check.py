"""The leak check itself: small sessions of their own that leave something behind, or do not."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests import fix_leaks

# Not marked netns: whole pytest sessions, which show nothing new under another kernel.
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

PROJECT = Path(__file__).resolve().parents[2]


def session(folder: Path, *body: str, workers: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a pytest session of one test with the check."""
    test = folder / "test_it.py"
    head = "import os, subprocess\nMARK = f'pwt-{os.getpid()}-'\ndef test_it(leaks):\n    "
    test.write_text(head + "\n    ".join(body) + "\n")
    empty = folder / "pytest.ini"
    empty.write_text("[pytest]\n")
    options = ["-q", "-p", "tests.fix_leaks", "-p", "no:cacheprovider", "-c", str(empty), f"-n{workers}"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(folder), str(test)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture(params=[0, 1], ids=["no workers", "a worker"])
def workers(request: pytest.FixtureRequest) -> int:
    """The session's workers (pytest-xdist)."""
    return int(request.param)


def test_clean_session_passes(tmp_path: Path, workers: int) -> None:
    """A session that removes what it made succeeds."""
    body = "[subprocess.run(['ip', 'netns', do, MARK + 'x'], check=True) for do in ('add', 'delete')]"
    done = session(tmp_path, body, workers=workers)

    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_what_is_left_behind_fails_the_session(tmp_path: Path, workers: int) -> None:
    """What outlives its session fails it: a namespace with the mark, one that was recorded, a process (found
    by its environment), a descriptor.

    Each is named, and the exit status and the closing line both tell; a worker's as if there were none.
    """
    name = uuid.uuid4().hex[:8]
    done = session(
        tmp_path,
        f"[subprocess.run(['ip', 'netns', 'add', m + '{name}'], check=True) for m in (MARK, 'x')]",
        f"leaks.record('netns x{name}')",
        "subprocess.Popen(['tail', '-f', '/dev/null'], start_new_session=True)",
        "os.open('/proc/self/ns/net', os.O_RDONLY)",
        workers=workers,
    )
    # Each once: under CI pytest does not cut its short summary, and the whole message stands there again.
    lines = dict.fromkeys(line.strip() for line in done.stdout.splitlines())
    for path in Path("/run/netns").glob(f"*{name}"):
        subprocess.run(["ip", "netns", "delete", path.name], check=True)
    left = {kind: [line for line in lines if line.startswith(kind)] for kind in ("netns", "process", "descr")}
    for line in left["process"]:
        os.kill(int(line.split()[1]), 9)

    assert done.returncode == 1, done.stdout
    assert "1 passed, 1 error" in done.stdout
    assert {kind: len(found) for kind, found in left.items()} == {"netns": 2, "process": 1, "descr": 1}
    assert all(line.endswith(name) for line in left["netns"])
    assert "tail -f /dev/null" in left["process"][0]
    assert "net:[" in left["descr"][0]


def test_marked_and_recorded_objects_are_ours() -> None:
    """Beside another session, only what carries our mark, or was recorded, fails; the rest is told."""
    mark = fix_leaks.MARK
    after = {
        "netns a": f"{mark}a",
        "link pw1": "pw1",
        "link pw2": "pw2 0123",
        "netns b": "pwt-1-b",
        "link lo": "lo",
    }

    ours, doubtful = fix_leaks.judge({"link lo": "lo"}, after, {"link pw2"}, alone=False)

    assert ours == ["link pw2", "netns a"]
    assert doubtful == ["link pw1"]


def test_workers_marks_are_ours_too() -> None:
    """What a worker marked is the session's, and not another's."""
    after = {"netns a": "pwt-7-a", "netns b": "pwt-8-b"}

    assert fix_leaks.judge({}, after, set(), alone=False, workers=["pwt-7-"]) == (["netns a"], [])


def test_alone_everything_new_is_ours() -> None:
    """A session that ran alone answers for all that is new, but not for another session's marked objects."""
    after = {"link pw1": "pw1", "netns b": "pwt-1-b", "link lo": "lo"}

    assert fix_leaks.judge({"link lo": "lo"}, after, set(), alone=True) == (["link pw1"], [])


def test_recorded_object_that_went_is_nothing() -> None:
    """Recording says whose an object would be, not that it should stay."""
    assert fix_leaks.judge({}, {}, {"link pw1"}, alone=True) == ([], [])
