"""SIGKILL before and after the operations that a port with a tap has besides; see test_kill_points.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cni import Cni
from tests.faults.conftest import Crash
from tests.faults.points import answered, around, empty, ids, killed_at, steps_of
from tests.fix_netns import NetnsFactory
from tests.netns.chain_lab import Chained

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(300)]

#: The operations of each model besides veth's, with the way in and the way out; tcfilter's with either join.
TAPS = {
    "tcfilter": ("CreateVeth", "CreateTap", "JoinLinks", "DeleteLink", "DeleteTap"),
    "mirred": ("CreateVeth", "CreateTap", "JoinLinks", "DeleteLink", "DeleteTap"),
    "macvtap": ("CreateVeth", "CreateMacvtap", "DeleteLink"),
    "tap": ("CreateHostTap", "NameLink", "DeleteLink"),
}


def _asked(model: str) -> dict[str, Any]:
    return {"model": "tcfilter", "join": "mirred"} if model == "mirred" else {"model": model}


@pytest.mark.parametrize("verb", ["add", "del"])
@pytest.mark.parametrize("model", TAPS)
def test_killed_around_the_operations_of_a_tap(
    crash: Crash, cni: Cni, netns_factory: NetnsFactory, figures: Callable[..., None], model: str, verb: str
) -> None:
    """An ADD that was cut leaves nothing, a DEL that was cut is finished; no tap stays in the sandbox."""
    cni.conf |= _asked(model)
    ns, before = netns_factory(), ids(crash)
    assert cni.add("probe", ns).ok
    assert cni.delete("probe", ns).ok
    places = around(verb, [i for i, step in enumerate(steps_of(crash, verb)) if step in TAPS[model]])

    assert len(places) == 2 * len([step for step in TAPS[model] if ("Delete" in step) == (verb == "del")])

    def act() -> bool:
        added = cni.add("box", ns)
        return added.ok if verb == "add" else cni.delete("box", ns).ok

    for place in killed_at(crash, places, act):
        assert ids(crash) == before, place
        assert empty(ns), place
        crash.clean(place)
        assert cni.delete("box", ns).ok
    figures(kill_points=crash.points, witness=crash.witness.sentence())


@pytest.mark.parametrize("verb", ["plug", "unplug"])
@pytest.mark.parametrize("model", TAPS)
def test_killed_around_the_plugging_of_a_tap(
    crash: Crash, netns_factory: NetnsFactory, figures: Callable[..., None], model: str, verb: str
) -> None:
    """A plug or unplug that was cut ends detached, without a tap, and the port can be plugged again."""
    ns = netns_factory()
    with crash.daemon.client() as client:
        port = client.port_create("witness", ns.path, name="vm", **_asked(model))
        client.port_unplug("vm")
        client.port_plug("vm", ns.path)
        client.port_unplug("vm")
    places = around(verb, [i for i, step in enumerate(steps_of(crash, verb)) if step in TAPS[model]])

    def act() -> bool:
        if verb == "plug":
            return answered(crash, lambda client: client.port_plug("vm", ns.path))
        with crash.daemon.client() as client:
            client.port_plug("vm", ns.path)
        return answered(crash, lambda client: client.port_unplug("vm"))

    for place in killed_at(crash, places, act):
        with crash.daemon.client() as client:
            assert client.port_show("vm").state == "detached", place
        assert empty(ns), place
        crash.clean(place)
    with crash.daemon.client() as client:
        assert client.port_plug("vm", ns.path).tap == port.tap
        client.port_delete("vm")
    assert empty(ns)
    crash.clean("the end")
    figures(kill_points=crash.points, witness=crash.witness.sentence())


@pytest.mark.parametrize("verb", ["chain", "unchain"])
def test_killed_around_a_chained_tap(
    crash: Crash, tmp_path: Path, netns_factory: NetnsFactory, figures: Callable[..., None], verb: str
) -> None:
    """An ADD behind another plugin that was cut leaves nothing on its device; a cut DEL is finished."""
    chain, ns = Chained(crash.daemon, tmp_path), netns_factory()
    prev = chain.before("ADD", "box", ns)
    steps = 2
    places = [f"{verb}:intent", f"{verb}:commit", *around(verb, list(range(steps)))]

    def act() -> bool:
        added = chain.ours.run("ADD", "box", ns.path, prevResult=prev)
        return added.ok if verb == "chain" else chain.ours.delete("box", ns).ok

    def left() -> tuple[list[str], str]:
        links = ns.run(["ip", "-o", "link"]).stdout
        return [line for line in links.splitlines() if "tap" in line], ns.run(["tc", "qdisc"]).stdout

    before = left()
    for place in killed_at(crash, places, act):
        if place == "chain:commit":  # it was made and recorded; whoever was not told deletes it
            assert len(left()[0]) == 1
        else:
            assert left() == before, place
        assert chain.ours.delete("box", ns).ok, place
        assert left() == before, place
    chain.before("DEL", "box", ns)
    figures(kill_points=crash.points, witness=crash.witness.sentence())
