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


def session(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Run a pytest session of one test with the check."""
    test = folder / "test_it.py"
    test.write_text(f"import os, subprocess\nMARK = f'pwt-{{os.getpid()}}-'\ndef test_it():\n    {body}\n")
    empty = folder / "pytest.ini"
    empty.write_text("[pytest]\n")
    options = ["-q", "-p", "tests.fix_leaks", "-p", "no:cacheprovider", "-c", str(empty)]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(folder), str(test)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_clean_session_passes(tmp_path: Path) -> None:
    """A session that removes what it made succeeds."""
    done = session(
        tmp_path, "[subprocess.run(['ip', 'netns', do, MARK + 'x'], check=True) for do in ('add', 'delete')]"
    )

    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_namespace_left_behind_fails(tmp_path: Path) -> None:
    """A named namespace that outlives its session fails it, by name, in the closing line and the status."""
    name = uuid.uuid4().hex[:8]
    done = session(tmp_path, f"subprocess.run(['ip', 'netns', 'add', MARK + '{name}'], check=True)")
    (left,) = [path for path in Path("/run/netns").iterdir() if path.name.endswith(name)]
    subprocess.run(["ip", "netns", "delete", left.name], check=True)

    assert done.returncode == 1
    assert f"netns {left.name}" in done.stdout
    assert "1 passed, 1 error" in done.stdout


def test_process_left_behind_fails(tmp_path: Path) -> None:
    """A process that outlives its session is found by the mark in its environment."""
    done = session(
        tmp_path, "print(subprocess.Popen(['tail', '-f', '/dev/null'], start_new_session=True).pid)"
    )
    (line,) = [line for line in done.stdout.splitlines() if line.strip().startswith("process ")]
    os.kill(int(line.split()[1]), 9)

    assert done.returncode == 1
    assert "tail -f /dev/null" in line


def test_descriptor_left_open_fails(tmp_path: Path) -> None:
    """A namespace's descriptor that the session still holds fails it: it would keep the namespace alive."""
    done = session(tmp_path, "os.open('/proc/self/ns/net', os.O_RDONLY)")

    assert done.returncode == 1
    assert "net:[" in done.stdout


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


def test_alone_everything_new_is_ours() -> None:
    """A session that ran alone answers for all that is new, but not for another session's marked objects."""
    after = {"link pw1": "pw1", "netns b": "pwt-1-b", "link lo": "lo"}

    assert fix_leaks.judge({"link lo": "lo"}, after, set(), alone=True) == (["link pw1"], [])


def test_recorded_object_that_went_is_nothing() -> None:
    """Recording says whose an object would be, not that it should stay."""
    assert fix_leaks.judge({}, {}, {"link pw1"}, alone=True) == ([], [])
