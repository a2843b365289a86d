"""``portwright vm plug`` and ``vm unplug`` with a real daemon, a real guest and real packets."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import pty
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest

from portwright.api.calls import Call
from portwright.api.registry import Params
from portwright.kernel import netns
from portwright.vmm import control
from portwright.vmm.contract import NicFacts, PlugParams, UnplugParams
from portwright.vmm.spec import MAX_NICS
from tests.deadline import wait_readable, wait_until
from tests.fix_daemon import PORTWRIGHT, Daemon, Networks, Sandbox, SandboxFactory
from tests.fix_netns import TestNetns
from tests.guests.conftest import Image, RunFactory, booted, cookie_of, gone, no_port

pytestmark = [pytest.mark.guests, pytest.mark.slow, pytest.mark.timeout(300)]

#: How many times in the long test: `make prove` asks for 100.
TIMES = int(os.environ.get("PORTWRIGHT_PLUGS", "10"))


def plug(daemon: Daemon, *options: str) -> dict[str, Any]:
    """Plug a NIC into g1; what is said of it."""
    facts: dict[str, Any] = json.loads(daemon.cli("vm", "plug", "g1", "--json", *options).stdout)
    return facts


def nics(daemon: Daemon) -> list[str]:
    """The NICs of the only guest, as vm list has them."""
    (guest,) = json.loads(daemon.cli("vm", "list", "--json").stdout)
    assert guest["name"] == "g1"
    return [nic["ifname"] for nic in guest["nics"]]


def names(daemon: Daemon) -> list[str]:
    """Of the ports."""
    with daemon.client() as client:
        return [port.owner.name for port in client.port_list()]


def answers(sandbox: Sandbox, address: str, console: Path) -> None:
    """Wait until the guest answers on the address. AssertionError shows the end of its console if not."""
    try:
        wait_until(partial(sandbox.ping, address), 30, f"{address} to answer")
    except AssertionError as error:
        raise AssertionError(f"{error}; the guest said:\n{console.read_text()[-2000:]}") from None


def says(console: Path, words: str) -> None:
    """Wait until the guest has said that."""
    wait_until(lambda: words in console.read_text(), 30, f"{words!r} in\n{console.read_text()[-1000:]}")


def asked(daemon: Daemon, method: str, params: Params[NicFacts]) -> NicFacts:
    """The answer of g1, without the command line's start."""
    return asyncio.run(control.ask(daemon.run_dir, "g1", Call(method, params, NicFacts), within=60))


class Stream:
    """A TCP connection to the guest's echo service that is never idle; a context manager.

    What comes back is what was sent. ``carried`` counts the bytes; ``ended`` says why it ended, if it did.
    """

    def __init__(self, sandbox: Sandbox, address: str) -> None:
        self.carried = 0
        self.ended = ""
        with netns.entered(sandbox.ns.fd):
            self._sock = socket.create_connection((address, 7), timeout=20)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sock.close()

    def beyond(self, count: int) -> bool:
        """Whether it has carried more, or has ended."""
        return self.carried > count or bool(self.ended)

    def _run(self) -> None:
        try:
            for number in itertools.count():
                if self._stop.is_set():
                    return
                sent = number.to_bytes(8, "big") * 512
                self._sock.sendall(sent)
                got = b""
                while len(got) < len(sent):
                    data = self._sock.recv(len(sent) - len(got))
                    if not data:
                        self.ended = "closed by the guest"
                        return
                    got += data
                if got != sent:
                    self.ended = f"other bytes after {self.carried}"
                    return
                self.carried += len(got)
        except OSError as error:
            self.ended = str(error)


