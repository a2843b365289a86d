"""SIGKILL while sandboxes leave a bridge: after the next start they are on it as before, or all are ports.

Whichever it is, what they say to each other, to the host and from it goes on. See test_kill_points.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, cast

import pytest

from tests.faults.audit import Record
from tests.faults.conftest import Crash
from tests.faults.points import answered, around, ids, killed_at, recoveries
from tests.fix_netns import NetnsFactory
from tests.netns import bridge_lab as lab
from tests.netns.bridge_lab import BRIDGE, HOST4, HOST6, Member
from tests.netns.bridged_guests import Kata, heard

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(600)]

Figures = Callable[..., None]


class Bridge:
    """A bridge with two containers that are connected with each other and the host all the time."""

    def __init__(self, crash: Crash, members: list[Member], connections: list[lab.Idle]) -> None:
        self._crash, self._members, self._connections = crash, members, connections
        self._before = lab.picture(crash.daemon.host)
        self._ports = ids(crash)

    def leave(self, *, remove: bool = False) -> bool:
        """Whether the daemon answers that it is left."""
        return answered(self._crash, lambda client: client.port_migrate(BRIDGE, remove_bridge=remove))

    def works(self, when: str) -> None:
        """AssertionError unless connections go on and new packets have a way."""
        a, b = self._members
        for connection in self._connections:
            connection.alive()
        for target in (b.ip4, b.ip6, HOST4, HOST6):
            assert a.ping(target), f"{when}: {target}"

    def untouched(self, when: str) -> None:
        """AssertionError unless all is on the bridge as before, nothing of ours is there, and it works."""
        assert lab.picture(self._crash.daemon.host) == self._before, when
        assert ids(self._crash) == self._ports, when
        self._crash.clean(when)
        self.works(when)


@pytest.fixture
def bridge(crash: Crash, netns_factory: NetnsFactory) -> Iterator[Bridge]:
    """One in the daemon's namespace, and a network for it."""
    host = crash.daemon.host
    lab.make_bridge(host)
    lab.network(crash.daemon)
    a, b = (Member(netns_factory(), host, number) for number in (11, 12))
    with ExitStack() as stack:
        held = [
            lab.idle(a.ns, b.ns, b.ip4, 22),
            lab.idle(b.ns, a.ns, a.ip6, 23),
            lab.idle(a.ns, host, HOST6, 24),
            lab.idle(host, b.ns, b.ip4, 25),
        ]
        yield Bridge(crash, [a, b], [stack.enter_context(each) for each in held])


def test_killed_before_all_are_on_record(crash: Crash, bridge: Bridge, figures: Figures) -> None:
    """Around every operation of a move: everything is as it was, and everybody goes on."""
    places = ["migrate:intent", *around("migrate", range(7)), *around("leave", range(2))]
    for place in killed_at(crash, places, bridge.leave):
        bridge.untouched(place)
    assert len(Record(crash.daemon.state_dir).plan(crash.daemon.state_dir, "migrate")) == 9  # all of them
    figures(kill_points=crash.points, witness=crash.witness.sentence())


def test_killed_while_it_is_taken_back(crash: Crash, bridge: Bridge, figures: Figures) -> None:
    """One has left the bridge and the other has not; each start that takes it back is killed too."""
    crash.arm("leave:0:after")
    assert not bridge.leave()
    crash.died("leave:0:after")
    recoveries(crash, "migrate", around("undo-migrate", range(9)))
    bridge.untouched("recovery")
    figures(kill_points=crash.points, witness=crash.witness.sentence())


def test_killed_with_a_bridge_inside_a_sandbox(
    crash: Crash, netns_factory: NetnsFactory, figures: Figures
) -> None:
    """Kata's: around the two operations for it, and while they are taken back, the guest goes on past it or
    by it, and after the next start it is as it was."""
    host = crash.daemon.host
    lab.make_bridge(host)
    lab.network(crash.daemon)
    with ExitStack() as stack:
        guest = Kata(netns_factory(), netns_factory(), host, 41, stack)
        heard(guest)
        connection = stack.enter_context(lab.idle(host, guest.ns, guest.ip4, 22))
        before = lab.picture(guest.box)

        def leave() -> bool:
            return answered(crash, lambda client: client.port_migrate(BRIDGE))

        def as_before(when: str) -> None:
            assert _anew(lab.picture(guest.box)) == _anew(before), when
            crash.clean(when, inside=False)
            connection.alive()
            heard(guest)

        for place in killed_at(crash, [*around("migrate", [6]), *around("leave", [1])], leave):
            as_before(place)
        assert Record(crash.daemon.state_dir).plan(crash.daemon.state_dir, "migrate")[6] == "BypassBridge"
        crash.arm("leave:1:after")
        assert not leave()
        crash.died("leave:1:after")
        recoveries(crash, "migrate", around("undo-migrate", [*range(3), 4]))
        as_before("recovery")
    figures(kill_points=crash.points, witness=crash.witness.sentence())


def _anew(picture: object) -> object:
    """Without the number of the inner bridge, which is made anew where it was deleted."""
    links, *rest = cast("tuple[set[tuple[Any, ...]], ...]", picture)
    return {(name, alt, bool(master), *more) for name, alt, master, *more in links}, rest[-1]


@pytest.mark.parametrize("place", ["migrate:commit", "migrate:kept", "migrate:removed"])
def test_killed_when_all_are_on_record(crash: Crash, bridge: Bridge, place: str) -> None:
    """They are ports and work, with the bridge or without; asked again, it is gone."""
    crash.arm(place)
    assert not bridge.leave(remove=True)
    crash.died(place)
    crash.arm("")
    bridge.works(place)
    record = Record(crash.daemon.state_dir)
    assert [p.adopted.bridge for p in record.ports if p.adopted] == [BRIDGE, BRIDGE]
    assert record.pending == []
    if place != "migrate:removed":
        assert bridge.leave(remove=True)
    assert BRIDGE not in lab.names(crash.daemon.host)
    bridge.works("removed")
