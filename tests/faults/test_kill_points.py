"""SIGKILL before and after every single operation of ADD, DEL, plug and unplug; and of the recovery.

Each point: the daemon dies there, is started again, and then record and kernel agree to the last entry
(tests/faults/audit.py), what was asked for is there or not but never half, and the transfers through other
ports did not stop. The start after one point is armed for the next: a recovery passes no place of
the first attempt, its places begin with ``recover-``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from portwright.model.port import Limits, PortMapping, PortState
from tests.faults.cni import Cni, published
from tests.faults.conftest import Crash
from tests.faults.points import answered, around, empty, ids, killed_at, recoveries, steps_of, works
from tests.fix_daemon import Daemon
from tests.fix_netns import NetnsFactory, TestNetns

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(900)]

Figures = Callable[..., None]
FULL = published(8080)
MAPPINGS = (PortMapping(host_port=9090, container_port=80),)
LIMITS = Limits(egress_rate=80_000_000, ingress_rate=80_000_000)


def _add_points(crash: Crash, cni: Cni, ns: TestNetns, attach: str) -> tuple[list[str], list[str]]:
    """(places of an ADD, places of its DEL), of one that is made and deleted to see them."""
    assert cni.add("probe", ns, FULL).ok
    assert cni.delete("probe", ns).ok
    add, delete = steps_of(crash, "add"), steps_of(crash, "del")
    if attach == "tcx":  # all but these steps are the same as with clsact
        chosen = [i for i, step in enumerate(add) if step in ("AttachProgram", "PutTargets")]
        gone = [i for i, step in enumerate(delete) if step in ("DetachProgram", "DeleteLink")]
        return around("add", chosen), around("del", gone)
    return (
        ["add:intent", *around("add", range(len(add)))],
        ["del:intent", *around("del", range(len(delete))), "del:commit"],
    )


def test_killed_around_every_operation_of_add(
    crash: Crash, cni: Cni, netns_factory: NetnsFactory, figures: Figures, attach: str
) -> None:
    """An ADD that was cut leaves nothing, in the host, in the sandbox or on record; the next one works."""
    crash.env["PORTWRIGHT_ATTACH"] = attach
    crash.arm("")
    ns, before = netns_factory(), ids(crash)
    places, _ = _add_points(crash, cni, ns, attach)
    for place in killed_at(crash, places, lambda: cni.add("box", ns, FULL).ok):
        assert ids(crash) == before, place
        assert empty(ns), place
        crash.clean(place)
        assert cni.delete("box", ns).ok  # as a runtime does after a failed ADD
    assert cni.add("box", ns, FULL).ok
    assert works(ns)
    crash.clean("the ADD at the end")
    assert cni.delete("box", ns).ok
    figures(kill_points=crash.points, witness=crash.witness.sentence())


def test_killed_around_every_operation_of_del(
    crash: Crash, cni: Cni, netns_factory: NetnsFactory, figures: Figures, attach: str
) -> None:
    """A DEL that was cut is finished by the next start; the runtime's second DEL succeeds too."""
    crash.env["PORTWRIGHT_ATTACH"] = attach
    crash.arm("")
    ns, before = netns_factory(), ids(crash)
    _, places = _add_points(crash, cni, ns, attach)

    def deleted() -> bool:
        assert cni.add("box", ns, FULL).ok
        return cni.delete("box", ns).ok

    for place in killed_at(crash, places, deleted):
        assert ids(crash) == before, place
        assert empty(ns), place
        crash.clean(place)
        assert cni.delete("box", ns).ok
    figures(kill_points=crash.points, witness=crash.witness.sentence())


def test_killed_between_commit_and_answer_of_add(
    crash: Crash, cni: Cni, netns_factory: NetnsFactory, figures: Figures
) -> None:
    """Killed after the commit, before the answer: the port is there and works; the runtime's DEL ends it."""
    ns, before = netns_factory(), ids(crash)
    crash.arm("add:commit")
    assert not cni.add("box", ns, FULL).ok
    crash.died("add:commit")
    crash.arm("")
    assert len(ids(crash) - before) == 1
    crash.clean("add:commit")
    assert works(ns)
    assert not cni.add("box", ns, FULL).ok  # duplicate allocation is not allowed
    assert cni.delete("box", ns).ok
    assert ids(crash) == before
    crash.clean("DEL")
    figures(kill_points=crash.points, witness=crash.witness.sentence())


