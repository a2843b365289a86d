"""``vm run --vmm firecracker`` with a real daemon, port and tap, and a stand-in for the executable.

The stand-in enforces Firecracker's API and opens the tap as it does. There is no guest, and no packet.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from portwright.vmm import control
from portwright.vmm.firecracker.limits import fitted, limiters
from tests.deadline import PATIENCE, wait_readable, wait_until
from tests.firecracker_standin import DIED, write
from tests.fix_daemon import PORTWRIGHT, Daemon, SandboxFactory
from tests.fix_netns import TestNetns
from tests.guests.conftest import Run, cookie_of, gone, no_port

pytestmark = pytest.mark.netns

Start = Callable[..., subprocess.Popen[str]]


class Lab:
    """Starts ``vm run --vmm firecracker`` on the stand-in; ``log`` is what that was asked."""

    def __init__(self, daemon: Daemon, host: TestNetns, folder: Path, stack: ExitStack) -> None:
        self.daemon = daemon
        self.host = host
        self.stack = stack
        self.folder = folder
        self.errors, self.console, self.log = (folder / name for name in ("errors", "console", "log"))
        self.program = write(folder / "firecracker")
        self.kernel = folder / "vmlinux"
        self.kernel.write_bytes(b"\x7fELF")
        self.command = [
            *("vm", "run", "--json", "--vmm", "firecracker", "--firecracker", str(self.program)),
            *("--kernel", str(self.kernel), "--initramfs", str(self.kernel), "--name", "g.1"),
            *("--console", str(self.console)),
        ]

    def start(self, *options: str, **env: str) -> subprocess.Popen[str]:
        """The process."""
        with self.errors.open("wb") as err:
            process = subprocess.Popen(
                ["nsenter", f"--net={self.host.path}", "--", str(PORTWRIGHT), *self.command, *options],
                env={**self.daemon.env, "PWT_FC_LOG": str(self.log), **env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
            )
        self.stack.enter_context(process)  # waits for its end
        self.stack.callback(process.kill)
        return process

    def run(self, *options: str, **env: str) -> Run:
        """The same, once the guest runs."""
        run = Run(self.start(*options, **env), self.errors)
        self.stack.callback(run.close)
        return run

    def asked(self, method: str = "PUT") -> list[tuple[str, Any]]:
        """Path and body of each request by that verb."""
        found = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [(path, body) for verb, path, body in found if verb == method]

    def nothing_is_left(self) -> bool:
        """Neither port nor socket nor directory."""
        # Looking removes a control socket on which nobody listens, as any command does.
        sockets = control.names(self.daemon.run_dir), list((self.daemon.run_dir / "vm").glob("*.news"))
        return no_port(self.daemon) and not any(sockets) and not self.homes()

    def homes(self) -> list[Path]:
        """The directories of API sockets."""
        return list((self.daemon.run_dir / "vm").glob("*.fc"))


@pytest.fixture
def lab(daemon: Daemon, host: TestNetns, sandboxes: SandboxFactory, tmp_path: Path) -> Iterator[Lab]:
    """With a sandbox on the network n1 that has to stay."""
    other = sandboxes()
    with ExitStack() as stack:
        made = Lab(daemon, host, tmp_path, stack)
        stack.callback(wait_until, made.nothing_is_left, 10, "the guest's remains to be gone")
        yield made
    with daemon.client() as client:
        assert other.port.port_id in [port.port_id for port in client.port_list()]


def test_guest_on_its_ports(lab: Lab, sandboxes: SandboxFactory) -> None:
    """Firecracker is told of each port's tap, MAC, MTU and limits, boots with the network's words, and is
    shown; what it can't do is refused with the version that can; SIGTERM shuts it down, and all is gone."""
    sandboxes("n2")
    rates = ("--egress-rate", "10M", "--ingress-rate", "1G")
    run = lab.run("--network", "n1", "--network", "n2", *rates, "--memory", "128", "--append", "last=1")
    cookie = cookie_of(run)
    with lab.daemon.client() as client:
        ports = [client.port_show(nic["port_id"]) for nic in run.facts["nics"]]
    assert [(port.network, port.model, port.limits.egress_rate) for port in ports] == [
        ("n1", "tcfilter", 10_000_000),
        ("n2", "tcfilter", 10_000_000),
    ]
    assert (run.facts["vmm"], run.facts["accel"], run.facts["vhost"]) == ("firecracker", "kvm", False)

    (machine, boot, *nics, action) = lab.asked()
    assert machine == ("/machine-config", {"vcpu_count": 1, "mem_size_mib": 128})
    assert boot[1]["kernel_image_path"] == boot[1]["initrd_path"] == str(lab.kernel)
    words = boot[1]["boot_args"].split()
    assert words[0] == "console=ttyS0"
    assert words[-1] == "last=1"
    assert "reboot=k" in words
    assert {w for w in words if w.startswith("portwright.nic=")} == {
        f"portwright.nic=eth{index},{port.mac},{port.mtu}" for index, port in enumerate(ports)
    }
    assert action == ("/actions", {"action_type": "InstanceStart"})
    for index, ((path, body), port) in enumerate(zip(nics, ports, strict=True)):
        assert path == f"/network-interfaces/eth{index}"
        rx, tx = limiters(fitted(port.limits))
        assert rx.bandwidth is not None
        assert tx.bandwidth is not None
        assert body == {
            "iface_id": f"eth{index}",
            "host_dev_name": port.tap,
            "guest_mac": port.mac,
            "mtu": port.mtu,
            "rx_rate_limiter": {"bandwidth": _bucket(rx.bandwidth)},
            "tx_rate_limiter": {"bandwidth": _bucket(tx.bandwidth)},
        }
    held = [str(fd.readlink()) for fd in Path(f"/proc/{run.facts['pid']}/fd").iterdir()]
    assert held.count("/dev/net/tun") == 2
    (home,) = lab.homes()
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    wait_until(lambda: lab.console.read_text() == "the guest's console\n", 10, "the console")

    (listed,) = json.loads(lab.daemon.cli("vm", "list", "--json").stdout)
    assert listed == run.facts
    assert "firecracker" in lab.daemon.cli("vm", "list").stdout
    for command, said in (
        (("plug", "g.1", "--network", "n1"), "needs Firecracker 1.16 or newer started with --enable-pci"),
        (("unplug", "g.1", "eth0"), "needs Firecracker 1.16 or newer started with --enable-pci"),
        (("freeze", "g.1", str(lab.folder / "frozen")), "firecracker does not support vm freeze"),
    ):
        refused = lab.daemon.cli("vm", *command, check=False)
        assert (refused.returncode, said in refused.stderr) == (1, True), refused.stderr
    assert not (lab.folder / "frozen").exists()

    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(30 * PATIENCE) == 0, run.errors()
    assert run.errors() == ""
    assert lab.asked()[-1] == ("/actions", {"action_type": "SendCtrlAltDel"})
    wait_until(partial(gone, lab.daemon, cookie), 10, "the ports and the namespace to be gone")
    assert lab.nothing_is_left()