def test_plug_and_unplug(
    daemon: Daemon, networks: Networks, sandboxes: SandboxFactory, vm_run: RunFactory, console: Path
) -> None:
    """A NIC comes to a running guest, which sets it up as its port is, and is reached on it in both families;
    unplugged it is gone from the guest, its port too, and the first NIC is as it was."""
    first, second = sandboxes(), sandboxes("n2")
    run = vm_run("--name", "g1")
    booted(console)

    nic = plug(daemon, "--network", "n2", "--label", "app=web")
    assert (nic["ifname"], nic["network"]) == ("eth1", "n2")
    assert nics(daemon) == ["eth0", "eth1"]
    with daemon.client() as client:
        port = client.port_show("g1-1")
    assert (port.mac, port.labels, port.model) == (nic["mac"], {"app": "web"}, "tcfilter")
    assert port.join == "peer"
    says(console, f"eth1 is {nic['mac']}, mtu {nic['mtu']}, queues 1")
    for address in nic["addresses"]:
        answers(second, address, console)

    gone = json.loads(daemon.cli("vm", "unplug", "g1", "eth1", "--json").stdout)
    assert gone == nic
    assert nics(daemon) == ["eth0"]
    assert "g1-1" not in names(daemon)
    assert not any(second.ping(address) for address in nic["addresses"])
    assert all(first.ping(address) for address in run.addresses())
    assert "failed" not in console.read_text()

    run.process.terminate()
    assert run.process.wait(60) == 0, run.errors()
    assert run.errors() == ""
    assert no_port(daemon)


