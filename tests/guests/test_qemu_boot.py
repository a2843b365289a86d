"""A guest under QEMU on a plain tap: its network, its ends, and what is left of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from portwright.kernel import tap
from portwright.model.errors import Conflict
from portwright.model.network import Route
from portwright.model.port import NetnsRef, Owner, Port, PortAddress, PortState
from portwright.vmm.cards import open_card
from portwright.vmm.cmdline import network_words
from portwright.vmm.contract import CardFailed
from portwright.vmm.driver import Console, End, GuestFailed
from portwright.vmm.initramfs import BUSYBOX
from portwright.vmm.qemu import Guest
from portwright.vmm.spec import GuestSpec, Nic
from tests.deadline import wait_readable, wait_until
from tests.fix_netns import TestNetns, open_fds
from tests.guests.conftest import Image, booted

pytestmark = [pytest.mark.guests, pytest.mark.slow, pytest.mark.timeout(300)]

TAP, MAC, MTU = "tap0", "02:00:00:00:00:05", 1400
NOWHERE = NetnsRef(path="", cookie=1, boot_id="")
PORT = Port(
    port_id="0123456789abcdef",
    network="n1",
    net_id=1,
    owner=Owner(kind="name", name="g1"),
    model="tcfilter",
    state=PortState.ATTACHED,
    ifname="eth0",
    rep_name="pw01234567",
    mac=MAC,
    mtu=MTU,
    host=NOWHERE,
    sandbox=NOWHERE,
    tap=TAP,
    addresses=(
        PortAddress(address="10.5.0.2", gateway="169.254.1.1"),
        PortAddress(address="10.6.0.2", gateway="169.254.1.1"),
        PortAddress(address="fd05::2", gateway="fe80::1"),
    ),
    routes=(Route(dst="0.0.0.0/0"), Route(dst="::/0", mtu=1300, priority=7)),
)
#: Reached by the guest's default routes only: on the loopback device of the tap's namespace.
FAR4, FAR6 = "10.99.0.1", "fd99::1"


@pytest.fixture
def box(netns_factory: Callable[[], TestNetns]) -> Iterator[TestNetns]:
    """A namespace with a tap whose other side is what a port's gateway is."""
    ns = netns_factory()
    tap.create(ns.fd, TAP)
    lines = [
        f"addr add {FAR4}/32 dev lo",
        f"addr add {FAR6}/128 dev lo",
        f"link set {TAP} mtu {MTU} up",
        f"addr add 169.254.1.1/32 dev {TAP}",
        f"addr add fe80::1/64 dev {TAP} nodad",
        *(f"route add {a.address} dev {TAP}" for a in PORT.addresses),
    ]
    ns.run(["ip", "-batch", "-"], input="".join(f"{line}\n" for line in lines))
    before = open_fds()
    yield ns
    assert open_fds() == before


@pytest.fixture
def spec(image: Image) -> GuestSpec:
    """A guest on that tap."""
    return GuestSpec(
        name="g1",
        kernel=str(image.kernel),
        initramfs=str(image.initramfs),
        append=" ".join([*network_words([PORT]), "portwright.host=g1", "portwright.httpd=80"]),
        memory=128,
        nics=(Nic(tap=TAP, mac=MAC, mtu=MTU),),
        accel="tcg",
    )


@contextlib.contextmanager
def written(console: Path) -> Iterator[Console]:
    """A console that is written to the file, and says nothing to the guest."""
    with console.open("wb") as out, Path(os.devnull).open("rb") as nothing:
        yield Console(nothing.fileno(), out.fileno())


@contextlib.asynccontextmanager
async def running(spec: GuestSpec, box: TestNetns, console: Path) -> AsyncIterator[Guest]:
    """A started guest, gone at the end."""
    with written(console) as where:
        guest = await Guest.start(spec, box.fd, where)
    try:
        yield guest
    finally:
        await guest.quit()


def where_and_what(pid: int) -> tuple[str, list[str]]:
    """A process's network namespace, and what its descriptors are."""
    process = Path(f"/proc/{pid}")
    held = [str(path.readlink()) for path in (process / "fd").iterdir()]
    return str((process / "ns/net").readlink()), held


def pings(box: TestNetns, address: str, *options: str) -> bool:
    return box.run(["ping", "-n", "-c1", "-W1", *options, address], check=False).returncode == 0


