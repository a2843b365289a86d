"""Wait for a condition with a deadline, in place of sleeping and hoping."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
#: What deadlines are multiplied by: the lab's kernels run under emulation, often on a busy machine.
PATIENCE = 5.0 if "PORTWRIGHT_LAB_KERNEL" in os.environ else 1.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.02


def wait_until(predicate: Callable[[], T | None], timeout: float = 5.0, why: str = "the condition") -> T:
    """Call ``predicate`` until it returns something true, and return that.

    Raises AssertionError naming ``why`` after ``timeout`` seconds (times PATIENCE); the predicate is
    always called once more at the end. Pauses grow from 0.5 to 20 ms, so a quick event is seen quickly.
    """
    timeout *= PATIENCE
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE
    while True:
        late = time.monotonic() >= deadline
        result = predicate()
        if result:
            return result
        if late:
            raise AssertionError(f"waited {timeout:g} s for {why}; last: {result!r}")
        select.select([], [], [], pause)
        pause = min(pause * 2, _LONGEST_PAUSE)


def wait_readable(fd: int, timeout: float = 5.0, why: str = "data") -> None:
    """Return once ``fd`` is readable; AssertionError naming ``why`` after ``timeout`` (times PATIENCE)."""
    if not select.select([fd], [], [], timeout * PATIENCE)[0]:
        raise AssertionError(f"waited {timeout:g} s for {why}")
