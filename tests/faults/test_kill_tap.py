"""SIGKILL before and after the operations that a port with a tap has besides; see test_kill_points.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.cni import Cni
from tests.faults.conftest import Crash
from tests.faults.points import around, empty, ids, killed_at, steps_of
from tests.fix_netns import NetnsFactory

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(300)]

TAPS = ("CreateVeth", "CreateTap", "JoinLinks", "DeleteLink", "DeleteTap")


@pytest.mark.parametrize("verb", ["add", "del"])
def test_killed_around_the_operations_of_a_tap(
    crash: Crash, cni: Cni, netns_factory: NetnsFactory, figures: Callable[..., None], verb: str
) -> None:
    """An ADD that was cut leaves nothing, a DEL that was cut is finished; no tap stays in the sandbox."""
    cni.conf["model"] = "tcfilter"
    ns, before = netns_factory(), ids(crash)
    assert cni.add("probe", ns).ok
    assert cni.delete("probe", ns).ok
    places = around(verb, [i for i, step in enumerate(steps_of(crash, verb)) if step in TAPS])

    assert len(places) == {"add": 6, "del": 4}[verb]

    def act() -> bool:
        added = cni.add("box", ns)
        return added.ok if verb == "add" else cni.delete("box", ns).ok

    for place in killed_at(crash, places, act):
        assert ids(crash) == before, place
        assert empty(ns), place
        crash.clean(place)
        assert cni.delete("box", ns).ok
    figures(kill_points=crash.points, witness=crash.witness.sentence())
