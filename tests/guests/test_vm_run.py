"""``portwright vm run`` with a real daemon: a guest on a port in one command, and nothing afterwards."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.deadline import wait_readable, wait_until
from tests.fix_daemon import Daemon, SandboxFactory
from tests.fix_netns import TestNetns
from tests.guests.conftest import Image, RunFactory, booted, cookie_of, gone, no_port
from tests.guests.terminal import guest_on_terminal

pytestmark = [pytest.mark.guests, pytest.mark.slow, pytest.mark.timeout(300)]


def test_guest_on_a_port(
    daemon: Daemon, host: TestNetns, sandboxes: SandboxFactory, vm_run: RunFactory, console: Path
) -> None:
    """A guest is reached on its port's addresses by the host and by another sandbox, reaches the world, is
    counted and held to its addresses; SIGTERM shuts it down in order, and port and namespace are gone."""
    other = sandboxes()
    run = vm_run("--name", "g1", "--append", "portwright.httpd=80", "--label", "app=web", "--label", "tier=1")
    cookie = cookie_of(run)
    (nic,) = run.facts["nics"]
    with daemon.client() as client:
        port = client.port_show("g1")
    assert (nic["port_id"], nic["tap"], nic["mac"]) == (port.port_id, port.tap, port.mac)
    assert run.addresses() == [a.address for a in port.addresses]
    assert port.labels == {"app": "web", "tier": "1"}
    assert {":" in address for address in run.addresses()} == {True, False}

    booted(console)
    for address in run.addresses():
        assert host.run(["ping", "-n", "-c1", "-W5", address], check=False).returncode == 0, address
        assert other.ping(address), address
        url = f"http://[{address}]/" if ":" in address else f"http://{address}/"
        assert other.run(["curl", "-s", "--max-time", "5", url]).stdout == "g1\n"
    with daemon.client() as client:
        (carried,) = client.stats("g1")
    assert carried.from_port.total.packets > 0
    assert carried.to_port.total.packets > 0

    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(60) == 0, run.errors()
    assert run.errors() == ""
    assert "portwright: power button" in console.read_text()
    wait_until(partial(gone, daemon, cookie), 10, "the port and the namespace to be gone")


def test_killed_vm_run_leaves_nothing(daemon: Daemon, sandboxes: SandboxFactory, vm_run: RunFactory) -> None:
    """SIGKILL of ``vm run`` ends QEMU, and the port and the namespace go too; others' ports stay."""
    other = sandboxes()
    run = vm_run("--name", "g1")
    cookie = cookie_of(run)
    assert not no_port(daemon)

    run.process.kill()
    run.process.wait()
    wait_readable(run.qemu, 10, "QEMU's end")
    wait_until(partial(gone, daemon, cookie), 10, "the port and the namespace to be gone")
    with daemon.client() as client:
        assert [port.port_id for port in client.port_list()] == [other.port.port_id]


def test_guest_survives_the_daemon(
    daemon: Daemon, host: TestNetns, sandboxes: SandboxFactory, vm_run: RunFactory, console: Path
) -> None:
    """SIGKILL of the daemon neither ends a guest nor its traffic; the next daemon finds its port in order."""
    other = sandboxes()
    run = vm_run("--name", "g1")
    booted(console)
    daemon.kill()
    assert all(other.ping(address) for address in run.addresses())

    daemon.start()
    assert all(other.ping(address) for address in run.addresses())
    with daemon.client() as client:
        assert client.port_show("g1").state == "attached"
        assert client.node_status().problems == ()

    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(60) == 0, run.errors()
    assert no_port(daemon)


def test_deaf_guest_is_ended(daemon: Daemon, sandboxes: SandboxFactory, vm_run: RunFactory) -> None:
    """A guest that doesn't hear the power button is ended when the patience is, and that is said."""
    sandboxes()
    run = vm_run("--name", "g1", "--patience", "0.1", "--append", "rdinit=/bin/busybox")
    run.process.send_signal(signal.SIGTERM)

    assert run.process.wait(30) == 0
    assert run.errors() == "portwright: guest 'g1': the guest did not shut down in time and was ended\n"
    assert no_port(daemon)


def test_killed_qemu_ends_vm_run(daemon: Daemon, sandboxes: SandboxFactory, vm_run: RunFactory) -> None:
    """When QEMU is killed, ``vm run`` says so in one line, fails, and takes the port away."""
    sandboxes()
    run = vm_run("--name", "g1")
    os.kill(run.facts["pid"], signal.SIGKILL)

    assert run.process.wait(30) == 1
    assert run.errors() == "portwright: guest 'g1': QEMU was killed by SIGKILL\n"
    assert no_port(daemon)


