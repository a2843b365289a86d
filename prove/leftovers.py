"""What is on this machine that a proof could leave there: the test suite's own list (tests/fix_leaks.py)."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

from tests.fix_leaks import Snapshot, snapshot

_SETTLE = 10.0  # seconds that the kernel has to finish what was asked of it


def look() -> Snapshot:
    """Everything there is now."""
    return snapshot()


def left_since(before: Snapshot) -> list[str]:
    """What is new since ``before``, after the kernel had time to settle; [] as soon as it is nothing.

    What carries the mark of another test session that still runs is that session's.
    """
    deadline = time.monotonic() + _SETTLE
    while True:
        now = snapshot()
        left = sorted(name for name, text in now.items() if name not in before and not _anothers(text))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)  # namespaces go in the background, and nothing tells when


def _anothers(text: str) -> bool:
    """Tell whether it belongs to a session of tests that is still running."""
    owners = {int(pid) for pid in re.findall(r"pwt-(\d+)-", text)}
    return any(_is_pytest(pid) for pid in owners if pid != os.getpid())


def _is_pytest(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"pytest" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
