"""End to end: TCP between a container and a QEMU guest in software emulation, per attachment model.

All guests run at once and idle but for the one that is measured. The last two contenders are guests of ours
on tcfilter whose tap was joined with the namespace's device another way, by hand: what differs is that alone.
Emulation is by far the most of what is measured; it hides what bench/microvm.py shows.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.figures import Goal, Part, Series, number
from bench.lab import OurHost
from bench.microvm import BRIDGE, MACVTAP, MIRRED, TCFILTER
from bench.traffic import turned
from lab import kernels
from portwright.vmm import initramfs
from tests.deadline import wait_until
from tests.fix_daemon import PORTWRIGHT
from tests.guests import disk

TAP = "portwright tap"
_MODELS = {
    TCFILTER: "tcfilter",
    f"portwright {MACVTAP}": "macvtap",
    TAP: "tap",
    MIRRED: "tcfilter",
    BRIDGE: "tcfilter",
}
_NETWORK, _BOOT_WITHIN = "n1", 120.0
_WAYS: dict[str, tuple[str, ...]] = {"to the guest": (), "from the guest": ("-R",)}


class Guest:
    """A running ``vm run``; ``inside`` is the prefix of a command in its namespace."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        host: OurHost,
        image: tuple[Path, Path, Path],
        name: str,
        model: str,
    ) -> None:
        kernel, ramdisk, root = image
        self._console = host.base / f"{name}.console"
        copy = host.base / f"{name}.disk"
        shutil.copy(root, copy)
        command = [
            *(
                "nsenter",
                f"--net={host.ns.path}",
                "--",
                str(PORTWRIGHT),
                "vm",
                "run",
                "--json",
                "--accel",
                "tcg",
            ),
            *("--kernel", str(kernel), "--initramfs", str(ramdisk), "--root", str(copy), "--memory", "128"),
            *("--network", _NETWORK, "--name", name, "--model", model, "--console", str(self._console)),
        ]
        process = subprocess.Popen(
            command, env=host.daemon.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        stack.enter_context(process)
        stack.callback(process.kill)
        assert process.stdout is not None
        said = process.stdout.readline()
        if not said:
            raise RuntimeError(f"no guest {name} on {model}")
        self.facts: dict[str, Any] = json.loads(said)
        self.address = next(a for a in self.facts["nics"][0]["addresses"] if ":" not in a)
        self.inside = ["nsenter", f"--net=/proc/{self.facts['pid']}/ns/net", "--"]

    def ready(self) -> None:
        """Wait until it serves."""
        try:
            wait_until(lambda: "on a disk" in self._console.read_text(), _BOOT_WITHIN, "a guest to serve")
        except AssertionError as error:
            said = self._console.read_text()[-2000:]
            raise RuntimeError(f"{self.facts['name']} does not serve; its console's end: {said}") from error

    def joined_by_hand(self, commands: Callable[[str, str, str], list[str]]) -> None:
        """Take our join away; ``commands`` make another of device, tap and the guest's MAC."""
        nic = self.facts["nics"][0]
        device, tap = nic["ifname"], nic["tap"]
        for command in (
            f"tc qdisc del dev {device} clsact",
            f"tc qdisc del dev {tap} clsact",
            *commands(device, tap, nic["mac"]),
        ):
            subprocess.run([*self.inside, *command.split()], check=True)


def _mirred(device: str, tap: str, _mac: str) -> list[str]:
    match = "protocol all u32 match u32 0 0 action mirred egress redirect dev"
    return [
        *(f"tc qdisc add dev {one} ingress" for one in (device, tap)),
        *(f"tc filter add dev {one} parent ffff: {match} {to}" for one, to in ((device, tap), (tap, device))),
    ]


def _bridge(device: str, tap: str, mac: str) -> list[str]:
    # A bridge keeps what is for a MAC of its own or its ports', and the guest's is on all ends here.
    return [
        "ip link add br0 address 02:00:00:00:00:09 type bridge mcast_snooping 0",
        "ip link set br0 addrgenmode none",
        "ip link set br0 up",
        *(f"ip link set {one} master br0" for one in (device, tap)),
        f"bridge fdb del {mac} dev {device} master",  # one entry, of the first that has it
    ]


def guests(rounds: int, seconds: float) -> Part:
    """All of it, contenders in turn."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"pwt-{os.getpid()}-")))
        kernel = kernels.fetched("6.12") or kernels.fetched("6.1")
        if kernel is None:
            raise RuntimeError(f"no kernel in {kernels.store()}: make lab KERNEL=6.12 downloads one")
        ramdisk = folder / "initramfs"
        ramdisk.write_bytes(initramfs.build(kernel.modules))
        host = OurHost()
        stack.callback(host.close)
        with host.daemon.client() as client:
            client.network_create(_NETWORK, subnets=["10.99.0.0/24"])
            near = host.sandbox()
            client.port_create(_NETWORK, near.path, name="near")
        # Whoever deletes a guest's port does so a moment after the guest's end.
        stack.callback(wait_until, lambda: not _guests_ports(host), 30, "the guests' ports to be gone")
        image = (kernel.image, ramdisk, disk.build(folder))
        made: dict[str, Guest] = {}
        for number_, (name, model) in enumerate(_MODELS.items()):
            made[name] = Guest(stack, host, image, f"g{number_}", model)
            made[name].ready()  # one boots at a time
        made[MIRRED].joined_by_hand(_mirred)
        made[BRIDGE].joined_by_hand(_bridge)
        found: dict[str, dict[str, list[float]]] = {way: {name: [] for name in made} for way in _WAYS}
        for turn in range(rounds + 1):
            for name in turned(tuple(made), turn):
                for way, options in _WAYS.items():
                    gigabits = _iperf3(near.ns.path.name, made[name].address, seconds, options)
                    if turn:  # the first round resolves neighbours, and warms up emulation
                        found[way][name].append(gigabits)
    how = f"iperf3, one stream of {seconds:g} s a round; QEMU in software emulation, one CPU and queue"
    series = [
        Series(f"TCP {way}, end to end", "Gb/s", samples, "more", how, TCFILTER)
        for way, samples in found.items()
    ]
    figures = [
        f"{way} {number(one.spread(TCFILTER).median)} Gb/s" for way, one in zip(_WAYS, series, strict=True)
    ]
    carried = all(sample > 0 for one in series for samples in one.samples.values() for sample in samples)
    goal = Goal(
        "end to end with a TCG guest, every model and join carries", carried, f"tcfilter {', '.join(figures)}"
    )
    return Part("guests", series, [goal])


def _guests_ports(host: OurHost) -> list[str]:
    with host.daemon.client() as client:
        return [port.port_id for port in client.port_list() if port.model != "veth"]


def quick() -> Part:
    """Whether it works."""
    return guests(1, 1)


def _iperf3(namespace: str, address: str, seconds: float, options: tuple[str, ...]) -> float:
    """Gigabits a second that arrived."""
    command = [
        "ip",
        "netns",
        "exec",
        namespace,
        "iperf3",
        "-J",
        "-c",
        address,
        "-t",
        f"{seconds:g}",
        *options,
    ]
    said: dict[str, Any] = {}

    def done() -> bool:
        """Its server listens anew for each run, and resets who comes a moment before that."""
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        said.update(json.loads(ran.stdout))
        return "sum_received" in said["end"]

    wait_until(done, 30, "iperf3's server to be there")
    return float(said["end"]["sum_received"]["bits_per_second"]) / 1e9
