"""SIGKILL before and after the operations that a clone's port has besides; see test_kill_points.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from portwright import Client
from portwright.model.port import PortState
from tests.faults.conftest import Crash
from tests.faults.points import answered, around, empty, ids, killed_at, steps_of
from tests.fix_netns import NetnsFactory
from tests.netns.clone_lab import CLONE, entries

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(300)]

CLONES = ("CreateTap", "JoinClone", "DeleteTap", "RemoveClone")


def test_killed_around_the_operations_of_a_clone(
    crash: Crash, netns_factory: NetnsFactory, figures: Callable[..., None]
) -> None:
    """A create that was cut leaves nothing, a delete that was cut is finished, a plug or unplug that was cut
    leaves the port detached; and the map has entries of attached ports alone, each its own number."""
    ns, other, before = netns_factory(), netns_factory(), ids(crash)
    made = ""

    def create(client: Client) -> None:
        nonlocal made
        made = client.port_create("witness", ns.path, name="box", **CLONE).port_id  # type: ignore[arg-type]

    def call(act: Callable[[Client], object]) -> bool:
        return answered(crash, act)

    with crash.daemon.client() as client:
        stays = client.port_create("witness", other.path, name="stays", **CLONE)  # type: ignore[arg-type]
        create(client)
        client.port_unplug(made)
        client.port_plug(made, ns.path)
        client.port_delete(made)
    kinds = ("add", "del", "unplug", "plug")
    places = {
        kind: around(kind, [i for i, step in enumerate(steps_of(crash, kind)) if step in CLONES])
        for kind in kinds
    }
    assert [len(places[kind]) for kind in kinds] == [4] * 4
    with_it, alone = ids(crash), {stays.clone: stays.port_id}

    for place in killed_at(crash, places["add"], lambda: call(create)):
        assert (ids(crash), entries(crash.daemon), empty(ns)) == (with_it, alone, True), place
        crash.clean(place)

    def deleted() -> bool:
        assert call(create)
        return call(lambda client: client.port_delete(made))

    for place in killed_at(crash, places["del"], deleted):
        assert (ids(crash), entries(crash.daemon), empty(ns)) == (with_it, alone, True), place
        crash.clean(place)

    def unplugged() -> bool:
        _plugged(crash, made, ns.path)
        return call(lambda client: client.port_unplug(made))

    assert call(create)
    for place in killed_at(crash, places["unplug"], unplugged):
        assert (entries(crash.daemon), empty(ns)) == (alone, True), place
        crash.clean(place)
    for place in killed_at(
        crash, places["plug"], lambda: call(lambda client: client.port_plug(made, ns.path))
    ):
        assert (entries(crash.daemon), empty(ns)) == (alone, True), place
        crash.clean(place)
    _plugged(crash, made, ns.path)
    assert set(entries(crash.daemon).values()) == {stays.port_id, made}
    with crash.daemon.client() as client:
        client.port_delete(made)
        client.port_delete(stays.port_id)
    assert entries(crash.daemon) == {}
    assert ids(crash) == before
    figures(kill_points=crash.points, witness=crash.witness.sentence())


def _plugged(crash: Crash, port_id: str, path: str) -> None:
    with crash.daemon.client() as client:
        if client.port_show(port_id).state is PortState.DETACHED:
            client.port_plug(port_id, path)
