from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from portwright.model.errors import InvalidInput, NotSupported
from portwright.vmm import accel, vhost
from portwright.vmm.cards import Card
from portwright.vmm.driver import End
from portwright.vmm.spec import MAX_COMMAND_LINE, MAX_NICS, GuestSpec, Nic, check, command_line, qemu_args

NIC = Nic(tap="tap01234567", mac="02:00:00:00:00:01", mtu=1500)
SPEC = GuestSpec(name="g1", kernel="/k", initramfs="/i", append="quiet", memory=128, nics=(NIC,), accel="tcg")


def options(args: list[str], name: str) -> list[str]:
    """The values of every option of that name."""
    return [args[index + 1] for index, arg in enumerate(args) if arg == name]


def test_qemu_arguments() -> None:
    """The arguments are the guest: its size, its kernel, a NIC on a passed descriptor, QMP on another."""
    args = qemu_args(SPEC, qmp=7, agent=8, cards=[Card((9,))])

    assert options(args, "-name") == ["guest=g1"]
    assert options(args, "-m") == ["128"]
    assert options(args, "-smp") == ["1"]
    assert options(args, "-accel") == ["tcg"]
    assert options(args, "-kernel") == ["/k"]
    assert options(args, "-initrd") == ["/i"]
    emulated = "mitigations=off no5lvl no_timer_check"
    assert options(args, "-append") == [f"console=ttyS0 panic=-1 quiet {emulated} quiet"]
    assert options(args, "-netdev") == ["tap,id=net0,fd=9"]
    devices = options(args, "-device")
    assert devices[:2] == [
        "virtio-serial-pci,max_ports=2",
        "virtserialport,chardev=agent,name=portwright.0",
    ]
    assert devices[-1] == (
        "virtio-net-pci,id=nic0,netdev=net0,bus=slot0,mac=02:00:00:00:00:01,host_mtu=1500,romfile="
    )
    assert options(args, "-chardev") == [
        "socket,id=qmp,fd=7,server=off",
        "stdio,id=console,signal=off,mux=off",
        "socket,id=agent,fd=8,server=off",
    ]
    assert "-nodefaults" in args
    assert "-drive" not in args


def test_root_ports() -> None:
    """There is a root port for each card that a guest may ever have, each in a place of its own."""
    devices = options(qemu_args(SPEC, qmp=7, agent=8, cards=[Card((9,))]), "-device")
    ports = [device for device in devices if device.startswith("pcie-root-port,")]

    assert len(ports) == MAX_NICS
    assert ports[0] == ("pcie-root-port,id=slot0,chassis=1,io-reserve=0,addr=10.0,multifunction=on")
    assert ports[9] == "pcie-root-port,id=slot9,chassis=10,io-reserve=0,addr=11.1"
    assert len({port.split("addr=")[1] for port in ports}) == MAX_NICS


def test_no_network_without_a_nic() -> None:
    """A guest without NICs has no network at all: QEMU's own, through the host's stack, is never there."""
    args = qemu_args(replace(SPEC, nics=()), qmp=7, agent=8, cards=[])

    assert "-nodefaults" in args
    assert not {"-netdev", "-nic", "-net"} & set(args)


def test_queues_of_a_nic() -> None:
    """A NIC of several queues gets a descriptor and two vectors for each, and two more."""
    spec = replace(SPEC, nics=(replace(NIC, queues=2),))
    args = qemu_args(spec, qmp=7, agent=8, cards=[Card((9, 10))])

    assert options(args, "-netdev") == ["tap,id=net0,fds=9:10"]
    assert options(args, "-device")[-1].endswith(",mq=on,vectors=6")


def test_taps_of_two_namespaces_are_refused() -> None:
    """Whose news would QEMU be told? All NICs of a guest are of one namespace."""
    with pytest.raises(InvalidInput, match=r"nics\[1\].home"):
        check(replace(SPEC, nics=(NIC, replace(NIC, mac="02:00:00:00:00:02", home=7))))


def test_vhost_of_a_nic() -> None:
    """A NIC with vhost-net gets a descriptor of it for each queue."""
    args = qemu_args(SPEC, qmp=7, agent=8, cards=[Card((9,), (11,))])
    assert options(args, "-netdev") == ["tap,id=net0,fd=9,vhost=on,vhostfd=11"]

    spec = replace(SPEC, nics=(replace(NIC, queues=2),))
    args = qemu_args(spec, qmp=7, agent=8, cards=[Card((9, 10), (11, 12))])
    assert options(args, "-netdev") == ["tap,id=net0,fds=9:10,vhost=on,vhostfds=11:12"]


