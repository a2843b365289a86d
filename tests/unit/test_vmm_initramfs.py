from __future__ import annotations

import gzip
import json
import lzma
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from portwright.cli.main import cli
from portwright.model.errors import InvalidInput, NotFound, NotSupported
from portwright.model.network import Route
from portwright.model.port import NetnsRef, Owner, Port, PortAddress, PortState
from portwright.vmm import initramfs
from portwright.vmm.cmdline import network_words
from portwright.vmm.initramfs import Entry, archive, build, load_order

DEP = """\
kernel/drivers/virtio/virtio.ko.xz:
kernel/drivers/virtio/virtio_ring.ko.xz: kernel/drivers/virtio/virtio.ko.xz
kernel/net/core/failover.ko.xz:
kernel/drivers/net/net_failover.ko.xz: kernel/net/core/failover.ko.xz
kernel/drivers/net/virtio-net.ko.xz: kernel/drivers/net/net_failover.ko.xz kernel/net/core/failover.ko.xz \
kernel/drivers/virtio/virtio_ring.ko.xz kernel/drivers/virtio/virtio.ko.xz
"""
NOWHERE = NetnsRef(path="", cookie=1, boot_id="")


def port(ifname: str = "eth0", **facts: object) -> Port:
    """A port of which only what a guest's network needs is interesting."""
    return Port(
        port_id="0123456789abcdef",
        network="n1",
        net_id=1,
        owner=Owner(kind="name", name="g1"),
        model="tcfilter",
        state=PortState.ATTACHED,
        ifname=ifname,
        rep_name="pw01234567",
        mac="02:00:00:00:00:01",
        mtu=1500,
        host=NOWHERE,
        sandbox=NOWHERE,
        **facts,  # type: ignore[arg-type]
    )


def unpacked(tmp_path: Path, data: bytes) -> Path:
    """The archive as cpio(1), which is somebody else's reader, unpacks it."""
    folder = tmp_path / "root"
    folder.mkdir()
    reader = ["busybox", "cpio", "-idm"]
    subprocess.run(reader, input=gzip.decompress(data), cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A folder like /lib/modules/VERSION."""
    folder = tmp_path / "modules"
    for line in DEP.splitlines():
        path = folder / line.split(":")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(path.name.encode()))
    (folder / "modules.dep").write_text(DEP)
    return folder


def test_order_of_modules() -> None:
    """A module comes after all that it needs, each once, and one that is built in is left out."""
    order = load_order(DEP, ["virtio_pci", "virtio_net", "failover"])

    names = [path.rsplit("/", 1)[1].split(".")[0] for path in order]
    assert names == ["virtio", "virtio_ring", "failover", "net_failover", "virtio-net"]


@pytest.mark.skipif(os.geteuid() != 0, reason="unpacking a device node needs root")
def test_archive_is_read_by_cpio(tmp_path: Path, modules: Path) -> None:
    """What we pack, cpio unpacks: init, a busybox that runs, the modules in order, and more files."""
    data = build(modules, extra={"/etc/deep/words": b"hello"})
    root = unpacked(tmp_path, data)

    assert (root / "init").read_bytes() == initramfs.INIT.read_bytes()
    assert (root / "init").stat().st_mode & 0o777 == 0o755
    assert subprocess.check_output([root / "bin/busybox", "echo", "it runs"]) == b"it runs\n"
    assert (root / "bin/sh").readlink() == Path("busybox")
    assert (root / "lib/order").read_text().split() == [
        *("virtio.ko", "virtio_ring.ko", "failover.ko", "net_failover.ko", "virtio-net.ko")
    ]
    assert (root / "lib/virtio-net.ko").read_bytes() == b"virtio-net.ko.xz"
    assert (root / "etc/deep/words").read_bytes() == b"hello"


def test_command_writes_it(tmp_path: Path, modules: Path) -> None:
    """`vm initramfs` writes what build() makes and says how large it is; a failure is one line, status 1."""
    made = tmp_path / "initramfs"
    command = ["vm", "initramfs", "--json", "--modules", str(modules), "--output"]
    done = CliRunner().invoke(cli, [*command, str(made)])

    assert done.exit_code == 0
    assert made.read_bytes() == build(modules)
    assert json.loads(done.stdout) == {"output": str(made), "bytes": made.stat().st_size}
    failed = CliRunner().invoke(cli, [*command, "/nonexistent/x"])
    assert (failed.exit_code, failed.stderr) == (
        1,
        "portwright: can't write /nonexistent/x: No such file or directory\n",
    )


def test_archive_is_the_same_each_time(modules: Path) -> None:
    """The same input gives the same bytes."""
    assert build(modules) == build(modules)


def test_archive_keeps_its_alignment() -> None:
    """Names and contents of every length end on multiples of four, as the kernel's reader wants it."""
    for length in range(1, 9):
        data = archive([Entry("n" * length, 0o100644, b"d" * length)])
        assert len(data) % 4 == 0
        assert data.index(b"070701", 6) % 4 == 0


def test_init_is_a_shell_script() -> None:
    """The shell that runs init in the guest, busybox's, can parse it."""
    subprocess.run(["busybox", "sh", "-n", str(initramfs.INIT)], check=True)


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"modules.dep": None}, NotFound),
        ({"busybox": b"#!/bin/sh\n"}, InvalidInput),
        ({"busybox": None}, NotFound),
        (
            {"modules.dep": b"a/virtio_net.ko.zst:\n", "a/virtio_net.ko.zst": b""},
            NotSupported,
        ),
    ],
)
def test_what_is_missing_is_named(modules: Path, files: Mapping[str, bytes | None], error: type) -> None:
    """What can't be built from is an error of ours, and never half an archive."""
    for name, content in files.items():
        path = modules / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
    busybox = modules / "busybox" if "busybox" in files else initramfs.BUSYBOX
    with pytest.raises(error):
        build(modules, busybox=busybox)


