"""The file of a frozen guest: its first line, and that there is a whole one or none."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from portwright.model.errors import Conflict, InvalidInput, KernelFailed, NotSupported
from portwright.model.port import NetnsRef, Owner, Port, PortAddress, PortState
from portwright.vmm import frozen
from portwright.vmm.spec import GuestSpec

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
    mac="02:00:00:00:00:05",
    mtu=1400,
    host=NOWHERE,
    sandbox=NOWHERE,
    tap="tap01234567",
    addresses=(PortAddress(address="10.5.0.2", gateway="169.254.1.1"),),
)
SPEC = GuestSpec(name="g1", kernel="/k", initramfs="/i", memory=128, cpus=2, accel="tcg")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """The guest that goes on has all that the frozen one had, and the state begins where it was written; the
    addresses of a copy's copy are those inside."""
    path = tmp_path / "guest"
    copied = msgspec.structs.replace(PORT, inner_addresses=("198.51.100.2",))
    guest = frozen.describe(SPEC, [PORT, copied])
    with frozen.written(path, guest) as fd:
        os.write(fd, b"state")
        assert not path.exists()

    assert frozen.read(path) == guest
    assert [nic.addresses for nic in guest.nics] == [("10.5.0.2",), ("198.51.100.2",)]
    assert guest.spec("g2", "/f") == replace(SPEC, name="g2", incoming="/f")
    with frozen.state(path) as fd:
        assert os.read(fd, 100) == b"state"


def test_there_is_a_whole_file_or_none(tmp_path: Path) -> None:
    """A failure leaves nothing, and what is there is not written over, though it came meanwhile."""
    path, guest = tmp_path / "guest", frozen.describe(SPEC, [PORT])
    with pytest.raises(ZeroDivisionError), frozen.written(path, guest):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Conflict, match="is there already"), frozen.written(path, guest):
        path.write_bytes(b"theirs")
    with pytest.raises(Conflict, match="is there already"), frozen.written(path, guest):
        raise AssertionError
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"theirs"]
    with pytest.raises(KernelFailed, match="ENOENT"), frozen.written(tmp_path / "no" / "guest", guest):
        raise AssertionError


def test_what_can_not_be_a_copy_is_refused(tmp_path: Path) -> None:
    """A disk that all would write to, a model whose ports rewrite nothing, a file that is something else."""
    with pytest.raises(NotSupported, match="a root image"):
        frozen.describe(replace(SPEC, root="/disk"), [PORT])
    with pytest.raises(NotSupported, match="macvtap does not support freezing"):
        frozen.describe(SPEC, [msgspec.structs.replace(PORT, model="macvtap")])
    path = tmp_path / "guest"
    newer = msgspec.structs.replace(frozen.describe(SPEC, [PORT]), format="portwright-guest-2")
    for said, why in (
        (b"", "is no guest"),
        (os.urandom(5000), "is no guest"),
        (b"{}".ljust(4096), "is no guest"),
        (msgspec.json.encode(newer).ljust(4096), "of the format 'portwright-guest-2'"),
    ):
        path.write_bytes(said)
        with pytest.raises(InvalidInput, match=why):
            frozen.read(path)
    with pytest.raises(KernelFailed, match="ENOENT"):
        frozen.read(tmp_path / "none")