def test_limits_follow_the_ports(lab: Lab, sandboxes: SandboxFactory) -> None:
    """Limits that are raised, lowered and taken away while the guest runs are Firecracker's too, of that NIC
    alone; settings that are none of its limits' are not sent."""
    sandboxes("n2")
    run = lab.run("--network", "n1", "--network", "n2", "--egress-rate", "10M")
    lab.daemon.cli("port", "set", "g.1", "--label", "a=b", "--admin", "down")
    for number, options, egress, ingress in (
        (1, ("--egress-rate", "100M", "--ingress-rate", "8M"), 100_000_000, 8_000_000),
        (2, ("--egress-rate", "1M"), 1_000_000, 8_000_000),
        (3, ("--egress-rate", "0", "--ingress-rate", "0"), 0, 0),
        (4, ("--egress-rate", "10M", "--egress-burst", "20M"), 10_000_000, 0),
    ):
        lab.daemon.cli("port", "set", "g.1-1", *options)
        wait_until(partial(_patched, lab, number), 10, "the limits to be sent")
        path, body = lab.asked("PATCH")[-1]
        assert path == "/network-interfaces/eth1"
        assert (_rate(body["tx_rate_limiter"]), _rate(body["rx_rate_limiter"])) == (egress, ingress)
    assert body["tx_rate_limiter"]["bandwidth"]["size"] == 20_000_000 // 8
    assert len(lab.asked("PATCH")) == 4
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(30 * PATIENCE) == 0, run.errors()
    assert run.errors() == ""


