"""A guest whose QEMU is jailed: it boots, is reached, has nothing of the host, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from portwright.jail.libraries import of
from tests.deadline import wait_readable, wait_until
from tests.fix_daemon import Daemon, SandboxFactory
from tests.fix_netns import TestNetns
from tests.guests.conftest import Image, RunFactory, booted, cookie_of, gone, no_port
from tests.guests.terminal import guest_on_terminal
from tests.netns.jail_lab import groups

pytestmark = [pytest.mark.guests, pytest.mark.slow, pytest.mark.timeout(300)]

USER = 1_877_001
JAIL = ("--jail", "--uid", str(USER), "--cgroup", "memory.max=1G", "--cgroup", "pids.max=64")


def test_jailed_guest_is_reached(
    daemon: Daemon,
    host: TestNetns,
    sandboxes: SandboxFactory,
    vm_run: RunFactory,
    console: Path,
    image: Image,
) -> None:
    """A guest in a jail answers both families, and its QEMU has no privilege and no file but what it needs;
    SIGTERM shuts it down in order, and port, namespace and cgroup are gone."""
    other = sandboxes()
    run = vm_run("--name", "g1", *JAIL)
    cookie, process = cookie_of(run), Path(f"/proc/{run.facts['pid']}")
    booted(console)
    for address in run.addresses():
        assert host.run(["ping", "-n", "-c1", "-W5", address], check=False).returncode == 0, address
        assert other.ping(address), address

    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    assert status["Name"].startswith("qemu-system")
    assert (status["Uid"].split(), status["Gid"].split()) == ([str(USER)] * 4, [str(USER)] * 4)
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"], status["Groups"].strip()) == ("1", "2", "")
    for kind in ("mnt", "pid", "net", "ipc", "uts", "cgroup"):
        assert (process / "ns" / kind).readlink() != Path(f"/proc/self/ns/{kind}").readlink()
    expected = {"/usr/bin/qemu-system-x86_64", *of("/usr/bin/qemu-system-x86_64")}
    found = {f"/{path.relative_to(process / 'root')}" for path in _files(process / "root")}
    assert found >= {*expected, str(image.kernel), str(image.initramfs)}
    others = {path for path in found - expected if not path.startswith(("/usr/share/", "/usr/lib/", "/dev/"))}
    assert others == {str(image.kernel), str(image.initramfs), "/etc/ld.so.cache"}
    assert {path for path in found if path.startswith("/dev/")} == {"/dev/null", "/dev/zero", "/dev/urandom"}
    assert groups(run.process.pid)

    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(60) == 0, run.errors()
    assert run.errors() == ""
    wait_until(partial(gone, daemon, cookie), 10, "the port and the namespace to be gone")
    assert groups(run.process.pid) == []


def test_killed_vm_run_takes_the_jail_along(
    daemon: Daemon, sandboxes: SandboxFactory, vm_run: RunFactory
) -> None:
    """SIGKILL of ``vm run`` ends the jailed QEMU; port, namespace and cgroup go too."""
    sandboxes()
    run = vm_run("--name", "g1", *JAIL)
    cookie = cookie_of(run)
    run.process.kill()
    run.process.wait()
    wait_readable(run.qemu, 10, "QEMU's end")
    wait_until(partial(gone, daemon, cookie), 10, "the port and the namespace to be gone")
    wait_until(lambda: not groups(run.process.pid), 10, "the cgroup to go")


def test_jailed_guest_takes_a_card(
    daemon: Daemon, sandboxes: SandboxFactory, vm_run: RunFactory, console: Path
) -> None:
    """A jailed guest is given one more NIC while it runs, is reached by it, and lets go of it again."""
    sandboxes()
    second = sandboxes("n2")
    run = vm_run("--name", "g1", *JAIL)
    booted(console)
    nic = json.loads(daemon.cli("vm", "plug", "g1", "--json", "--network", "n2").stdout)
    for address in nic["addresses"]:
        wait_until(partial(second.ping, address), 20, f"{address} to answer")
    daemon.cli("vm", "unplug", "g1", nic["ifname"])
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(60) == 0, run.errors()


def test_console_of_a_jailed_guest_on_a_terminal(
    daemon: Daemon, host: TestNetns, sandboxes: SandboxFactory, image: Image
) -> None:
    """With ``--console -`` one types to a jailed guest; ^A x ends it, and the terminal is as before."""
    sandboxes()
    with guest_on_terminal(daemon, host, image, "--jail") as terminal:
        terminal.says(b"/ # ")
        terminal.type(b"echo $((6*7))\r")
        terminal.says(b"\n42")


def test_killed_jailed_qemu_is_told(daemon: Daemon, sandboxes: SandboxFactory, vm_run: RunFactory) -> None:
    """When the jailed QEMU is killed, ``vm run`` says so as for one that is not jailed, and ends."""
    sandboxes()
    run = vm_run("--name", "g1", "--jail")
    os.kill(run.facts["pid"], signal.SIGKILL)
    assert run.process.wait(30) == 1
    assert run.errors() == "portwright: guest 'g1': QEMU was killed by SIGKILL\n"
    assert no_port(daemon)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--jail", "--cgroup", "memory.max=lots"], "portwright: cgroup: the kernel refuses it: "),
        (["--jail", "--uid", "-1"], "portwright: uid: a number from 0 to "),
        (["--uid", "1000"], "portwright: --uid is of a jail: add --jail"),
    ],
)
def test_wrong_jail_is_one_error(
    daemon: Daemon, sandboxes: SandboxFactory, image: Image, options: list[str], said: str
) -> None:
    """What is no jail ends with one line, and no port."""
    sandboxes()
    done = daemon.cli(
        *("vm", "run", "--name", "g1", "--network", "n1", "--accel", "tcg"),
        *("--kernel", str(image.kernel), "--initramfs", str(image.initramfs), *options),
        check=False,
    )
    assert (done.returncode != 0, done.stdout) == (True, "")
    assert done.stderr.startswith(said), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert no_port(daemon)


def _files(folder: Path) -> list[Path]:
    """What is below it and is no folder; links are not followed."""
    found = []
    for path in folder.iterdir():
        found += _files(path) if path.is_dir() and not path.is_symlink() else [path]
    return found
