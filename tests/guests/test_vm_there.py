"""``portwright vm run --netns``: guests in namespaces that a container runtime, or another plugin, made."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from portwright.kernel import netns
from portwright.model.port import Port
from tests.deadline import wait_readable
from tests.fix_containerd import Runtimes, own
from tests.fix_daemon import PORTWRIGHT, Daemon
from tests.fix_netns import NetnsFactory, TestNetns
from tests.guests.conftest import Image, Run, booted
from tests.netns.chain_lab import Chained

pytestmark = [pytest.mark.guests, pytest.mark.slow, pytest.mark.timeout(400)]

PTP: dict[str, Any] = {
    "type": "ptp",
    "ipam": {
        "type": "host-local",
        "ranges": [[{"subnet": "10.5.0.0/24"}], [{"subnet": "fd00:5::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    },
}
#: What else there may be, by hand: commands of ``ip``, and what the guest's kernel then says.
BY_HAND = (
    (
        "route add 10.80.0.0/16 via 10.5.0.1 dev eth0 src 10.5.0.2 metric 7 mtu 1300 advmss 1200 table 100",
        "4",
    ),
    ("rule add from 10.5.0.0/24 lookup 100 priority 500", "4"),
    ("neigh add 10.5.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent", "4"),
    ("neigh add fd00:5::77 lladdr 02:00:00:00:00:78 dev eth0 nud permanent", "6"),
    ("route add fd80::/32 via fd00:5::1 dev eth0 metric 9 table 100", "6"),
    ("rule add from fd00:5::/64 lookup 100 priority 600", "6"),
)
ASKED = (
    "ip route show table 100; ip -6 route show table all; ip rule; ip -6 rule; ip neigh; ip -6 neigh;"
    " ip addr show dev eth0"
)


def _started(
    daemon: Daemon, image: Image, console: Path, where: str, *options: str
) -> tuple[subprocess.Popen[str], Path]:
    command = [
        *("nsenter", f"--net={daemon.host.path}", "--", str(PORTWRIGHT), "vm", "run", "--json"),
        *("--kernel", str(image.kernel), "--initramfs", str(image.initramfs), "--console", str(console)),
        *("--memory", "128", "--accel", "tcg", "--name", "g1", "--netns", where),
    ]
    errors = console.with_name("errors")
    with errors.open("wb") as err:
        return subprocess.Popen(
            [*command, *options],
            env=daemon.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
        ), errors


@contextmanager
def there(daemon: Daemon, image: Image, console: Path, where: str, *options: str) -> Iterator[Run]:
    """A guest in the namespace ``where``; it is ended in order at the end."""
    process, errors = _started(daemon, image, console, where, *options)
    with process:
        try:
            run = Run(process, errors)
            try:
                booted(console)
                yield run
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0, run.errors()
            finally:
                run.close()
        finally:
            process.kill()


@contextmanager
def namespace_of(port: Port) -> Iterator[str]:
    """A path to a port's namespace, whatever it is called where its runtime is."""
    found = netns.find_by_cookie(port.sandbox.cookie)
    assert found is not None
    try:
        yield f"/proc/{os.getpid()}/fd/{found}"
    finally:
        os.close(found)


def answers(ns: TestNetns, address: str) -> bool:
    return ns.run(["ping", "-n", "-c1", "-W2", address], check=False).returncode == 0


def fetched(ns: TestNetns, address: str) -> str:
    url = f"http://[{address}]/" if ":" in address else f"http://{address}/"
    return ns.run(["curl", "-s", "--max-time", "5", url], check=False).stdout


def test_guest_in_a_namespace_of_containerd(
    containerd: Runtimes, daemon: Daemon, host: TestNetns, image: Image, console: Path
) -> None:
    """``ctr run --cni`` with model tcfilter, and QEMU on its tap: ping and HTTP in both families, from the
    host and another container; the guest's end leaves the container's port; the container's, nothing."""
    containerd.conflist("n1", own(model="tcfilter"))
    port = containerd.ctr_run("pause", "sleep", "600")
    containerd.conflist("n1", own())
    containerd.ctr_run("client", "sleep", "600")
    with (
        namespace_of(port) as where,
        there(daemon, image, console, where, "--append", "portwright.httpd=80") as run,
    ):
        assert run.addresses() == [a.address for a in port.addresses]
        for address in run.addresses():
            assert answers(host, address), address
            assert fetched(host, address) == "g1\n"
            url = f"http://[{address}]/" if ":" in address else f"http://{address}/"
            assert containerd.ctr_read("client", "timeout", "10", "wget", "-q", "-O", "-", url) == "g1\n"
    assert {p.port_id for p in containerd.ports()} >= {port.port_id}
    containerd.ctr_stop("client")
    containerd.ctr_stop("pause")
    containerd.nothing_left()