def test_killed_while_a_failed_add_is_taken_back(
    crash: Crash, cni: Cni, netns_factory: NetnsFactory, figures: Figures
) -> None:
    """An ADD whose last operation fails is taken back; killed around every step of that, nothing is left."""
    ns, before = netns_factory(), ids(crash)
    add, _ = _add_points(crash, cni, ns, "clsact")
    operations = [s for s in steps_of(crash, "add") if s not in ("AddRoute", "AddNeighbour", "AddAddress")]
    undone = [
        s for s in operations if s in ("CreateVeth", "PutPort", "AttachProgram", "PutTargets", "PublishPorts")
    ]
    deleted = len(steps_of(crash, "del"))
    places = [*around("undo-add", range(len(undone))), *around("abandon", range(deleted))]

    def added() -> bool:
        _occupy(crash.daemon)  # so that PublishPorts is refused by the kernel
        return cni.add("box", ns, FULL).ok

    for place in killed_at(crash, places, added):
        assert ids(crash) == before, place
        assert empty(ns), place
        crash.clean(place)  # the stray element is gone as well: no record accounts for it
    _occupy(crash.daemon)
    assert cni.add("box", ns, FULL).answer["code"] > 0
    assert ids(crash) == before
    assert empty(ns)
    assert len(add) > len(undone)
    figures(kill_points=crash.points, witness=crash.witness.sentence())


def _occupy(daemon: Daemon) -> None:
    from tests.faults.audit import table

    element = "any4 { tcp . 8080 : 10.99.99.99 . 99 }"
    daemon.host.run(["nft", "add", "element", "inet", table(daemon), *element.split()])


def test_killed_around_every_operation_of_plug(
    crash: Crash, netns_factory: NetnsFactory, figures: Figures
) -> None:
    """A plug that was cut ends detached, with the port's counters and addresses, and can be plugged again."""
    ns = netns_factory()
    port_id, addresses = _plugged(crash, ns)
    with crash.daemon.client() as client:
        client.port_unplug(port_id)
        client.port_plug(port_id, ns.path)
        assert works(ns)
        client.port_unplug(port_id)
    places = ["plug:intent", *around("plug", range(len(steps_of(crash, "plug"))))]

    def plugged() -> bool:
        return answered(crash, lambda client: client.port_plug(port_id, ns.path))

    for place in killed_at(crash, places, plugged, then="plug:commit"):
        _stands(crash, port_id, PortState.DETACHED, addresses, place)
        assert empty(ns), place
        crash.clean(place)
    assert not plugged()
    crash.died("plug:commit")
    crash.arm("")
    _stands(crash, port_id, PortState.ATTACHED, addresses, "plug:commit")
    assert works(ns)
    crash.clean("plug:commit")
    figures(kill_points=crash.points, witness=crash.witness.sentence())


def test_killed_around_every_operation_of_unplug(
    crash: Crash, netns_factory: NetnsFactory, figures: Figures
) -> None:
    """An unplug that was cut is finished: the port is detached, keeps what it has, and can be plugged."""
    ns = netns_factory()
    port_id, addresses = _plugged(crash, ns)
    with crash.daemon.client() as client:
        client.port_unplug(port_id)
        client.port_plug(port_id, ns.path)
    places = ["unplug:intent", *around("unplug", range(len(steps_of(crash, "unplug")))), "unplug:commit"]

    def unplugged() -> bool:
        return answered(crash, lambda client: client.port_unplug(port_id))

    for place in killed_at(crash, places, unplugged):
        _stands(crash, port_id, PortState.DETACHED, addresses, place)
        assert empty(ns), place
        crash.clean(place)
        with crash.daemon.client() as client:
            client.port_plug(port_id, ns.path)
        assert works(ns), place
    figures(kill_points=crash.points, witness=crash.witness.sentence())


def _plugged(crash: Crash, ns: TestNetns) -> tuple[str, list[str]]:
    with crash.daemon.client() as client:
        made = client.port_create("witness", ns.path, name=ns.name, port_mappings=MAPPINGS, limits=LIMITS)
    assert works(ns)
    return made.port_id, [a.address for a in made.addresses]


