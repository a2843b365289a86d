"""A guest under QEMU on a port of each model: both families, HTTP, TCP both ways, jumbo frames, queues."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from portwright.vmm import vhost
from tests.deadline import wait_readable, wait_until
from tests.fix_daemon import Daemon, Sandbox, SandboxFactory, make_world
from tests.fix_netns import NetnsFactory, TestNetns
from tests.guests.conftest import Run, RunFactory, booted, cookie_of, gone
from tests.guests.disk import build

pytestmark = [
    pytest.mark.guests,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.parametrize("model", ["tcfilter", "macvtap", "tap"]),
]

JUMBO = 9000


@pytest.fixture
def host(netns_factory: NetnsFactory, world: TestNetns) -> TestNetns:
    """As fix_daemon's, with an uplink whose MTU is that of its networks."""
    made = netns_factory()
    make_world(made, world, mtu=JUMBO)
    return made


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root image whose init serves HTTP and iperf3."""
    return build(tmp_path_factory.mktemp("disk"))


def test_a_guest_on_each_model(
    daemon: Daemon,
    host: TestNetns,
    sandboxes: SandboxFactory,
    vm_run: RunFactory,
    console: Path,
    disk: Path,
    model: str,
    record_property: Callable[[str, object], None],
) -> None:
    """The guest and a container reach each other, and the host the guest, in both families; it serves HTTP;
    TCP runs both ways; frames of 9,000 bytes pass unfragmented; both queues are open, and the guest's."""
    other = sandboxes()
    run = vm_run("--model", model, "--queues", "2", "--cpus", "2", "--root", str(disk), "--name", "g1")
    assert (run.facts["model"], run.facts["vhost"]) == (model, not vhost.lacking())
    assert len(_taps(run, model)) == 2
    booted(console)

    for address in run.addresses():
        assert other.ping(address, count=3), address
        assert host.run(["ping", "-n", "-c1", "-W5", address], check=False).returncode == 0, address
        url = f"http://[{address}]/" if ":" in address else f"http://{address}/"
        assert other.run(["curl", "-s", "--max-time", "10", url]).stdout == "from the guest\n"
        payload = JUMBO - (48 if ":" in address else 28)
        whole = ["ping", "-n", "-c1", "-W5", "-M", "do", "-s", str(payload), address]
        assert other.run(whole, check=False).returncode == 0, whole
        figures = {way: _iperf3(other, address, *options) for way, options in _WAYS.items()}
        family = 6 if ":" in address else 4
        for way, gigabits in figures.items():
            record_property(f"{model} IPv{family} {way} Gb/s", f"{gigabits:.3f}")
            assert gigabits > 0.001
    assert "queues 2" in console.read_text()
    assert "failed" not in console.read_text()
    with daemon.client() as client:
        (carried,) = client.stats("g1")
        assert client.node_status().problems == ()
    assert carried.from_port.total.packets > 100
    assert carried.to_port.total.packets > 100
    assert carried.drops.from_port == 0


def test_a_plugged_card_a_link_and_the_end_on_each_model(
    daemon: Daemon, sandboxes: SandboxFactory, vm_run: RunFactory, console: Path, model: str
) -> None:
    """A second NIC is plugged, reached and unplugged. The guest sees its port's link go and come back, and is
    reached again. A port that is deleted leaves QEMU without its descriptor; SIGKILL of ``vm run`` then
    leaves nothing."""
    other, second = sandboxes(), sandboxes("n2")
    run = vm_run("--model", model, "--append", "portwright.watch=eth0", "--name", "g1")
    cookie = cookie_of(run)
    booted(console)
    assert all(other.ping(address) for address in run.addresses())
    plugged = json.loads(daemon.cli("vm", "plug", "g1", "--network", "n2", "--json").stdout)
    assert len(_taps(run, model)) == 2
    for address in plugged["addresses"]:
        wait_until(partial(second.ping, address), 30, f"the plugged NIC to answer at {address}")
    daemon.cli("vm", "unplug", "g1", plugged["ifname"])
    assert len(_taps(run, model)) == 1

    def says(words: str, times: int) -> None:
        wait_until(lambda: console.read_text().count(words) == times, 30, f"{times} of {words!r}")

    says("eth0 has a carrier", 1)
    with daemon.client() as client:
        client.port_set("g1", admin="down")
        says("eth0 has no carrier", 1)
        client.port_set("g1", admin="up")
        says("eth0 has a carrier", 2)
        for address in run.addresses():
            wait_until(partial(other.ping, address), 10, f"{address} to be reached again")
        client.port_delete("g1")
    says("eth0 has no carrier", 2)
    wait_until(lambda: not _taps(run, model), 10, "QEMU to let go of it")

    run.process.kill()
    run.process.wait()
    wait_readable(run.qemu, 10, "QEMU's end")
    wait_until(partial(gone, daemon, cookie), 10, "the port and the namespace to be gone")


def test_killed_with_its_port_on_each_model(
    daemon: Daemon, host: TestNetns, sandboxes: SandboxFactory, vm_run: RunFactory, model: str
) -> None:
    """SIGKILL of ``vm run`` ends QEMU, and port, namespace and the host's end go too."""
    sandboxes()
    before = _links(host)
    run = vm_run("--model", model, "--name", "g1")
    cookie = cookie_of(run)
    assert run.facts["nics"][0]["rep"] in _links(host)

    run.process.kill()
    run.process.wait()
    wait_readable(run.qemu, 10, "QEMU's end")
    wait_until(partial(gone, daemon, cookie), 10, "the port and the namespace to be gone")
    assert _links(host) == before


#: Of iperf3 on the container's side: it sends, or the guest does.
_WAYS: dict[str, tuple[str, ...]] = {"to the guest": (), "from the guest": ("-R",)}


def _iperf3(near: Sandbox, address: str, *options: str) -> float:
    """Gigabits a second that arrived."""
    said: dict[str, Any] = {}

    def done() -> bool:
        """Its server listens anew for each run, and resets who comes a moment before that."""
        ran = near.run(["iperf3", "-c", address, "-t", "1", "-J", *options], timeout=60, check=False)
        said.update(json.loads(ran.stdout))
        return "sum_received" in said["end"]

    wait_until(done, 20, "iperf3's server to be there")
    return float(said["end"]["sum_received"]["bits_per_second"]) / 1e9


def _taps(run: Run, model: str) -> list[str]:
    """The descriptors of QEMU's that are queues of the NIC."""
    found = []
    for fd in Path(f"/proc/{run.facts['pid']}/fd").iterdir():
        try:
            device = fd.stat()
        except FileNotFoundError:
            continue
        if str(fd.readlink()) == ("/tap" if model == "macvtap" else "/dev/net/tun"):
            found.append(f"{device.st_rdev:x}")
    return found


def _links(ns: TestNetns) -> set[str]:
    return {link["ifname"] for link in json.loads(ns.run(["ip", "-j", "link", "show"]).stdout)}