def test_limits_follow_over_a_daemons_death(lab: Lab) -> None:
    """A daemon that dies between a change and the word of it leaves the word to its next start; a start
    without a change sends nothing."""
    run = lab.run("--network", "n1", "--egress-rate", "10M")
    lab.daemon.cli("port", "set", "g.1", "--egress-rate", "20M")
    wait_until(partial(_patched, lab, 1), 10, "the limits to be sent")  # so nothing is being asked any more
    lab.daemon.stop()
    lab.daemon.start(PORTWRIGHT_DIE_AT="set:commit")
    assert lab.daemon.cli("port", "set", "g.1", "--egress-rate", "100M", check=False).returncode == 1
    lab.daemon.wait()
    assert len(lab.asked("PATCH")) == 1
    lab.daemon.start()
    wait_until(partial(_patched, lab, 2), 10, "the limits to be sent")
    lab.daemon.kill()
    lab.daemon.start()
    lab.daemon.cli("port", "set", "g.1", "--egress-rate", "1M")
    wait_until(partial(_patched, lab, 3), 10, "the next ones")
    sent = [_rate(body["tx_rate_limiter"]) for _, body in lab.asked("PATCH")]
    assert sent == [20_000_000, 100_000_000, 1_000_000]
    assert run.errors() == ""


def test_limits_that_firecracker_refuses(lab: Lab) -> None:
    """Are said, and asked for again; one without its socket is said as well, and the guest runs on."""
    run = lab.run(
        "--network", "n1", "--patience", "0.5", PWT_FC_FAULT="PATCH /network-interfaces/eth0 refuse"
    )
    lab.daemon.cli("port", "set", "g.1", "--ingress-rate", "100M")
    wait_until(lambda: lab.asked("PATCH"), 20, "the limits to be sent again")
    (line,) = run.errors().splitlines()
    assert "guest 'g.1': eth0: Firecracker has not taken the port's new limits, it is asked again: " in line
    assert "(400): as the test asked" in line

    (lab.homes()[0] / "api.sock").unlink()
    lab.daemon.cli("port", "set", "g.1", "--ingress-rate", "0")
    wait_until(lambda: "may stay as they were until" in run.errors(), 20, "the last try")
    assert run.errors().count("no Firecracker on ") == 3
    assert len(lab.asked("PATCH")) == 1
    (listed,) = json.loads(lab.daemon.cli("vm", "list", "--json").stdout)
    assert listed == run.facts
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(30 * PATIENCE) == 0, run.errors()


def test_disk_and_older_version(lab: Lab) -> None:
    """A version without an MTU isn't told one; a root image is its root device; no limits are no limiters."""
    run = lab.run("--network", "n1", "--root", str(lab.kernel), PWT_FC_VERSION="1.9.0")
    asked = dict(lab.asked())
    assert asked["/network-interfaces/eth0"].keys() == {"iface_id", "host_dev_name", "guest_mac"}
    assert asked["/drives/root"] == {
        "drive_id": "root",
        "is_root_device": True,
        "path_on_host": str(lab.kernel),
        "is_read_only": False,
    }
    assert "root=" not in asked["/boot-source"]["boot_args"]
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(30 * PATIENCE) == 0, run.errors()
    assert "restore does not re-apply" in run.errors()  # a release with a known fault


def test_killed_vm_run_leaves_nothing(lab: Lab) -> None:
    """SIGKILL of ``vm run`` ends Firecracker; port, namespace, control socket and directory go."""
    run = lab.run("--network", "n1")
    cookie = cookie_of(run)
    (home,) = lab.homes()
    assert (home / "api.sock").is_socket()
    run.process.kill()
    run.process.wait()
    wait_readable(run.qemu, 10, "Firecracker's end")
    wait_until(partial(gone, lab.daemon, cookie), 10, "the port and the namespace to be gone")
    wait_until(lab.nothing_is_left, 10, "sockets and directory to be gone")


def test_killed_start_leaves_nothing(lab: Lab) -> None:
    """So it is after any of the requests by which a guest is started, before one is asked too."""
    for after in ("", "/version", "/machine-config", "/boot-source", "/vm/config", "/network-interfaces/"):
        lab.log.unlink(missing_ok=True)
        process = lab.start("--network", "n1", PWT_FC_FAULT="PUT /actions hang")
        come = partial(_says, lab.log, after) if after else partial(_there, lab)
        wait_until(come, 20, f"the start to come to {after or 'a directory'}")
        process.kill()
        process.wait()
        wait_until(lab.nothing_is_left, 10, f"all to be gone after {after or 'a directory'}")