def test_dynamic_busybox_is_refused() -> None:
    """A program that needs shared libraries, which the guest has none of, is refused with the way out."""
    with pytest.raises(InvalidInput, match="install busybox-static"):
        initramfs.build(Path("/nonexistent"), busybox=Path("/bin/true"))


def test_network_as_words() -> None:
    """A port's addresses of both families, and its routes, each through its gateway, with all it has."""
    words = network_words(
        [
            port(
                addresses=(
                    PortAddress(address="10.0.0.2", gateway="169.254.1.1"),
                    PortAddress(address="10.1.0.2", gateway="169.254.1.1"),
                    PortAddress(address="fd00::2", gateway="fe80::1"),
                ),
                routes=(
                    Route(dst="0.0.0.0/0"),
                    Route(dst="10.9.0.0/16", gw="10.0.0.1", mtu=1400, advmss=1360, priority=5, table=7),
                    Route(dst="10.8.0.0/16", scope=253),
                    Route(dst="::/0"),
                ),
            )
        ]
    )

    assert words == [
        "portwright.nic=eth0,02:00:00:00:00:01,1500",
        "portwright.addr=eth0,10.0.0.2/32",
        "portwright.addr=eth0,10.1.0.2/32",
        "portwright.addr=eth0,fd00::2/128",
        "portwright.route=eth0,169.254.1.1/32,scope=253",
        "portwright.route=eth0,0.0.0.0/0,via=169.254.1.1",
        "portwright.route=eth0,10.9.0.0/16,via=10.0.0.1,mtu=1400,advmss=1360,metric=5,table=7",
        "portwright.route=eth0,10.8.0.0/16,scope=253",
        "portwright.route=eth0,::/0,via=fe80::1",
    ]


def test_gateway_of_two_ports_is_one_route() -> None:
    """A route to a gateway that both ports have is there once; a global IPv6 gateway gets one as well."""
    shared = PortAddress(address="10.0.0.2", gateway="169.254.1.1")
    other = PortAddress(address="fd00::2", gateway="fd00::1")
    words = network_words([port(addresses=(shared,)), port("eth1", addresses=(shared, other))])

    assert [word for word in words if word.startswith("portwright.route=")] == [
        "portwright.route=eth0,169.254.1.1/32,scope=253",
        "portwright.route=eth1,fd00::1/128",
    ]
