"""One guest is frozen by QEMU and runs again three times: each copy at an address of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from portwright.kernel import tap
from portwright.model.port import Port
from portwright.vmm.cmdline import network_words
from tests.deadline import PATIENCE, wait_until
from tests.fix_daemon import Daemon, Networks, Sandbox
from tests.fix_netns import NetnsFactory, TestNetns
from tests.guests.conftest import Image, booted
from tests.netns.clone_lab import entries

pytestmark = [pytest.mark.guests, pytest.mark.slow, pytest.mark.timeout(300)]

#: Seconds that an answer of QEMU may take, and a guest's.
ANSWER_WITHIN, HEARD_WITHIN = 30.0, 20.0


class Qemu:
    """A QEMU without anything but a serial line, a card on the port's tap, and QMP by a socket pair."""

    def __init__(self, box: TestNetns, port: Port, image: Image, console: Path, *more: str) -> None:
        """Started, and not running before ``cont``. ``more`` are further arguments."""
        near, far = socket.socketpair()
        card = tap.open_queue(box.fd, port.tap)
        words = [*network_words([port]), f"portwright.host={port.owner.name}", "portwright.httpd=80"]
        incoming = [int(word.removeprefix("fd:")) for word in more if word.startswith("fd:")]
        with box.entered():
            self.process = subprocess.Popen(
                [
                    *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-S"),
                    *("-machine", "q35,usb=off", "-accel", "tcg", "-cpu", "max", "-m", "128"),
                    *("-kernel", str(image.kernel), "-initrd", str(image.initramfs)),
                    *("-append", " ".join(["console=ttyS0", "quiet", "tsc=unstable", *words])),
                    *("-serial", f"file:{console}"),
                    *("-chardev", f"socket,id=qmp,fd={far.fileno()},server=off", "-mon", "qmp,mode=control"),
                    *("-netdev", f"tap,id=net0,fd={card}"),
                    *("-device", f"virtio-net-pci,netdev=net0,mac={port.mac},host_mtu={port.mtu},romfile="),
                    *more,
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=[far.fileno(), card, *incoming],
            )
        far.close()
        os.close(card)
        near.settimeout(ANSWER_WITHIN * PATIENCE)
        self._socket, self._lines = near, near.makefile("rb")
        json.loads(self._lines.readline())
        self.tell("qmp_capabilities")

    def tell(self, command: str, fd: int | None = None, **arguments: object) -> Any:
        """Have it done; its answer."""
        said = json.dumps({"execute": command, "arguments": arguments}).encode()
        socket.send_fds(self._socket, [said], [] if fd is None else [fd])
        while True:
            answer = json.loads(self._lines.readline())
            if "event" not in answer:
                assert "return" in answer, answer
                return answer["return"]

    def freeze(self, state: Path) -> None:
        """All of the guest into a file; it stands still then."""
        self.tell("stop")
        with state.open("wb") as out:
            self.tell("getfd", out.fileno(), fdname="state")
            self.tell("migrate", uri="fd:state")
            wait_until(self._frozen, ANSWER_WITHIN, "the guest's state to be written")

    def _frozen(self) -> bool:
        status = self.tell("query-migrate").get("status")
        assert status != "failed"
        return bool(status == "completed")

    def thawed(self) -> bool:
        """Whether all of a state has been read, and it may run."""
        return self.tell("query-status")["status"] in ("paused", "prelaunch", "postmigrate")

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self._lines.close()
        self._socket.close()


@contextmanager
def qemu(box: TestNetns, port: Port, image: Image, console: Path, *more: str) -> Iterator[Qemu]:
    """As Qemu; gone at the end."""
    made = Qemu(box, port, image, console, *more)
    try:
        yield made
    finally:
        made.close()


def test_one_guest_three_times(
    daemon: Daemon, networks: Networks, netns_factory: NetnsFactory, image: Image, console: Path
) -> None:
    """A guest on a port is frozen, and restored twice, on the ports of clones; the first runs on. All three
    answer at once, each at the address of its port, by echo and HTTP in both families; nobody has said
    a word to the guests, whose MAC and addresses are the same."""
    networks("n1")
    state = console.with_name("state")
    with ExitStack() as stack, daemon.client() as client:
        box = netns_factory()
        first = client.port_create("n1", box.path, name="first", model="tcfilter")
        original = stack.enter_context(qemu(box, first, image, console))
        original.tell("cont")
        booted(console)
        answers(daemon, Sandbox(box, first))
        original.freeze(state)
        guests = [Sandbox(box, first)]
        for name in ("left", "right"):
            home = netns_factory()
            port = client.port_create(
                "n1",
                home.path,
                name=name,
                model="tcfilter",
                mac=first.mac,
                inner_addresses=[a.address for a in first.addresses],
            )
            with state.open("rb") as saved:
                more = ("-incoming", f"fd:{saved.fileno()}")
                copy = stack.enter_context(qemu(home, port, image, console.with_name(name), *more))
            wait_until(copy.thawed, ANSWER_WITHIN, "the state to be read")
            copy.tell("cont")
            guests.append(Sandbox(home, port))
        original.tell("cont")
        assert len({a for one in guests for a in (one.ip4, one.ip6)}) == 6
        for one in (*guests, *guests):
            answers(daemon, one)
        assert set(entries(daemon).values()) == {one.port.port_id for one in guests[1:]}
        for one in guests[1:]:
            totals = client.stats(one.port.port_id)[0]
            assert totals.from_port.total.packets > 0
            assert {d.reason for d in client.drops(one.port.port_id)} <= {"ethertype"}  # QEMU's RARP


def answers(daemon: Daemon, one: Sandbox) -> None:
    """AssertionError unless the guest does, at its port's addresses."""
    for address in (one.ip4, one.ip6):
        wait_until(partial(_pings, daemon, address), HEARD_WITHIN, f"{one.port.owner.name} at {address}")
        url = f"http://[{address}]/" if ":" in address else f"http://{address}/"
        assert daemon.host.run(["curl", "-s", "--max-time", "10", url]).stdout == "first\n"


def _pings(daemon: Daemon, address: str) -> bool:
    return daemon.host.run(["ping", "-n", "-c1", "-W2", address], check=False).returncode == 0
