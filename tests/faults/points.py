"""Walking through the places to die: what the tests of kill points have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from portwright import Client
from portwright.model.errors import PortwrightError
from tests.faults.audit import Record
from tests.faults.conftest import Crash
from tests.fix_netns import TestNetns


def around(kind: str, steps: Iterable[int]) -> list[str]:
    """The places before and after each step."""
    return [f"{kind}:{step}:{when}" for step in steps for when in ("before", "after")]


def steps_of(crash: Crash, kind: str) -> list[str]:
    """The operations of the last plan of a kind."""
    state = crash.daemon.state_dir
    return Record(state).plan(state, kind)


def killed_at(crash: Crash, places: Sequence[str], act: Callable[[], bool], then: str = "") -> Iterator[str]:
    """Each place, once the daemon was killed there by ``act`` (has it succeeded?) and started again.

    What the caller does until it asks for the next runs in a daemon that is armed for that one; after the
    last place it is armed for ``then``.
    """
    crash.arm(places[0])
    for place, following in zip(places, [*places[1:], then], strict=True):
        assert not act(), f"{place}: it succeeded"
        crash.died(place)
        crash.arm(following)
        yield place


def answered(crash: Crash, call: Callable[[Client], object]) -> bool:
    """Whether the daemon answers a call other than with an error."""
    with crash.daemon.client() as client:
        try:
            call(client)
        except PortwrightError:
            return False
    return True


def recoveries(crash: Crash, kind: str, places: Sequence[str]) -> None:
    """Kill the recovery at each place in turn; the last one comes to its end."""
    for place in places:
        crash.dies_starting(f"recover-{place}")
    crash.arm("")
    crash.clean(f"recovery of {kind}")


def ids(crash: Crash) -> set[str]:
    """The ports on record."""
    return {p.port_id for p in Record(crash.daemon.state_dir).ports}


def empty(ns: TestNetns) -> bool:
    """Whether the sandbox has nothing but its loopback."""
    return len(ns.run(["ip", "-o", "link"]).stdout.splitlines()) == 1


def works(ns: TestNetns) -> bool:
    """Whether the world answers the sandbox's ping."""
    return ns.run(["ping", "-n", "-c1", "-W2", "192.0.2.1"], check=False).returncode == 0
