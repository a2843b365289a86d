"""R1, R13, R14, R15 of docs/semantics.md: what a port is known by, and who may touch its representor."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from portwright.model.port import Port, PortState
from tests.deadline import wait_until
from tests.fix_daemon import WORLD4, WORLD6, Daemon, SandboxFactory
from tests.fix_netns import NetnsFactory
from tests.netns.representor import dropped, ear, inject, link, record, stats, udp

pytestmark = pytest.mark.netns

NO_ADMIN = ("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin")
USER_NAMESPACE = ("unshare", "--user", "--map-root-user")


@pytest.mark.usefixtures("each_attach")
@pytest.mark.parametrize("end", ["its root deletes eth0", "it dies"])
def test_r01_a_port_outlives_its_device(
    daemon: Daemon, sandboxes: SandboxFactory, netns_factory: NetnsFactory, end: str
) -> None:
    """A port whose device the sandbox took away is detached, and keeps its counters and addresses.

    Plugged, it has a new device under the same names and addresses, and its counters go on.
    """
    a, b = sandboxes(), sandboxes()
    assert a.ping(b.ip4, 50)
    before = stats(daemon, a).from_port.total.packets
    home = a.ns
    if end == "it dies":
        home = netns_factory()
        a.ns.close()
    else:
        a.run(["ip", "link", "del", "eth0"])

    wait_until(lambda: record(daemon, a).state is PortState.DETACHED, why="the port to be detached")
    kept = record(daemon, a)
    assert kept.addresses == a.port.addresses
    assert link(daemon.host, a.port.rep_name) == {}
    counted = stats(daemon, a).from_port.total.packets
    assert counted >= before >= 50
    assert not b.ping(a.ip4)

    daemon.cli("port", "plug", a.port.port_id, "--netns", home.path)
    a.ns = home
    assert record(daemon, a).rep_name == a.port.rep_name
    for address in (b.ip4, b.ip6, WORLD4, WORLD6):
        assert a.ping(address), address
    assert b.ping(a.ip4)
    assert b.ping(a.ip6)
    assert stats(daemon, a).from_port.total.packets > counted


@pytest.mark.usefixtures("each_attach")
def test_r13_a_representor_that_was_moved_is_brought_back_and_guarded(
    daemon: Daemon, sandboxes: SandboxFactory, netns_factory: NetnsFactory
) -> None:
    """A representor that host root moved to another namespace comes back with programs, names, routes."""
    a, b = sandboxes(), sandboxes()
    elsewhere, rep = netns_factory(), a.port.rep_name
    daemon.host.run(["ip", "link", "set", rep, "netns", elsewhere.name])

    wait_until(lambda: _alarms(daemon, a.port), why="an alarm")
    assert "brought back" in _alarms(daemon, a.port)
    assert link(elsewhere, rep) == {}
    back = link(daemon.host, rep)
    assert f"port-{a.port.port_id}" in back["altnames"]
    assert back["inet6_addr_gen_mode"] == "none"
    with daemon.client() as client:
        assert client.node_status().ready
    wait_until(lambda: a.ping(b.ip4), why="the way back into the network")
    for address in (b.ip6, WORLD4, WORLD6):
        assert a.ping(address), address
    assert b.ping(a.ip4)
    assert daemon.host.run(["ping", "-c1", "-W1", a.ip6]).returncode == 0
    with ear(b.ns, "eth0") as at_b:
        inject(a.ns, "eth0", udp(a, "10.66.6.6", b.ip4, b"spoofed"), udp(a, a.ip4, b.ip4, b"honest"))
        assert at_b.hear(b"honest")
        assert not at_b.hear(b"spoofed", timeout=0.1)
    assert dropped(daemon, a)["from_port", "src_ip"] == 1


def test_r13_a_representor_that_is_lost_leaves_a_detached_port(
    daemon: Daemon, sandboxes: SandboxFactory, netns_factory: NetnsFactory
) -> None:
    """Moved to a namespace that then died, the representor is gone: alarm, detached, ready to be plugged."""
    a, b = sandboxes(), sandboxes()
    elsewhere = netns_factory()
    assert daemon.process is not None
    os.kill(daemon.process.pid, signal.SIGSTOP)
    try:
        daemon.host.run(["ip", "link", "set", a.port.rep_name, "netns", elsewhere.name])
        elsewhere.close()
        wait_until(lambda: link(a.ns, "eth0") == {}, why="the pair to die with the namespace")
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)

    wait_until(lambda: record(daemon, a).state is PortState.DETACHED, why="the port to be detached")
    assert "can't be found" in _alarms(daemon, a.port)
    daemon.cli("port", "plug", a.port.port_id, "--netns", a.ns.path)
    assert a.ping(b.ip4)


def test_r13_a_representor_that_left_while_no_daemon_ran_counts_as_gone(
    daemon: Daemon, sandboxes: SandboxFactory, netns_factory: NetnsFactory
) -> None:
    """The port is detached; once the old device is deleted inside, it can be plugged there again."""
    a, b = sandboxes(), sandboxes()
    elsewhere = netns_factory()
    daemon.kill()
    daemon.host.run(["ip", "link", "set", a.port.rep_name, "netns", elsewhere.name])
    daemon.start()
    assert record(daemon, a).state is PortState.DETACHED
    a.run(["ip", "link", "del", "eth0"])
    daemon.cli("port", "plug", a.port.port_id, "--netns", a.ns.path)
    assert a.ping(b.ip4)


@pytest.mark.parametrize("prefix", [NO_ADMIN, USER_NAMESPACE], ids=["no capability", "user namespace"])
def test_r14_without_the_capability_nothing_can_be_touched(
    daemon: Daemon, sandboxes: SandboxFactory, prefix: tuple[str, ...]
) -> None:
    """A sandbox without CAP_NET_ADMIN over its namespace can't delete, change or take down its device."""
    a, b = sandboxes(), sandboxes()
    was = link(a.ns, "eth0")
    for words in (
        "del eth0",
        "set eth0 down",
        "set eth0 mtu 1300",
        "set eth0 address 02:00:00:00:00:99",
        "set eth0 netns 1",
    ):
        done = a.run([*prefix, "ip", "link", *words.split()], check=False)
        assert done.returncode != 0, words
        assert "not permitted" in done.stderr, words

    now = link(a.ns, "eth0")
    assert {k: now[k] for k in ("flags", "mtu", "address")} == {
        k: was[k] for k in ("flags", "mtu", "address")
    }
    assert a.ping(b.ip4)


