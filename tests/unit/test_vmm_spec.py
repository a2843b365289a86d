from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from portwright.model.errors import InvalidInput, NotSupported
from portwright.vmm import accel
from portwright.vmm.qemu import End
from portwright.vmm.spec import MAX_COMMAND_LINE, GuestSpec, Nic, check, command_line, qemu_args

NIC = Nic(tap="tap01234567", mac="02:00:00:00:00:01", mtu=1500)
SPEC = GuestSpec(name="g1", kernel="/k", initramfs="/i", append="quiet", memory=128, nics=(NIC,), accel="tcg")


def options(args: list[str], name: str) -> list[str]:
    """The values of every option of that name."""
    return [args[index + 1] for index, arg in enumerate(args) if arg == name]


def test_qemu_arguments() -> None:
    """The arguments are the guest: its size, its kernel, a NIC on a passed descriptor, QMP on another."""
    args = qemu_args(SPEC, qmp=7, taps=[[9]])

    assert options(args, "-name") == ["guest=g1"]
    assert options(args, "-m") == ["128"]
    assert options(args, "-smp") == ["1"]
    assert options(args, "-accel") == ["tcg"]
    assert options(args, "-kernel") == ["/k"]
    assert options(args, "-initrd") == ["/i"]
    assert options(args, "-append") == ["console=ttyS0 panic=-1 quiet mitigations=off no5lvl quiet"]
    assert options(args, "-netdev") == ["tap,id=net0,fd=9"]
    assert options(args, "-device") == [
        "virtio-net-pci,id=nic0,netdev=net0,mac=02:00:00:00:00:01,host_mtu=1500,romfile="
    ]
    assert options(args, "-chardev") == [
        "socket,id=qmp,fd=7,server=off",
        "stdio,id=console,signal=off,mux=off",
    ]
    assert "-nodefaults" in args
    assert "-drive" not in args


def test_no_network_without_a_nic() -> None:
    """A guest without NICs has no network at all: QEMU's own, through the host's stack, is never there."""
    args = qemu_args(replace(SPEC, nics=()), qmp=7, taps=[])

    assert "-nodefaults" in args
    assert not {"-netdev", "-nic", "-net"} & set(args)


def test_queues_of_a_nic() -> None:
    """A NIC of several queues gets a descriptor and two vectors for each, and two more."""
    spec = replace(SPEC, nics=(replace(NIC, queues=2),))
    args = qemu_args(spec, qmp=7, taps=[[9, 10]])

    assert options(args, "-netdev") == ["tap,id=net0,fds=9:10"]
    assert options(args, "-device")[0].endswith(",mq=on,vectors=6")


def test_root_image() -> None:
    """A root image is the first disk; a comma in its name stays one name; and kvm gets the host's CPU."""
    args = qemu_args(replace(SPEC, initramfs="", root="/a,b.img", accel="kvm"), qmp=7, taps=[[9]])

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
