"""Two daemons in one host namespace, and one daemon with ports in two: each cleans up only its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.audit import Record, audit, pins, remains, tables
from tests.faults.cni import Cni, published
from tests.fix_daemon import WORLD4, WORLD6, Daemon, make_world, started
from tests.fix_netns import NetnsFactory, TestNetns

pytestmark = pytest.mark.netns


@pytest.fixture
def second(host: TestNetns) -> Iterator[Daemon]:
    """Another daemon in the same host namespace."""
    with started(host) as made:
        yield made


def reaches_world(box: TestNetns) -> bool:
    """In both families, masqueraded."""
    return all(
        box.run(["ping", "-n", "-c1", "-W2", address], check=False).returncode == 0
        for address in (WORLD4, WORLD6)
    )


def other_ranges(cni: Cni) -> Cni:
    """The same plugin with subnets of its own."""
    cni.conf["ipam"] = {
        "type": "portwright",
        "ranges": [[{"subnet": "10.67.0.0/24"}], [{"subnet": "fd67::/112"}]],
    }
    return cni


def test_two_daemons_clean_only_their_own(
    daemon: Daemon, second: Daemon, netns_factory: NetnsFactory, host: TestNetns
) -> None:
    """Each daemon's ports live through the other's kills, recoveries, deletions and end; the last one to go
    leaves nothing."""
    one, two = Cni(daemon), other_ranges(Cni(second))
    a, b = netns_factory(), netns_factory()
    assert one.add("a", a, published(8080)).ok
    assert two.add("b", b, published(9090)).ok
    both = ((daemon, second), (second, daemon))
    for mine, other in both:
        assert audit(mine, beside=[other]) == []
    assert reaches_world(a)
    assert reaches_world(b)

    for mine, other in both:
        mine.kill()
        mine.start(PORTWRIGHT_DIE_AT="add:12:after")
        cut = netns_factory()
        assert not (one if mine is daemon else two).add("cut", cut).ok
        assert mine.wait() == -9
        mine.start()
        assert audit(mine, beside=[other]) == []
        assert audit(other, beside=[mine]) == []
        assert reaches_world(a)
        assert reaches_world(b)

    assert one.delete("a", a).ok
    daemon.stop()
    assert reaches_world(b), "the first one's end took something of the second's"
    assert audit(second) == []
    assert len([t for t in tables(host) if t.startswith("portwright")]) == 1
    # The first one had found forwarding off; the second needs it, so it stays on the first one's record.
    assert {kind for kind, _ in Record(daemon.state_dir).owned} == {"sysctl"}
    assert two.delete("b", b).ok
    second.stop()
    daemon.start()
    daemon.stop()
    assert remains(daemon) == []
    assert remains(second) == []


def test_a_namespace_of_its_caller_is_left_clean(
    daemon: Daemon, netns_factory: NetnsFactory, world: TestNetns
) -> None:
    """Ports of a caller in another namespace: a daemon killed around the last DEL there, or before the first
    ADD, leaves neither table, sysctl nor pins in it."""
    cni = Cni(daemon)
    elsewhere, box = netns_factory(), netns_factory()
    make_world(elsewhere, netns_factory())
    assert cni.add("keep", netns_factory()).ok
    for place in (
        "add:intent",
        "add:5:after",
        "del:3:after",
        "del:commit",
        "close:table",
        "close:sysctl",
        "close:pins",
    ):
        daemon.kill()
        daemon.start(PORTWRIGHT_DIE_AT=place)
        if cni.add("box", box, host=elsewhere).ok:
            assert audit(daemon, hosts=[elsewhere]) == []
            assert reaches_world(box)
            assert not cni.delete("box", box, host=elsewhere).ok
        assert daemon.wait() == -9, place
        daemon.start()
        assert audit(daemon, hosts=[elsewhere]) == [], place
        assert tables(elsewhere) == [], place
        assert len([p for p in pins(daemon).iterdir() if p.is_dir()]) == 1, place
        with elsewhere.entered():
            assert Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "0", place
        assert cni.delete("box", box, host=elsewhere).ok


def test_a_callers_namespace_that_is_gone_is_forgotten(daemon: Daemon, netns_factory: NetnsFactory) -> None:
    """A representor's namespace ended while the daemon was down: what it had kept goes, DEL works."""
    cni = Cni(daemon)
    elsewhere, box = netns_factory(), netns_factory()
    make_world(elsewhere, netns_factory())
    assert cni.add("box", box, host=elsewhere).ok
    daemon.kill()
    elsewhere.close()
    daemon.start()
    assert cni.delete("box", box).ok
    daemon.kill()
    daemon.start()
    assert audit(daemon) == []
    assert len([p for p in pins(daemon).iterdir() if p.is_dir()]) == 1
    daemon.stop()
    assert remains(daemon) == []