@pytest.mark.timeout(120 + 6 * TIMES)
def test_many_times_under_traffic(
    daemon: Daemon,
    networks: Networks,
    sandboxes: SandboxFactory,
    vm_run: RunFactory,
    console: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """A NIC is plugged and unplugged many times, reached in both families each time, while a TCP stream runs
    on another NIC of the guest: it goes on each time, and no byte of it is lost."""
    first, second = sandboxes(), sandboxes("n2")
    run = vm_run("--name", "g1", "--append", "portwright.echo=7")
    booted(console)
    with Stream(first, run.addresses()[0]) as stream:
        for _ in range(TIMES):
            before = stream.carried
            nic = asked(daemon, "vm.plug", PlugParams(network="n2"))
            for address in nic.addresses:
                answers(second, address, console)
            assert asked(daemon, "vm.unplug", UnplugParams(ifname=nic.ifname)) == nic
            wait_until(partial(stream.beyond, before), 10, "the stream to go on")
            assert not stream.ended
    with daemon.client() as client:
        assert len(client.port_list()) == 3
        assert client.node_status().problems == ()
    record_property("plugs_and_unplugs", TIMES)
    record_property("bytes_of_the_stream_meanwhile", stream.carried)


def test_link_and_queues(
    daemon: Daemon, networks: Networks, sandboxes: SandboxFactory, vm_run: RunFactory, console: Path
) -> None:
    """A plugged NIC has the queues that were asked for, its port's link as it changes, and no link once its
    port was deleted by somebody; then it can be unplugged still, and its name is free again."""
    sandboxes()
    run = vm_run("--name", "g1", "--cpus", "2", "--append", "portwright.watch=eth1")
    booted(console)

    def carriers(words: str, times: int) -> None:
        wait_until(lambda: console.read_text().count(f"eth1 has {words}") == times, 30, f"{times} {words}")

    nic = plug(daemon, "--network", "n1", "--queues", "2")
    says(console, f"eth1 is {nic['mac']}, mtu 1500, queues 2")
    assert nic["queues"] == 2
    carriers("a carrier", 1)
    none = console.read_text().count("eth1 has no carrier")  # before it was there
    with daemon.client() as client:
        client.port_set("g1-1", admin="down")
        carriers("no carrier", none + 1)
        client.port_set("g1-1", admin="up")
        carriers("a carrier", 2)
        client.port_delete("g1-1")
    carriers("no carrier", none + 2)
    held = Path(f"/proc/{run.facts['pid']}/fd")
    wait_until(
        lambda: [str(fd.readlink()) for fd in held.iterdir()].count("/dev/net/tun") == 1, 10, "the tap"
    )

    daemon.cli("vm", "unplug", "g1", "eth1")
    assert plug(daemon, "--network", "n1")["ifname"] == "eth1"


def test_killed_daemon(
    daemon: Daemon, networks: Networks, sandboxes: SandboxFactory, vm_run: RunFactory, console: Path
) -> None:
    """A plugged NIC's traffic survives SIGKILL of the daemon, and the next daemon finds its port in order.
    Without a daemon neither plug nor unplug changes anything, and each says so."""
    _, second = sandboxes(), sandboxes("n2")
    vm_run("--name", "g1")
    booted(console)
    nic = plug(daemon, "--network", "n2")
    for address in nic["addresses"]:
        answers(second, address, console)

    daemon.kill()
    assert all(second.ping(address) for address in nic["addresses"])
    for refused in (["plug", "g1", "--network", "n2"], ["unplug", "g1", "eth1"]):
        done = daemon.cli("vm", *refused, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert "no daemon on" in done.stderr
    assert nics(daemon) == ["eth0", "eth1"]
    assert all(second.ping(address) for address in nic["addresses"])

    daemon.start()
    assert all(second.ping(address) for address in nic["addresses"])
    with daemon.client() as client:
        assert client.port_show("g1-1").state == "attached"
        assert client.node_status().problems == ()
    assert plug(daemon, "--network", "n2")["ifname"] == "eth2"
    daemon.cli("vm", "unplug", "g1", "eth1")
    assert nics(daemon) == ["eth0", "eth2"]


def stopped(daemon: Daemon) -> int:
    """Stop the daemon's process, as a slow one; its pid."""
    with daemon.client() as client:
        pid = client.node_status().pid
    os.kill(pid, signal.SIGSTOP)
    return pid


def waits(host: TestNetns, daemon: Daemon, pid: int) -> bool:
    """Whether somebody waits for the stopped daemon, of that pid, to accept."""
    found = host.run(["ss", "-xlH"]).stdout
    # The socket was bound under that name, and got its own later.
    (line,) = [line for line in found.splitlines() if f"{daemon.run_dir}/.{pid}.sock " in line]
    return int(line.split()[2]) > 0


@pytest.mark.parametrize("killed", ["vm run", "vm plug"])
def test_killed_in_the_middle(
    daemon: Daemon,
    host: TestNetns,
    networks: Networks,
    sandboxes: SandboxFactory,
    vm_run: RunFactory,
    killed: str,
) -> None:
    """SIGKILL in the middle of a plug: of `vm run` it leaves neither port, namespace nor socket; of the
    command it leaves nothing half done, as the plug is carried out."""
    sandboxes()
    run = vm_run("--name", "g1")
    cookie = cookie_of(run)
    command = [str(PORTWRIGHT), "vm", "plug", "g1", "--network", "n1"]
    with ExitStack() as stack:
        pid = stopped(daemon)
        asking = stack.enter_context(
            subprocess.Popen(
                ["nsenter", f"--net={host.path}", "--", *command],
                env=daemon.env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        )
        stack.callback(asking.kill)
        stack.callback(os.kill, pid, signal.SIGCONT)
        wait_until(partial(waits, host, daemon, pid), 20, "the plug to be under way")
        (run.process if killed == "vm run" else asking).kill()
        if killed == "vm run":
            run.process.wait()
            assert asking.communicate(timeout=30)[1].decode() == (
                "portwright: guest 'g1' has not answered vm.plug (connection closed);"
                " look before you repeat it\n"
            )
    if killed == "vm run":
        wait_until(partial(gone, daemon, cookie), 30, "the ports and the namespace to be gone")
        wait_until(lambda: not list((daemon.run_dir / "vm").iterdir()), 10, "the socket to be gone")
    else:
        wait_until(lambda: nics(daemon) == ["eth0", "eth1"], 20, "the NIC")
        with daemon.client() as client:
            assert client.port_show("g1-1").state == "attached"


def test_guest_that_keeps_its_card(
    daemon: Daemon, networks: Networks, sandboxes: SandboxFactory, vm_run: RunFactory, console: Path
) -> None:
    """A guest that has not booted keeps its card: the error names that, and card and port are as before. One
    that is asked again until it has booted lets go, and of what it was asked for before too, which ends in
    the same way. Nobody else's name does anything."""
    other = sandboxes()
    run = vm_run("--name", "g1")
    plug(daemon, "--network", "n1")
    done = daemon.cli("vm", "unplug", "g1", "eth1", "--patience", "0", "--json", check=False)
    assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (1, "card-held")
    assert "did not let go of eth1 within 0 s: " in done.stderr
    assert nics(daemon) == ["eth0", "eth1"]
    with daemon.client() as client:
        assert client.port_link("g1-1").link == "up"
    plug(daemon, "--network", "n1")
    daemon.cli("vm", "unplug", "g1", "eth2", "--patience", "90")
    # It looked once more, and found that it had been asked for the other one too.
    wait_until(lambda: nics(daemon) == ["eth0"], 20, "the card that it kept to end as well")
    wait_until(lambda: "g1-1" not in names(daemon), 10, "its port to be deleted")

    booted(console)
    for address in run.addresses():
        assert other.ping(address)
    for named, said in (
        (["g1", "eth1"], "NIC 'eth1' does not exist"),
        (["g2", "eth0"], "guest 'g2' does not exist"),
        (["../g1", "eth0"], "guest '../g1' does not exist"),
        (["g1", "lo"], "ifname: "),
    ):
        done = daemon.cli("vm", "unplug", *named, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"portwright: {said}"), done.stderr
    daemon.cli("vm", "unplug", "g1", "eth0")
    assert nics(daemon) == []
    assert "g1" in daemon.cli("vm", "list").stdout
    assert no_port(daemon)


def test_room_for_cards(
    daemon: Daemon, networks: Networks, sandboxes: SandboxFactory, vm_run: RunFactory
) -> None:
    """A guest takes as many cards as it has root ports, and the next one is refused by that number; so is one
    on a network that is not there; neither leaves a port."""
    sandboxes()
    vm_run("--name", "g1")
    done = daemon.cli("vm", "plug", "g1", "--network", "none", check=False)
    assert (done.returncode, done.stderr) == (1, "portwright: network 'none' does not exist\n")
    for index in range(1, MAX_NICS):
        assert asked(daemon, "vm.plug", PlugParams(network="n1")).ifname == f"eth{index}"
    done = daemon.cli("vm", "plug", "g1", "--network", "n1", check=False)
    said = f"portwright: guest 'g1': has {MAX_NICS} NICs, which is all that fit; unplug one\n"
    assert (done.returncode, done.stderr) == (1, said)
    with daemon.client() as client:
        assert len(client.port_list()) == MAX_NICS + 1


def test_guest_without_hotplug(
    daemon: Daemon, sandboxes: SandboxFactory, vm_run: RunFactory, console: Path
) -> None:
    """A guest whose kernel has no driver of slots never lets go of its NIC: unplug ends in time with an error
    that names it, and the NIC carries on, again and again."""
    other = sandboxes()
    run = vm_run("--name", "g1", "--append", "acpiphp.disable=1")
    booted(console)
    for address in run.addresses():
        wait_until(partial(other.ping, address), 20, f"{address} to answer")
    for _ in range(2):
        done = daemon.cli("vm", "unplug", "g1", "eth0", "--patience", "1.5", check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("portwright: guest 'g1' did not let go of eth0 within 1.5 s: ")
        assert all(other.ping(address) for address in run.addresses())
    assert nics(daemon) == ["eth0"]
    with daemon.client() as client:
        assert client.port_show("g1").state == "attached"


def test_daemon_dies_in_the_middle(
    daemon: Daemon, sandboxes: SandboxFactory, vm_run: RunFactory, console: Path
) -> None:
    """A daemon that dies in the middle of a plug, or of an unplug, makes an error of it; the next daemon and
    the guest agree about what is there, and the name serves again."""
    other = sandboxes()
    vm_run("--name", "g1")
    booted(console)
    for place, command, left in (
        ("add:3:after", ["plug", "g1", "--network", "n1"], ["eth0"]),
        ("", ["plug", "g1", "--network", "n1"], ["eth0", "eth1"]),
        ("del:1:after", ["unplug", "g1", "eth1"], ["eth0"]),
    ):
        daemon.stop()
        daemon.start(**({"PORTWRIGHT_DIE_AT": place} if place else {}))
        done = daemon.cli("vm", *command, check=False)
        assert done.returncode == (1 if place else 0), done
        if place:
            assert "the daemon went away before it answered" in done.stderr
            daemon.wait()
            daemon.start()
        assert nics(daemon) == left
        with daemon.client() as client:
            assert client.node_status().problems == ()
    nic = plug(daemon, "--network", "n1")
    assert nic["ifname"] == "eth1"
    for address in nic["addresses"]:
        wait_until(partial(other.ping, address), 10, f"{address} to answer")
    assert sorted(names(daemon)) == sorted([other.ns.name, "g1", "g1-1"])


@pytest.mark.parametrize("model", ["macvtap", "tap"])
def test_other_models(
    daemon: Daemon,
    networks: Networks,
    sandboxes: SandboxFactory,
    vm_run: RunFactory,
    console: Path,
    model: str,
) -> None:
    """A plugged NIC has the model of its guest's ports, with its queues, link and end."""
    other = sandboxes()
    run = vm_run("--name", "g1", "--model", model, "--append", "portwright.watch=eth1", "--cpus", "2")
    booted(console)
    nic = plug(daemon, "--network", "n1", "--queues", "2")
    for address in nic["addresses"]:
        wait_until(partial(other.ping, address), 10, f"{address} to answer")
    says(console, "eth1 has a carrier")
    with daemon.client() as client:
        assert client.port_show("g1-1").model == model
        before = console.read_text().count("eth1 has no carrier")
        client.port_set("g1-1", admin="down")
    wait_until(lambda: console.read_text().count("eth1 has no carrier") > before, 20, "the link to go")
    daemon.cli("vm", "unplug", "g1", "eth1")
    assert "g1-1" not in names(daemon)
    assert all(other.ping(address) for address in run.addresses())


def test_hostile_guest(daemon: Daemon, host: TestNetns, sandboxes: SandboxFactory, image: Image) -> None:
    """A guest that floods the port of its words, and throws all its cards out, costs no memory and nobody
    else: its ports are deleted as if they had been unplugged, and it runs on and takes new ones."""
    other = sandboxes()
    ours, theirs = pty.openpty()
    command = [
        *("nsenter", f"--net={host.path}", "--", str(PORTWRIGHT), "vm", "run", "--console", "-"),
        *("--kernel", str(image.kernel), "--initramfs", str(image.initramfs), "--name", "g1"),
        *("--memory", "128", "--accel", "tcg", "--network", "n1"),
    ]
    heard = bytearray()

    def says(words: bytes) -> None:
        while words not in heard:
            wait_readable(ours, 90, f"{words!r} after {bytes(heard)[-1000:]!r}")
            heard.extend(os.read(ours, 4096))
        del heard[: heard.index(words) + len(words)]

    def said(line: str) -> None:
        os.write(ours, f"{line}; echo d$((1))ne\r".encode())
        says(b"d1ne")

    process = subprocess.Popen(
        command, env=daemon.env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    try:
        says(b"/ # ")
        plug(daemon, "--network", "n1")
        says(b"eth1 is ")
        before = memory(process.pid)
        said("(cat /dev/zero >/dev/vport0p1) & for p in /sys/bus/pci/slots/*/power; do echo 0 >$p; done")
        wait_until(lambda: nics(daemon) == [], 20, "its cards to end")
        wait_until(lambda: names(daemon) == [other.ns.name], 10, "their ports to be deleted")
        nic = plug(daemon, "--network", "n1")
        says(b"eth0 is ")
        for address in nic["addresses"]:
            wait_until(partial(other.ping, address), 10, f"{address} to answer")
        assert memory(process.pid) < before + 8 * 1024
        assert nics(daemon) == ["eth0"]
        os.write(ours, b"\x01x")
        says(b"QEMU: Terminated")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
    wait_until(partial(no_port, daemon), 10, "the guest's port to be gone")


def memory(pid: int) -> int:
    """What a process has in memory, in KiB."""
    (line,) = [one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in one]
    return int(line.split()[1])
