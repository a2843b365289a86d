"""A jail with a port: it has the tap, the host reaches it, and the port ends with the jail."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.deadline import PATIENCE, wait_readable, wait_until
from tests.fix_daemon import Daemon, SandboxFactory
from tests.fix_netns import TestNetns
from tests.netns.jail_lab import jail_command

pytestmark = pytest.mark.netns

#: Reads frames off the tap until one for its own MAC is there, of each family.
READER = """
def reads(fd):
    mac, seen = bytes.fromhex("{mac:eth0}".replace(":", "")), set()
    print("ready", flush=True)
    while seen != {0x0800, 0x86DD}:
        frame = os.read(fd, 65536)[10:]  # behind the virtio-net header
        if frame[:6] == mac:
            seen.add(int.from_bytes(frame[12:14], "big"))
    print("both", flush=True)
    signal.pause()
"""
BY_DESCRIPTOR = "os.set_blocking({fd:eth0}, True)\nreads({fd:eth0})"
BY_NAME = """
fd = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"{tap:eth0}", 0x5002))
reads(fd)
"""


@pytest.mark.parametrize("code", [BY_DESCRIPTOR, BY_NAME], ids=["by descriptor", "by name"])
def test_jail_has_its_ports_tap(
    daemon: Daemon, host: TestNetns, sandboxes: SandboxFactory, code: str
) -> None:
    """Handed over, or opened by its user, the tap carries what is for the port; SIGTERM ends both."""
    sandboxes()
    options = ("--device", "/dev/net/tun") if "net/tun" in code else ()
    with _running(daemon, host, READER + code, *options) as process:
        with daemon.client() as client:
            port = client.port_show("j1")
            assert (port.model, port.labels, port.ifname) == ("tcfilter", {"app": "x"}, "eth0")
        for address in port.addresses:
            host.run(["ping", "-n", "-c1", "-W1", address.address], check=False)
        assert process.stdout is not None
        wait_readable(process.stdout.fileno(), 20, "packets of both families")
        assert process.stdout.readline() == "both\n"
        process.terminate()
        assert process.wait(20 * PATIENCE) == 143
    assert _no_port(daemon)


def test_killed_jail_takes_its_port_along(daemon: Daemon, host: TestNetns, sandboxes: SandboxFactory) -> None:
    """SIGKILL of ``portwright jail`` ends the command, and its ports are deleted; others' stay."""
    other = sandboxes()
    with _running(daemon, host, READER + BY_DESCRIPTOR) as process:
        process.kill()
        process.wait()
        wait_until(lambda: _no_port(daemon), 10, "the port to be gone")
    with daemon.client() as client:
        assert [port.port_id for port in client.port_list()] == [other.port.port_id]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "nowhere"], "network 'nowhere' does not exist"),
        (["--port", "n1", "--netns", "/proc/self/ns/net"], "netns: a port is for the jail's own namespace"),
        (["--name", "x"], "name: there is no --port to have it"),
        (["--cgroup-parent", "x"], "cgroup-parent: there is no --cgroup"),
        (["--env", "PWT_NOT_SET_HERE"], "env: is not set here"),
        (["--rlimit", "nofile=many"], "rlimit: a number"),
        (["--rlimit", "nofile=1", "--rlimit", "nofile=2"], "rlimit: nofile is given twice"),
        (["--fd", "x"], "fd: a number"),
        (["--file", "/etc/hostname:/a:/b"], "file: write it as HOST"),
        (["--port", "n1", "--file", "/nonexistent"], "file '/nonexistent' does not exist"),
    ],
)
def test_refused_jail_has_no_port(
    daemon: Daemon, host: TestNetns, sandboxes: SandboxFactory, options: list[str], said: str
) -> None:
    """What can't be is one line, and no port is left by it."""
    sandboxes()
    done = subprocess.run(
        ["nsenter", f"--net={host.path}", "--", *jail_command("", *options)],
        env=daemon.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"portwright: {said}"), done.stderr
    assert _no_port(daemon)


@contextmanager
def _running(daemon: Daemon, host: TestNetns, code: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = jail_command(code, "--port", "n1", "--name", "j1", "--label", "app=x", *options)
    process = subprocess.Popen(
        ["nsenter", f"--net={host.path}", "--", *command],
        env=daemon.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        wait_readable(process.stdout.fileno(), 30, "the jail")
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        wait_until(lambda: _no_port(daemon), 10, "the port to be gone")


def _no_port(daemon: Daemon) -> bool:
    with daemon.client() as client:
        return not [port for port in client.port_list() if port.model == "tcfilter"]