def test_killed_firecracker_ends_vm_run(lab: Lab) -> None:
    """``vm run`` says so in one line, fails, and nothing is left, the socket that it left neither."""
    run = lab.run("--network", "n1")
    os.kill(run.facts["pid"], signal.SIGKILL)
    assert run.process.wait(30 * PATIENCE) == 1
    assert run.errors() == "portwright: guest 'g.1': Firecracker was killed by SIGKILL\n"
    assert lab.nothing_is_left()


@pytest.mark.parametrize("deaf", ["guest", "both"])
def test_deaf_guest_is_ended(lab: Lab, deaf: str) -> None:
    """A guest that doesn't heed Ctrl-Alt-Del is ended when the patience is, and that is said; a process that
    doesn't heed SIGTERM is killed."""
    run = lab.run("--network", "n1", "--patience", "0.5", PWT_FC_DEAF=deaf)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(30 * PATIENCE) == 0, run.errors()
    assert run.errors() == "portwright: guest 'g.1': the guest did not shut down in time and was ended\n"
    assert lab.asked()[-1] == ("/actions", {"action_type": "SendCtrlAltDel"})


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("PUT /actions refuse", "Firecracker refused PUT /actions"),
        (
            "PUT /network-interfaces/eth0 die",
            f"failed with status {DIED}: the stand-in dies here",
        ),
        ("PUT /boot-source cut", "Firecracker went away before it answered PUT /boot-source"),
        ("PUT /machine-config hang", "no answer to PUT /machine-config within 5 s"),
        ("GET /version garbage", "the answer to GET /version can't be used"),
    ],
)
def test_failed_start_leaves_nothing(lab: Lab, fault: str, said: str) -> None:
    """Whatever goes wrong on the way to a running guest is one error that says what, and nothing is left."""
    process = lab.start("--network", "n1", PWT_FC_FAULT=fault)
    assert process.wait(60 * PATIENCE) == 1
    (line,) = lab.errors.read_text().splitlines()
    assert line.startswith("portwright: guest 'g.1': Firecracker did not start it: ")
    assert said in line
    assert lab.nothing_is_left()


def test_what_it_cannot_is_refused_before_anything_is_made(lab: Lab) -> None:
    """Each option that Firecracker has no meaning for is refused by name, and the executable never runs."""
    for options, said in (
        (
            ["--model", "macvtap"],
            "firecracker does not support ports of model macvtap: it takes no",
        ),
        (["--model", "tap"], "firecracker does not support ports of model tap: "),
        (["--queues", "2"], "firecracker does not support several queues: use one queue"),
        (["--vhost", "on"], "firecracker does not support vhost-net: leave --vhost out"),
        (["--accel", "tcg"], "firecracker does not support CPUs in software: leave --accel out"),
        (["--incoming", "x"], "firecracker does not support vm freeze, vm run --incoming: "),
        (["--netns", "x"], "firecracker does not support vm run --netns: leave --netns out"),
        (["--jail"], "firecracker does not support vm run --jail: leave the jail's options out"),
        (["--cpus", "33"], "vcpu_count"),
        (["--firecracker", "/nonexistent/fc"], "/nonexistent/fc is missing: "),
        (["--vmm", "qemu"], "--firecracker is for --vmm firecracker"),
    ):
        process = lab.start("--network", "n1", *options)
        assert process.wait(60 * PATIENCE) in {1, 2}, options
        assert said in lab.errors.read_text(), (options, lab.errors.read_text())
    assert not lab.log.exists()


def _there(lab: Lab) -> bool:
    return bool(lab.homes())


def _says(log: Path, words: str) -> bool:
    return log.exists() and words in log.read_text()


def _patched(lab: Lab, number: int) -> bool:
    return len(lab.asked("PATCH")) >= number


def _rate(limiter: dict[str, dict[str, int]]) -> Fraction | int:
    """In bits per second; 0 for none."""
    found = limiter["bandwidth"]
    return Fraction(found["size"] * 8000, found["refill_time"]) if found["refill_time"] else 0


def _bucket(found: Any) -> dict[str, int]:
    return {"size": found.size, "refill_time": found.refill_time}