class Owned:
    """A sandbox whose root has every capability over its own network namespace, and none over ours."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [*USER_NAMESPACE, "--net", "--", "sh", "-c", "ip link set lo up; echo up; exec sleep 300"],
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"up\n"

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """As its root."""
        enter = ["nsenter", "--user", "--net", "--preserve-credentials", f"--target={self.process.pid}"]
        return subprocess.run(
            [*enter, "--", *command], check=False, capture_output=True, text=True, timeout=20
        )

    def close(self) -> None:
        """End it, and the namespaces with it."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def owned() -> Iterator[Owned]:
    """A rootless container's namespaces."""
    made = Owned()
    yield made
    made.close()


@pytest.mark.usefixtures("each_attach")
def test_r14_a_hostile_root_breaks_only_its_own_port(
    daemon: Daemon, sandboxes: SandboxFactory, owned: Owned
) -> None:
    """With CAP_NET_ADMIN a sandbox can spoil its own device; the programs, its limits and others stay.

    It can't detach the programs, see or reach the representor, or take its device to the host.
    """
    b, c = sandboxes(), sandboxes()
    with daemon.client() as client:
        port = client.port_create("n1", f"pid:{owned.process.pid}", name="hostile")
    own = port.addresses[0].address
    assert owned.run("ping", "-c1", "-W1", b.ip4).returncode == 0

    for attack in (
        ["ip", "link", "set", "eth0", "netns", "1"],
        ["ip", "link", "set", port.rep_name, "down"],
        ["ip", "link", "del", f"port-{port.port_id}"],
        ["tc", "qdisc", "del", "dev", "eth0", "clsact"],
        ["tc", "filter", "del", "dev", "eth0", "ingress"],
        ["bpftool", "link", "list"],
        ["bpftool", "net", "detach", "xdp", "dev", port.rep_name],
    ):
        assert owned.run(*attack).returncode != 0, attack
    for spoil in (
        ["ip", "link", "set", "eth0", "mtu", "9000"],
        ["ip", "link", "set", "eth0", "address", "02:00:00:00:00:99"],
        ["ip", "addr", "add", f"{c.ip4}/32", "dev", "eth0"],
    ):
        assert owned.run(*spoil).returncode == 0, spoil
    assert owned.run("ping", "-c1", "-W1", b.ip4).returncode != 0  # a stranger's MAC
    assert owned.run("ip", "link", "set", "eth0", "address", port.mac).returncode == 0
    assert owned.run("ping", "-c1", "-W1", "-I", c.ip4, b.ip4).returncode != 0  # another port's address
    assert owned.run("ip", "link", "set", "eth0", "down").returncode == 0

    assert b.ping(c.ip4, 3)
    assert b.ping(WORLD4)
    with daemon.client() as client:
        assert client.node_status().ready
        assert client.port_show("hostile").state is PortState.ATTACHED
        reasons = {d.reason for d in client.drops(port.port_id)}
    assert "src_mac" in reasons
    assert reasons & {"src_ip", "arp_spoof"}  # it asks for its gateway's MAC with the false address first
    assert owned.run("ip", "link", "set", "eth0", "up").returncode == 0
    wait_until(lambda: b.ping(own) or owned.run("ip", "route", "replace", "default", "via", "169.254.1.1",
                                                "dev", "eth0", "onlink", "src", own).returncode)  # fmt: skip
    assert b.ping(own)


def test_r15_a_representor_is_found_by_every_name(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """``pw`` and 8 digits of the port_id; altnames for port and workload; an alias for people."""
    a = sandboxes()
    port = a.port
    assert port.rep_name == f"pw{port.port_id[:8]}"
    assert len(port.rep_name) <= 15
    rep = link(daemon.host, port.rep_name)
    assert rep["ifalias"] == f"{port.network} name/{a.ns.name}"
    workload = next(name for name in rep["altnames"] if name.startswith(a.ns.name))
    for name in (f"port-{port.port_id}", workload):
        assert link(daemon.host, name)["ifindex"] == rep["ifindex"]
    with daemon.client() as client:
        for name in (port.port_id, port.port_id[:8], port.rep_name, a.ns.name):
            assert client.port_show(name).port_id == port.port_id


def test_r15_names_and_workload_survive_a_plug(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """A port's next device has the same names as the one before: scripts go on working."""
    a = sandboxes()
    was = link(daemon.host, a.port.rep_name)
    daemon.cli("port", "unplug", a.port.port_id)
    daemon.cli("port", "plug", a.port.port_id, "--netns", a.ns.path)
    now = link(daemon.host, f"port-{a.port.port_id}")
    assert (now["ifname"], now["altnames"], now["ifalias"]) == (
        was["ifname"],
        was["altnames"],
        was["ifalias"],
    )
    assert now["ifindex"] != was["ifindex"]


def _alarms(daemon: Daemon, port: Port) -> str:
    with daemon.client() as client:
        return " ".join(a for a in client.node_status().alarms if port.port_id in a)
