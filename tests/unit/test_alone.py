"""The mark ``alone``: a small session of its own with two workers, whose tests write down when they ran."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]

# Each file is one worker's. The first tests wait for each other: so the two do run at the same time.
_FILE = """
import os, select, time
from pathlib import Path
import pytest

def seen(name):
    return (Path({log!r}).parent / name).exists()

def run(name):
    with open({log!r}, "a") as log:
        log.write(f"begin {{name}}\\n")
    select.select([], [], [], 0.02)
    with open({log!r}, "a") as log:
        log.write(f"end {{name}}\\n")

def test_first():
    Path({log!r}).with_name("{me}").touch()
    deadline = time.monotonic() + 30
    while not seen("{other}"):
        assert time.monotonic() < deadline
        select.select([], [], [], 0.002)

@pytest.mark.parametrize("n", range(8))
def test_beside(n):
    run(f"beside {me}{{n}}")

@pytest.mark.alone
@pytest.mark.parametrize("n", range(4))
def test_alone(n):
    run(f"alone {me}{{n}}")
"""


def test_nothing_runs_beside_what_is_alone(tmp_path: Path) -> None:
    """Two workers run tests at the same time, but none begins or ends during one that is marked ``alone``."""
    log = tmp_path / "log"
    for me, other in ("ab", "ba"):
        (tmp_path / f"test_{me}.py").write_text(_FILE.format(log=str(log), me=me, other=other))
    ini = tmp_path / "pytest.ini"
    ini.write_text("[pytest]\nmarkers = alone\n")
    options = [
        "-q",
        "-p",
        "tests.fix_alone",
        "-p",
        "no:cacheprovider",
        "-c",
        str(ini),
        "-n2",
        "--dist=loadfile",
    ]

    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "26 passed" in done.stdout
    lines = log.read_text().splitlines()
    begun = [at for at, line in enumerate(lines) if line.startswith("begin alone")]
    assert len(begun) == 8
    assert [lines[at + 1].replace("end", "begin") for at in begun] == [lines[at] for at in begun]
