"""The machine's mounts, as a test may compare them before and after."""

from __future__ import annotations

from pathlib import Path


def standing() -> list[str]:
    """This namespace's mounts, but for those that tests beside this one make and unmake."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if "/run/netns" not in line and "pwt-" not in line]
