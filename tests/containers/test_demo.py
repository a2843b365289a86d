"""The demo is a test: each of its steps checks itself."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.containers
PROJECT = Path(__file__).parents[2]


@pytest.mark.alone
def test_the_demo_tells_its_story_in_half_a_minute() -> None:
    """It exits 0 within 30 seconds, every step told; the leak check proves that all is gone."""
    began = time.monotonic()
    done = subprocess.run(
        [str(PROJECT / "demo/demo.sh")], capture_output=True, text=True, check=False, timeout=100
    )
    took = time.monotonic() - began
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("HTTP", "8080", "counted", "src_ip", "verdict: allowed", "verdict: refused", "checks held"):
        assert said in done.stdout, said
    assert took < 30, f"{took:.1f} s"


def test_a_step_that_does_not_hold_ends_the_demo(tmp_path: Path) -> None:
    """With a curl that gets another page it exits 1, names the step and what it saw, and leaves nothing."""
    curl = tmp_path / "curl"
    curl.write_text("#!/bin/sh\necho somebody else\n")
    curl.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [str(PROJECT / "demo/demo.sh")], capture_output=True, text=True, check=False, timeout=100, env=env
    )
    assert done.returncode == 1, done.stdout
    assert "FAILED: step 5: web answers the world" in done.stderr
    assert "somebody else" in done.stderr