@pytest.mark.parametrize("there", [True, False])
def test_vhost_is_chosen(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """``auto`` is what the kernel has, ``off`` is off, and ``on`` without it is an error with the way out."""
    monkeypatch.setattr(vhost, "lacking", lambda: "" if there else "/dev/vhost-net: Permission denied")
    assert (vhost.choose("auto"), vhost.choose("off")) == (there, False)
    if there:
        assert vhost.choose("on")
    else:
        with pytest.raises(NotSupported, match=r"Permission denied.*modprobe vhost_net, or use --vhost off"):
            vhost.choose("on")


def test_what_lacks_of_vhost_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No such device, and one that is something else."""
    monkeypatch.setattr(vhost, "_DEVICE", str(tmp_path / "vhost-net"))
    assert vhost.lacking() == f"{tmp_path}/vhost-net: No such file or directory"
    monkeypatch.setattr(vhost, "_DEVICE", os.devnull)
    assert "is no vhost-net" in vhost.lacking()


def test_root_image() -> None:
    """A root image is the first disk; a comma in its name stays one name; and kvm gets the host's CPU."""
    args = qemu_args(
        replace(SPEC, initramfs="", root="/a,b.img", accel="kvm"), qmp=7, agent=8, cards=[Card((9,))]
    )

    assert options(args, "-drive") == ["file=/a,,b.img,id=root,if=none,format=raw"]
    assert "root=/dev/vda rw" in options(args, "-append")[0]
    assert options(args, "-cpu") == ["host"]
    assert "-initrd" not in args


def test_appended_words_come_last() -> None:
    """What the caller appends is behind our own words, so that the kernel takes the caller's."""
    assert command_line(replace(SPEC, append="panic=5")).endswith(" panic=5")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "-x"}, "name"),
        ({"name": "a,b"}, "name"),
        ({"kernel": ""}, "kernel"),
        ({"initramfs": ""}, "initramfs"),
        ({"memory": 63}, "memory"),
        ({"memory": 1 << 21}, "memory"),
        ({"cpus": 0}, "cpus"),
        ({"cpus": 256}, "cpus"),
        ({"accel": "hvf"}, "accel"),
        ({"append": "a\nb"}, "append"),
        ({"append": "é"}, "append"),
        ({"append": "x" * MAX_COMMAND_LINE}, "append"),
        ({"nics": (replace(NIC, tap=""),)}, "nics[0].tap"),
        ({"nics": (replace(NIC, tap="x" * 16),)}, "nics[0].tap"),
        ({"nics": (replace(NIC, mac="01:00:00:00:00:01"),)}, "nics[0].mac"),
        ({"nics": (replace(NIC, mac="02:00:00:00:00:0g"),)}, "nics[0].mac"),
        ({"nics": (NIC, NIC)}, "nics[1].mac"),
        ({"nics": (replace(NIC, mtu=67),)}, "nics[0].mtu"),
        ({"nics": (replace(NIC, queues=0),)}, "nics[0].queues"),
        (
            {"nics": tuple(replace(NIC, mac=f"02:00:00:00:00:{n:02x}") for n in range(25))},
            "nics",
        ),
    ],
)
def test_wrong_spec_names_its_field(change: dict[str, Any], field: str) -> None:
    """A spec that QEMU would choke on is refused before anything is made, by the name of the field."""
    check(SPEC)
    with pytest.raises(InvalidInput) as caught:
        check(replace(SPEC, **change))

    assert caught.value.field == field


def test_command_line_has_a_limit() -> None:
    """The longest command line that a kernel takes whole is accepted, and not one character more."""
    room = MAX_COMMAND_LINE - len(command_line(replace(SPEC, append="x"))) + 1
    check(replace(SPEC, append="x" * room))
    with pytest.raises(InvalidInput, match="takes 2047"):
        check(replace(SPEC, append="x" * (room + 1)))


@pytest.mark.parametrize(
    ("end", "ok", "said"),
    [
        (End(0, "guest-shutdown"), True, "the guest powered itself off"),
        (End(0, "host-qmp-quit"), True, "the guest did not shut down in time and was ended"),
        (End(0), True, "ended from its console"),
        (End(0, "guest-reset"), False, "the guest reset itself: a panic, or a reboot"),
        (End(0, "subsystem-reset"), False, "subsystem-reset"),
        (End(-9), False, "QEMU was killed by SIGKILL"),
        (End(1), False, "QEMU failed with status 1"),
    ],
)
def test_ends(end: End, ok: bool, said: str) -> None:
    """Each way to end is good or bad, and says in words what it was."""
    assert (end.ok, str(end)) == (ok, said)


def test_accelerator_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for wins over the variable, the variable over the probe, and a wish for KVM that isn't
    there is refused rather than emulated."""
    monkeypatch.setattr(accel, "without_kvm", lambda: "")
    monkeypatch.delenv(accel.VARIABLE, raising=False)
    assert accel.choose("") == "kvm"
    assert accel.choose("tcg") == "tcg"
    monkeypatch.setenv(accel.VARIABLE, "tcg")
    assert accel.choose("") == "tcg"
    assert accel.choose("kvm") == "kvm"
    monkeypatch.setenv(accel.VARIABLE, "fast")
    with pytest.raises(InvalidInput, match=accel.VARIABLE):
        accel.choose("")

    monkeypatch.setattr(accel, "without_kvm", lambda: "/dev/kvm: No such file or directory")
    monkeypatch.delenv(accel.VARIABLE)
    assert accel.choose("") == "tcg"
    with pytest.raises(NotSupported, match="use --accel tcg"):
        accel.choose("kvm")
