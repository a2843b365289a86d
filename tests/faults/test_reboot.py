"""A reboot (case 50): the record survives, namespaces, devices, pins and sysctls do not.

It is staged: the daemon runs in a mount namespace of its own, in which /proc/sys/kernel/random/boot_id is
another file and the bpffs is nobody else's. Killing it and taking its namespaces and run directory away
leaves what a power cut leaves; the next start reads another boot id.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from portwright.dataplane import values
from portwright.kernel.bpf import Map
from portwright.model.port import PortState
from tests.deadline import wait_until
from tests.faults.audit import FORWARDING, Record, audit, remains
from tests.faults.cni import Cni, published
from tests.fix_daemon import PORTWRIGHT, Daemon, make_world
from tests.fix_netns import NetnsFactory, TestNetns

pytestmark = pytest.mark.netns

_AS_BOOT = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'


class Machine(Daemon):
    """A daemon that can be rebooted."""

    def __init__(self, base: Path, new: NetnsFactory) -> None:
        super().__init__(new(), base)
        self._new = new
        self._boot_id = base / "boot_id"
        self._world = new()
        self._boot()

    def _boot(self) -> None:
        self._boot_id.write_text(f"{uuid.uuid4()}\n")
        make_world(self.host, self._world)

    def launch(self, **extra: str) -> None:
        """Start the process in a mount namespace of its own."""
        inside = ["sh", "-c", _AS_BOOT, str(self._boot_id), str(PORTWRIGHT), "node", "run"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["nsenter", f"--net={self.host.path}", "--", "unshare", "--mount", *inside],
                env={**self.env, **extra},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def reboot(self, *sandboxes: TestNetns) -> None:
        """Power off: all namespaces and the run directory go; and on again, with the daemon not started."""
        self.kill()
        for ns in (self.host, self._world, *sandboxes):
            ns.close()
        shutil.rmtree(self.run_dir)
        self.host, self._world = self._new(), self._new()
        self._boot()


@pytest.fixture
def machine(netns_factory: NetnsFactory) -> Iterator[Machine]:
    """A started one."""
    made = Machine(Path(tempfile.mkdtemp(prefix=f"pwt-{os.getpid()}-")), netns_factory)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("way", ["GC", "DEL"])
def test_case_50_ports_of_an_earlier_boot_are_detached_and_freed(
    machine: Machine, netns_factory: NetnsFactory, way: str
) -> None:
    """After a reboot ports are detached; GC with an empty list, or DEL of each, frees every address and host
    port; before that no address of theirs is given to another."""
    cni = Cni(machine)
    boxes = [netns_factory() for _ in range(3)]
    given: set[str] = set()
    for number, box in enumerate(boxes):
        outcome = cni.add(box.name, box, published(8080 + 10 * number))
        assert outcome.ok
        given |= set(outcome.addresses)
    machine.reboot(*boxes)
    machine.start()

    assert {p.state for p in Record(machine.state_dir).ports} == {PortState.DETACHED}
    assert audit(machine) == []
    late = netns_factory()
    added = cni.add("late", late)
    assert added.ok
    assert not given & set(added.addresses)
    assert audit(machine) == []
    taken = cni.add("taken", netns_factory(), published(8080))
    assert "held by port" in str(taken.answer), "a host port was given while its owner is on record"

    if way == "GC":
        valid = [{"containerID": "late", "ifname": "eth0"}]
        cni.conf["cni.dev/valid-attachments"] = valid
        assert cni.run("GC").ok
        del cni.conf["cni.dev/valid-attachments"]
    else:
        for box in boxes:
            assert cni.delete(box.name, box).ok
    assert {p.owner.container_id for p in Record(machine.state_dir).ports} == {"late"}
    assert audit(machine) == []
    again = cni.add("taken", boxes_new := netns_factory(), published(8080))
    assert again.ok
    assert boxes_new.run(["ping", "-n", "-c1", "-W2", late_address(added.addresses)])
    assert audit(machine) == []


def late_address(addresses: list[str]) -> str:
    """The IPv4 one."""
    return next(a for a in addresses if ":" not in a)


def test_a_detached_port_of_an_earlier_boot_can_be_plugged(
    machine: Machine, netns_factory: NetnsFactory
) -> None:
    """After a reboot a port that was made by hand gets a device in a new sandbox, with its old address."""
    box = netns_factory()
    with machine.client() as client:
        client.network_create("n1", subnets=["10.70.0.0/24"])
        before = client.port_create("n1", box.path, name="keeper")
    machine.reboot(box)
    machine.start()
    fresh, other = netns_factory(), netns_factory()
    with machine.client() as client:
        after = client.port_plug("keeper", fresh.path)
        peer = client.port_create("n1", other.path, name="peer")
    assert after.addresses == before.addresses
    fresh.run(["ping", "-n", "-c1", "-W2", peer.addresses[0].address])
    assert audit(machine) == []


def test_sysctls_of_an_earlier_boot_are_not_put_back(machine: Machine, netns_factory: NetnsFactory) -> None:
    """Forwarding that the administrator set after a reboot stays, though an earlier boot had to set it."""
    cni = Cni(machine)
    box = netns_factory()
    assert cni.add("box", box).ok
    machine.reboot(box)
    with machine.host.entered():
        for path in FORWARDING:
            Path("/proc/sys", path).write_text("1")
    machine.start()
    assert cni.delete("box", box).ok
    machine.stop()
    assert remains(machine, forwarding="1") == []


def test_a_sandbox_that_died_with_the_daemon_is_noticed(
    machine: Machine, netns_factory: NetnsFactory
) -> None:
    """Sandboxes that end while no daemon runs: their ports are detached by the next start; DEL frees them."""
    cni = Cni(machine)
    box = netns_factory()
    assert cni.add("box", box, published(8080)).ok
    machine.kill()
    box.close()
    wait_until(
        lambda: "pw" not in machine.host.run(["ip", "-br", "link"]).stdout, 10, "the kernel to end the device"
    )
    machine.start()
    assert [p.state for p in Record(machine.state_dir).ports] == [PortState.DETACHED]
    assert audit(machine) == []
    assert cni.delete("box", box).ok
    assert Record(machine.state_dir).ports == []
    assert audit(machine) == []


def test_a_record_that_was_lost_leaves_no_orphans(
    daemon: Daemon, netns_factory: NetnsFactory, attach: str
) -> None:
    """With the state directory gone, the next start removes what its pinned maps know and no record has:
    devices, programs, entries, counters, published ports; new ports get on with the old addresses."""
    cni = Cni(daemon)
    daemon.kill()
    daemon.start(PORTWRIGHT_ATTACH=attach)
    boxes = [netns_factory() for _ in range(2)]
    for number, box in enumerate(boxes):
        assert cni.add(box.name, box, published(8080 + 10 * number)).ok
    daemon.kill()
    for path in daemon.state_dir.iterdir():
        path.unlink()
    daemon.start()
    assert Record(daemon.state_dir).ports == []
    assert audit(daemon) == []
    for box in boxes:
        assert cni.add(box.name, box, published(8080)).ok
        assert audit(daemon) == []
        assert cni.delete(box.name, box).ok
    assert audit(daemon) == []


def test_what_others_took_from_a_port_is_put_back(
    daemon: Daemon, netns_factory: NetnsFactory, attach: str
) -> None:
    """A start gives a port back its programs, map entries, routes and published ports, whatever took them."""
    cni = Cni(daemon)
    daemon.kill()
    daemon.start(PORTWRIGHT_ATTACH=attach)
    box, peer = netns_factory(), netns_factory()
    assert cni.add("box", box, published(8080)).ok
    assert cni.add("peer", peer).ok
    (port,) = (p for p in Record(daemon.state_dir).ports if p.owner.container_id == "box")
    daemon.kill()
    daemon.host.run(["nft", "flush", "ruleset"])
    if attach == "clsact":
        daemon.host.run(["tc", "qdisc", "del", "dev", port.rep_name, "clsact"])
    for pin in (daemon.run_dir / "bpf").glob(f"*/links/{port.port_id}_*"):
        pin.unlink()
    with contextlib.closing(Map.from_pin(next((daemon.run_dir / "bpf").glob("*/maps/pw_addrs")))) as targets:
        for address in port.addresses:
            targets.delete(values.address(address.address))
    daemon.start()
    assert audit(daemon) == []
    for address in port.addresses:
        peer.run(["ping", "-n", "-c1", "-W2", address.address])
