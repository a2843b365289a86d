"""What is on this machine that a proof could leave there: the test suite's own list (tests/fix_leaks.py)."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Collection
from pathlib import Path

from tests.fix_leaks import Snapshot, snapshot

_SETTLE = 10.0  # seconds that the kernel has to finish what was asked of it


def look() -> Snapshot:
    """Everything there is now."""
    return snapshot()


def left_since(before: Snapshot, ours: Collection[int]) -> tuple[list[str], str]:
    """(what is new since ``before``, a note); after the kernel had time to settle, [] once nothing is left.

    ``ours`` are the processes that were started: what carries the mark of another one is another's, alive
    or not. While others of this project run on the machine, objects that can't carry a mark (loaded
    programs) may be theirs: they are left out, and the note says so.
    """
    deadline = time.monotonic() + _SETTLE
    while True:
        new = {name: _owners(text) for name, text in snapshot().items() if name not in before}
        others = sorted(_others())
        left = sorted(name for name, marks in new.items() if (marks & {*ours} if marks else not others))
        if not left or time.monotonic() > deadline:
            return left, f"unmarked ones not judged: {', '.join(others)} run here" if others else ""
        time.sleep(0.2)  # namespaces go in the background, and nothing tells when


def _owners(text: str) -> set[int]:
    return {int(pid) for pid in re.findall(r"pwt-(\d+)-", text)}


def _others() -> set[str]:
    """Other processes that make objects like ours: sessions of tests, daemons, the benchmark."""
    found = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if re.search(r"portwright node run|-m (bench|pytest)\b|bin/pytest", words):
                found.add(f"pid {folder.name}")
    return found