def _stands(crash: Crash, port_id: str, state: PortState, addresses: list[str], place: str) -> None:
    with crash.daemon.client() as client:
        port = client.port_show(port_id)
        carried = client.stats(port_id)[0].from_port.total.packets
    assert (port.state, [a.address for a in port.addresses]) == (state, addresses), place
    assert carried > 0, f"{place}: the counters are lost"


@pytest.mark.parametrize("verb", ["add", "del"])
def test_killed_around_every_operation_of_a_recovery(
    crash: Crash, cni: Cni, netns_factory: NetnsFactory, figures: Figures, verb: str
) -> None:
    """A recovery that is itself killed, before and after each of its operations, is finished by the last."""
    ns, before = netns_factory(), ids(crash)
    add, _ = _add_points(crash, cni, ns, "clsact")
    crash.arm(add[-1] if verb == "add" else "del:intent")
    assert cni.add("box", ns, FULL).ok == (verb == "del")
    if verb == "del":
        assert not cni.delete("box", ns).ok
    crash.died(verb)
    steps = len(steps_of(crash, "del"))
    recoveries(crash, verb, ["del:intent", *around("del", range(steps)), "del:commit"])
    assert ids(crash) == before
    assert empty(ns)
    figures(kill_points=crash.points, witness=crash.witness.sentence())


def test_killed_in_the_recovery_of_a_plug(
    crash: Crash, netns_factory: NetnsFactory, figures: Figures
) -> None:
    """The same for a plug that was cut: in the end the port is detached and can be plugged."""
    ns = netns_factory()
    port_id, addresses = _plugged(crash, ns)
    with crash.daemon.client() as client:
        client.port_unplug(port_id)
    steps = len(steps_of(crash, "unplug"))
    crash.arm("plug:7:after")
    assert not answered(crash, lambda client: client.port_plug(port_id, ns.path))
    crash.died("plug:7:after")
    recoveries(crash, "plug", [*around("unplug", range(steps)), "unplug:commit"])
    _stands(crash, port_id, PortState.DETACHED, addresses, "recovery")
    with crash.daemon.client() as client:
        client.port_plug(port_id, ns.path)
    assert works(ns)
    crash.clean("plug")
    figures(kill_points=crash.points, witness=crash.witness.sentence())


def test_killed_while_a_spooled_del_is_replayed(
    crash: Crash, cni: Cni, netns_factory: NetnsFactory, figures: Figures
) -> None:
    """A spooled DEL is carried out once, wherever its replay is cut, and never meets a later ADD."""
    ns, before = netns_factory(), ids(crash)
    _, places = _add_points(crash, cni, ns, "clsact")
    for place in (*places[::3], "del:commit", "replay:done"):
        assert cni.add("box", ns, FULL).ok
        crash.daemon.kill()
        assert cni.delete("box", ns).ok
        crash.dies_starting(place)
        crash.arm("")
        assert ids(crash) == before, place
        assert empty(ns), place
        crash.clean(place)
    figures(kill_points=crash.points, witness=crash.witness.sentence())


def test_killed_in_a_del_with_a_foreign_ipam(
    crash: Crash, cni: Cni, netns_factory: NetnsFactory, figures: Figures, tmp_path: Path
) -> None:
    """A DEL that was cut around the delegated plugin is finished by the next start: the device, the record
    and the plugin's own reservation are gone."""
    cni.conf["cniVersion"] = "1.0.0"  # the newest that Debian's host-local knows
    cni.conf["ipam"] = {
        "type": "host-local",
        "dataDir": str(tmp_path),
        "ranges": [[{"subnet": "10.68.0.0/24"}]],
    }
    ns, before = netns_factory(), ids(crash)
    assert cni.add("box", ns, FULL).ok
    assert cni.delete("box", ns).ok
    steps = len(steps_of(crash, "del"))
    places = [*around("clear", range(steps)), "del:intent", "del:commit"]
    for place in places:
        crash.arm(place)
        assert cni.add("box", ns, FULL).ok
        assert len(list(tmp_path.glob("*/10.68.0.*"))) == 1
        assert not cni.delete("box", ns).ok
        crash.died(place)
        crash.arm("")  # not armed for the next: the rest of the DEL passes the same places, at the start
        assert ids(crash) == before, place
        assert empty(ns), place
        assert list(tmp_path.glob("*/10.68.0.*")) == [], place
        crash.clean(place)
    figures(kill_points=crash.points, witness=crash.witness.sentence())