def test_link_follows_the_port(
    daemon: Daemon, sandboxes: SandboxFactory, vm_run: RunFactory, console: Path
) -> None:
    """The guest sees the port's link go and come back; a port that is deleted leaves a guest without a link
    and QEMU without the tap, and still both end in order."""
    sandboxes()
    # What the guest says of its link whenever it is not what it was.
    run = vm_run("--name", "g1", "--append", "portwright.watch=eth0")
    booted(console)

    def says(words: str, times: int) -> None:
        wait_until(lambda: console.read_text().count(words) == times, 30, f"{times} of {words!r}")

    says("eth0 has a carrier", 1)
    with daemon.client() as client:
        client.port_set("g1", admin="down")
        says("eth0 has no carrier", 1)
        client.port_set("g1", admin="up")
        says("eth0 has a carrier", 2)
        client.port_delete("g1")
    says("eth0 has no carrier", 2)
    held = Path(f"/proc/{run.facts['pid']}/fd")
    wait_until(lambda: "/dev/net/tun" not in [str(fd.readlink()) for fd in held.iterdir()], 10, "the tap")

    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(60) == 0, run.errors()


def test_console_on_a_terminal(
    daemon: Daemon, host: TestNetns, sandboxes: SandboxFactory, image: Image
) -> None:
    """With ``--console -`` one types to the guest, ^C too; ^A x ends it, and the terminal is as before."""
    sandboxes()
    with guest_on_terminal(daemon, host, image) as terminal:
        terminal.says(b"g1  pid ")
        terminal.says(b"/ # ")
        terminal.type(b"sh -c 'echo $((1+1)); sleep 1000'\r")
        terminal.says(b"\n2\r")
        terminal.type(b"\x03")
        terminal.says(b"/ # ")
        terminal.type(b"echo $((6*7))\r")
        terminal.says(b"\n42")


def test_two_networks(daemon: Daemon, sandboxes: SandboxFactory, vm_run: RunFactory, console: Path) -> None:
    """A guest on two networks has a NIC and a port on each, and answers on both from their neighbours."""
    first, second = sandboxes(), sandboxes("n2")
    run = vm_run("--name", "g1", "--network", "n2")

    names = [(nic["ifname"], nic["network"]) for nic in run.facts["nics"]]
    assert names == [("eth0", "n1"), ("eth1", "n2")]
    booted(console)
    for index, neighbour in enumerate((first, second)):
        for address in run.facts["nics"][index]["addresses"]:
            assert neighbour.ping(address), address
    assert "failed" not in console.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kernel", "/etc/hostname"], "guest 'g1': QEMU did not start it: "),
        (["--kernel", "/nonexistent"], "file '/nonexistent' does not exist"),
        (["--memory", "1"], "memory: 64 to 1048576 MiB (got 1)"),
        (["--network", "none"], "network 'none' does not exist"),
    ],
)
def test_failed_start_is_one_error(
    daemon: Daemon, sandboxes: SandboxFactory, image: Image, options: list[str], said: str
) -> None:
    """What can't start ends with one line that says why, status 1, and no port."""
    sandboxes()
    done = daemon.cli(
        *("vm", "run", "--name", "g1", "--network", "n1", "--accel", "tcg"),
        *("--kernel", str(image.kernel), "--initramfs", str(image.initramfs), *options),
        check=False,
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"portwright: {said}"), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert no_port(daemon)


def test_several_queues(daemon: Daemon, sandboxes: SandboxFactory, vm_run: RunFactory, console: Path) -> None:
    """With as many CPUs the guest's driver uses all of the tap's queues, and is reached."""
    other = sandboxes()
    run = vm_run("--queues", "2", "--cpus", "2")
    booted(console)
    for address in run.addresses():
        assert other.ping(address)
    with daemon.client() as client:
        (port,) = [port for port in client.port_list() if port.model == "tcfilter"]
    fds = Path(f"/proc/{run.facts['pid']}/fdinfo").iterdir()
    taps = [fd for fd in fds if f"iff:\t{port.tap}\n" in fd.read_text()]
    assert (port.queues, len(taps), port.join) == (2, 2, "peer")
    assert "queues 2" in console.read_text()
