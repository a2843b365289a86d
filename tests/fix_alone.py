"""pytest plugin: a test marked ``alone`` runs while no other worker of its session runs a test.

``make test`` has two workers (pytest-xdist). What compares a duration or a rate with a limit, or takes the
whole machine, is marked ``alone``; all else goes beside anything else. Without workers the mark means
nothing.

Each test holds a lock of the session from its setup to its teardown: shared, or exclusive if it is
``alone``. Who wants it waits at a door, or those who share it could hand it on to each other for good.
Waiting counts for no test: pytest-timeout's clock starts inside.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_FOLDER = pytest.StashKey[Path]()


class Turns:
    """A worker's part: each of its tests waits for its turn. ``folder`` is the session's."""

    def __init__(self, folder: Path) -> None:
        self._turn, self._door = folder / "turn", folder / "door"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Hold the lock around the test with its fixtures."""
        how = fcntl.LOCK_SH if item.get_closest_marker("alone") is None else fcntl.LOCK_EX
        with self._turn.open("ab") as turn:
            with self._door.open("ab") as door:
                fcntl.flock(door, fcntl.LOCK_EX)
                fcntl.flock(turn, how)
            try:
                return (yield)
            finally:
                fcntl.flock(turn, fcntl.LOCK_UN)  # closing is not enough if a forked child lives on


def pytest_configure(config: pytest.Config) -> None:
    """In a worker: take turns. In the process that will start workers: make the folder."""
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Turns(Path(config.workerinput["turns"])), "turns")
    elif config.getoption("dist", "no") != "no":
        config.stash[_FOLDER] = Path(tempfile.mkdtemp(prefix=f"pwt-{os.getpid()}-turns-"))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker that is about to start where the folder is."""
    node.workerinput["turns"] = str(node.config.stash[_FOLDER])


def pytest_unconfigure(config: pytest.Config) -> None:
    """Take the folder away."""
    if _FOLDER in config.stash:
        shutil.rmtree(config.stash[_FOLDER], ignore_errors=True)