def test_guest_behind_ptp_in_a_namespace_of_containerd(
    containerd: Runtimes, daemon: Daemon, host: TestNetns, world: TestNetns, image: Image, console: Path
) -> None:
    """The same behind another plugin, by ``ctr run --cni`` with a list of ptp and ours."""
    host.run(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])
    world.run(["ip", "route", "add", "10.5.0.0/24", "via", "192.0.2.2"])
    world.run(["ip", "-6", "route", "add", "fd00:5::/64", "via", "2001:db8::2"])
    containerd.conflist("vms", PTP, {"type": "portwright", "model": "tcfilter"})
    port = containerd.ctr_run("pause", "sleep", "600")
    assert (port.rep_name, port.network) == ("", "vms")
    with (
        namespace_of(port) as where,
        there(daemon, image, console, where, "--append", "portwright.httpd=80") as run,
    ):
        assert len(run.addresses()) == 2
        for address in run.addresses():
            for ns in (host, world):
                assert answers(ns, address), address
                assert fetched(ns, address) == "g1\n"
    assert "failed" not in console.read_text()
    containerd.ctr_stop("pause")
    containerd.nothing_left()


def test_layer_3_reaches_a_real_guest(
    daemon: Daemon, netns_factory: NetnsFactory, image: Image, tmp_path: Path
) -> None:
    """Routes with source, metric and table, rules and neighbours, both families, as the guest says.

    Its busybox shows no more of a route; what else there is tests/netns/test_layer3.py reads back.
    """
    chain, ns = Chained(daemon, tmp_path), netns_factory()
    _, added = chain.add("vm-1", ns)
    assert added.ok, added.answer
    for command, family in BY_HAND:
        ns.run(["ip", f"-{family}", *command.split()])
    ns.run(["ip", "link", "set", "eth0", "mtu", "1400"])  # as a plugin behind ours may do
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [
            *("nsenter", f"--net={daemon.host.path}", "--", str(PORTWRIGHT), "vm", "run", "--console", "-"),
            *("--kernel", str(image.kernel), "--initramfs", str(image.initramfs), "--name", "g1"),
            *("--memory", "128", "--accel", "tcg", "--netns", ns.path),
        ],
        env=daemon.env,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    try:
        _until(ours, b"/ # ")
        os.write(ours, f"{ASKED}; echo th''at is all\r".encode())
        said = " ".join(_until(ours, b"that is all").split())
        os.write(ours, b"poweroff -f\r")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
    assert "10.80.0.0/16 via 10.5.0.1 dev eth0 src 10.5.0.2 metric 7" in said
    assert "fd80::/32 via fd00:5::1 dev eth0 table 100 metric 9" in said
    assert " mtu 1400 qdisc" in said
    assert "500: from 10.5.0.0/24 lookup 100" in said
    assert "600: from fd00:5::/64 lookup 100" in said
    assert "10.5.0.77 dev eth0 lladdr 02:00:00:00:00:77" in said
    assert "fd00:5::77 dev eth0 lladdr 02:00:00:00:00:78" in said
    assert "inet 10.5.0.2/24 brd 10.5.0.255" in said
    assert "inet6 fd00:5::2/64" in said
    chain.delete("vm-1", ns)


def _until(fd: int, words: bytes) -> str:
    heard = bytearray()
    while words not in heard:
        wait_readable(fd, 90, f"{words!r} after {bytes(heard)[-1000:]!r}")
        heard.extend(os.read(fd, 4096))
    return heard.decode(errors="replace")


def test_nothing_there_is_one_error(daemon: Daemon, netns_factory: NetnsFactory, image: Image) -> None:
    """A namespace without a port, or no namespace, is named; what the ports that are there say is refused."""
    ns = netns_factory()

    def said(*options: str) -> str:
        done = daemon.cli(
            *("vm", "run", "--kernel", str(image.kernel), "--initramfs", str(image.initramfs), *options),
            check=False,
        )
        assert done.returncode in (1, 2)
        return done.stderr

    assert "has no port with a tap" in said("--netns", ns.path)
    assert "netns" in said("--netns", "/dev/null")
    assert "can't open" in said("--netns", "nowhere")
    for option in ("--network", "--label"):
        assert f"{option} is theirs" in said("--netns", ns.path, option, "a=b")
    for option in ("--queues", "--model"):
        assert f"{option} is theirs" in said(
            "--netns", ns.path, option, "2" if option == "--queues" else "tap"
        )
    with daemon.client() as client:
        assert client.port_list() == ()


def test_killed_it_leaves_the_ports_as_they_were(
    daemon: Daemon, netns_factory: NetnsFactory, image: Image, console: Path, tmp_path: Path
) -> None:
    """SIGKILL of ``vm run`` ends QEMU and nothing else: the tap is free, and the next guest runs on it."""
    chain, ns = Chained(daemon, tmp_path), netns_factory()
    assert chain.add("vm-1", ns)[1].ok
    run = Run(*_started(daemon, image, console, ns.path))
    run.process.kill()
    run.process.wait()
    wait_readable(run.qemu, 10, "QEMU's end")
    run.close()
    assert run.process.stdout is not None
    run.process.stdout.close()
    with daemon.client() as client:
        (port,) = client.port_list()
    assert (port.state, port.ifname) == ("attached", "eth0")
    console.unlink()
    with there(daemon, image, console, ns.path) as again:
        assert answers(daemon.host, again.addresses()[0])
    chain.delete("vm-1", ns)