def test_guest_has_its_port(spec: GuestSpec, box: TestNetns, console: Path) -> None:
    """A guest answers on every address of its port through its gateways, with the port's MTU, serves HTTP in
    both families, and shuts down when its power button is pressed; then its tap is free."""

    async def check() -> End:
        async with running(spec, box, console) as guest:
            await asyncio.to_thread(booted, console)
            for address in PORT.addresses:
                far = FAR6 if ":" in address.address else FAR4
                assert pings(box, address.address, "-I", far), address
            assert pings(box, "10.5.0.2", "-M", "do", "-s", str(MTU - 28))
            for host in ("10.5.0.2", "[fd05::2]"):
                assert box.run(["curl", "-s", "--max-time", "5", f"http://{host}/"]).stdout == "g1\n"
            with pytest.raises(Conflict):
                tap.open_queue(box.fd, TAP)
            return await guest.shutdown(60)

    end = asyncio.run(check())

    assert end == End(0, "guest-shutdown")
    assert end.ok
    said = console.read_text()
    assert f"portwright: eth0 is {MAC}, mtu {MTU}, queues 1\n" in said.replace("\r", "")
    assert "failed" not in said
    os.close(tap.open_queue(box.fd, TAP))


def test_guest_goes_on_from_its_disk(spec: GuestSpec, box: TestNetns, console: Path, tmp_path: Path) -> None:
    """A guest with a root image runs that image's init, in the port's network, and can write to its disk."""
    tree = tmp_path / "tree"
    for folder in ("bin", "sbin"):
        (tree / folder).mkdir(parents=True)
    shutil.copy(BUSYBOX, tree / "bin/busybox")
    script = """\
        #!/bin/busybox sh
        export PATH=/bin
        busybox --install /bin
        echo written by the guest >/note
        sync
        echo "portwright: ready, on a disk, as process $$"
        while :; do sleep 1000; done
    """
    (tree / "sbin/init").write_text(textwrap.dedent(script))
    (tree / "sbin/init").chmod(0o755)
    image = tmp_path / "a,disk"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image), "16M"], check=True)

    async def check() -> End:
        async with running(replace(spec, root=str(image)), box, console) as guest:
            await asyncio.to_thread(booted, console)
            for address in PORT.addresses:
                assert pings(box, address.address), address
            return await guest.quit()

    assert asyncio.run(check()) == End(0, "host-qmp-quit")
    assert "on a disk, as process 1" in console.read_text()
    read = ["debugfs", "-R", "cat /note", str(image)]
    assert subprocess.run(read, check=True, capture_output=True, text=True).stdout == "written by the guest\n"


def test_end_by_panic_is_a_failure(spec: GuestSpec, box: TestNetns, console: Path) -> None:
    """A guest whose kernel panics ends by itself, and that is no good end."""

    async def check() -> End:
        async with running(replace(spec, append="rdinit=/nothing init=/nothing"), box, console) as guest:
            return await guest.wait()

    end = asyncio.run(check())

    assert (end.reason, end.ok) == ("guest-reset", False)
    assert "panic" in console.read_text()


def test_killed_qemu_is_noticed(spec: GuestSpec, box: TestNetns, console: Path) -> None:
    """When somebody kills QEMU, whoever waits for the guest is told how it ended."""

    async def check() -> End:
        async with running(spec, box, console) as guest:
            os.kill(guest.pid, signal.SIGKILL)
            return await guest.wait()

    end = asyncio.run(check())

    assert (end, end.ok) == (End(-signal.SIGKILL), False)
    assert str(end) == "QEMU was killed by SIGKILL"


