"""What the crash tests share: a daemon that can be armed, and transfers that must not notice."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest

from tests.faults.audit import audit
from tests.faults.cni import Cni
from tests.faults.streams import Witness, witness
from tests.fix_daemon import Daemon, SandboxFactory
from tests.fix_features import require_for_test
from tests.fix_netns import TestNetns


class Crash:
    """Restarts of one daemon, with or without a place to die."""

    def __init__(self, daemon: Daemon, watched: Witness) -> None:
        self.daemon = daemon
        self.witness = watched
        self.env: dict[str, str] = {}
        self.points = 0

    def arm(self, place: str) -> None:
        """End the daemon with SIGKILL if it runs; start it with ``place`` to die at, or '' for none."""
        self.daemon.kill()
        self.daemon.start(PORTWRIGHT_DIE_AT=place, **self.env)

    def died(self, place: str) -> None:
        """AssertionError unless the daemon killed itself: the place was reached."""
        status = self.daemon.wait(20)
        assert status == -signal.SIGKILL, f"{place}: the daemon ended with {status}:\n{self.daemon.tail()}"
        self.points += 1

    def dies_starting(self, place: str) -> None:
        """Start it, to die at ``place`` before it is ready."""
        self.daemon.kill()
        self.daemon.launch(PORTWRIGHT_DIE_AT=place, **self.env)
        self.died(place)

    def clean(self, when: str, *, inside: bool = True) -> None:
        """AssertionError unless record and kernel agree and the witnesses go on."""
        problems = audit(self.daemon, inside=inside)
        assert not problems, f"{when}:\n  " + "\n  ".join(problems) + f"\n{self.daemon.tail()}"
        self.witness.check()


@pytest.fixture
def crash(daemon: Daemon, sandboxes: SandboxFactory, world: TestNetns) -> Iterator[Crash]:
    """A daemon with two ports between which, and from which to the world, transfers run all the time."""
    a, b = sandboxes("witness"), sandboxes("witness")
    with witness(a, b, world) as watched:
        yield Crash(daemon, watched)


@pytest.fixture(params=["clsact", "tcx"])
def attach(request: pytest.FixtureRequest) -> str:
    """Both ways to attach programs, where the kernel has both."""
    way = str(request.param)
    if way == "tcx":
        require_for_test("tcx")
    return way


@pytest.fixture
def cni(daemon: Daemon) -> Cni:
    """The installed plugin."""
    return Cni(daemon)


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Note figures for the report, and print them.

    As ``record_property``, which warns (an error here) where junit's file is of the newer kind.
    """

    def note(**named: object) -> None:
        for name, value in named.items():
            request.node.user_properties.append((name, value))
        print(" ".join(f"{name}={value}" for name, value in named.items()))

    return note