def test_refused_start_leaves_nothing(spec: GuestSpec, box: TestNetns, console: Path) -> None:
    """What QEMU refuses is one error with its words, and neither a process nor an open tap stays."""
    console.write_text("no kernel")

    async def check() -> None:
        async with running(replace(spec, kernel=str(console)), box, console.with_name("other")):
            pass

    with pytest.raises(GuestFailed, match=r"guest 'g1': QEMU did not start it: .*kernel") as caught:
        asyncio.run(check())

    assert caught.value.code == "guest"
    os.close(tap.open_queue(box.fd, TAP))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("sys.modules['qemu'] = sys.modules['qemu.qmp'] = None", "the Python package qemu.qmp is missing"),
        ("os.environ['PATH'] = '/nonexistent'", "qemu-system-x86_64 is missing"),
    ],
)
def test_what_is_not_installed_is_named(spec: GuestSpec, spoil: str, said: str) -> None:
    """Without the package or the program the error names it, and how it is had, before anything is made."""
    code = f"""
        import os, sys
        {spoil}
        from portwright.vmm.qemu import *
        from portwright.vmm.spec import GuestSpec, Nic
        try:
            prepare({spec!r})
        except GuestFailed as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )

    assert done.stdout.startswith(f"guest 'g1': {said}: "), done.stderr
    assert "install" in done.stdout


def test_qemu_has_nothing_of_ours(spec: GuestSpec, box: TestNetns, console: Path) -> None:
    """QEMU is in the sandbox's namespace, and holds none of our descriptors but tap, QMP and console."""

    async def check() -> tuple[str, list[str]]:
        async with running(spec, box, console) as guest:
            return where_and_what(guest.pid)

    with Path("/etc/hostname").open() as ours:
        os.set_inheritable(ours.fileno(), True)
        namespace, held = asyncio.run(check())

    assert namespace == f"net:[{os.fstat(box.fd).st_ino}]"
    assert held.count("/dev/net/tun") == 1
    assert "/etc/hostname" not in held
    files = {name for name in held if name.startswith("/") and not name.startswith("/dev/")}
    assert files <= {str(console), "/memfd:qemu-stderr (deleted)"}


def test_killed_runner_takes_qemu_along(spec: GuestSpec, box: TestNetns, console: Path) -> None:
    """SIGKILL of the process that started the guest ends QEMU, and with it its hold on the tap."""
    code = textwrap.dedent(f"""
        import asyncio, sys
        from portwright.kernel.netns import open_netns
        from portwright.vmm.qemu import Console, Guest
        from portwright.vmm.spec import GuestSpec, Nic
        async def main():
            guest = await Guest.start({spec!r}, open_netns({box.path!r}), Console(0, 2))
            print(guest.pid, flush=True)
            await guest.wait()
        asyncio.run(main())
    """)
    with console.open("wb") as out:
        runner = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=out
        )
    assert runner.stdout is not None
    with runner.stdout:
        pid = int(runner.stdout.readline() or pytest.fail(console.read_text()))
    handle = os.pidfd_open(pid)
    try:
        runner.kill()
        runner.wait()
        wait_readable(handle, 10, "QEMU's end")
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
    wait_until(partial(_is_free, box), 5, "the tap to be free")


def _is_free(box: TestNetns) -> bool:
    with contextlib.suppress(Conflict):
        os.close(tap.open_queue(box.fd, TAP))
        return True
    return False


@pytest.mark.parametrize(("number", "mac"), [(0, "02:00:00:00:00:06"), (5, "02:00:00:00:00:0x")])
def test_refused_card_leaves_nothing(
    spec: GuestSpec, box: TestNetns, console: Path, number: int, mac: str
) -> None:
    """A card that QEMU refuses, for its root port or for what it is, leaves neither a descriptor nor a name
    in QEMU: the same tap is plugged right afterwards, and unplugged."""
    tap.create(box.fd, "tap1", multi_queue=True)
    nic = Nic(tap="tap1", mac="02:00:00:00:00:07", mtu=MTU, queues=2)

    async def check() -> None:
        async with running(spec, box, console) as guest:
            before = sorted(where_and_what(guest.pid)[1])
            with open_card(nic, box.fd) as card, pytest.raises(CardFailed, match="QEMU did not take it"):
                await guest.cards.plug(number, replace(nic, mac=mac), card, "eth1")
            assert sorted(where_and_what(guest.pid)[1]) == before
            with open_card(nic, box.fd) as card:
                await guest.cards.plug(5, nic, card, "eth1")
            assert where_and_what(guest.pid)[1].count("/dev/net/tun") == 3
            gone = asyncio.Event()
            guest.cards.deleted = lambda _: gone.set()
            await asyncio.to_thread(booted, console)
            await guest.cards.ask_back(5, "eth1")
            async with asyncio.timeout(30):
                await gone.wait()
            await guest.cards.drop(5)
            assert where_and_what(guest.pid)[1].count("/dev/net/tun") == 1

    asyncio.run(check())
    with open_card(nic, box.fd):
        pass
