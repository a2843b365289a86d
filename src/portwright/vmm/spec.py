"""What a guest is, as a value, and the arguments that make QEMU run it. Pure: nothing is opened."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from portwright.model.errors import InvalidInput
from portwright.model.port import MAX_QUEUES

if TYPE_CHECKING:
    from portwright.vmm.cards import Card
    from portwright.vmm.cell import Cell

#: How the guest's CPUs run; '' leaves it to :func:`portwright.vmm.accel.choose`.
Accel: TypeAlias = Literal["kvm", "tcg", ""]

#: COMMAND_LINE_SIZE of x86, less the final zero (arch/x86/include/asm/setup.h).
MAX_COMMAND_LINE: Final = 2047
MEMORY: Final = (64, 1 << 20)  # MiB
#: q35's, without an IOMMU.
MAX_CPUS: Final = 255
#: There is a root port for each, from the start, as q35 has no other place for a card that comes later.
MAX_NICS: Final = 24
#: Of the root ports on PCIe's root: what is below is left to the machine and its other devices.
_FIRST_SLOT, _FUNCTIONS = 0x10, 8
#: The virtio-serial port by which a guest hears of cards that come later.
AGENT: Final = "portwright.0"
#: What a guest under emulation does without: defences against other processes' speculation, which there are
#: none of, a fifth level of page tables, and a panic where the timer is late, as it is on a busy machine.
_EMULATED: Final = "mitigations=off no5lvl no_timer_check"
#: Seccomp: what a hypervisor that was given its descriptors never needs.
_SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


@dataclass(frozen=True, kw_only=True)
class Nic:
    """A virtio NIC on a tap or macvtap: ``tap`` is its name.

    ``home`` is the cookie of the namespace that it is in, 0 for the sandbox's. ``device`` is the one there
    whose carrier the guest sees. '': it has one. ``vhost``: vhost-net carries its packets.
    """

    tap: str
    mac: str
    mtu: int
    queues: int = 1
    device: str = ""
    kind: Literal["tap", "macvtap"] = "tap"
    home: int = 0
    vhost: bool = False


@dataclass(frozen=True, kw_only=True)
class GuestSpec:
    """A guest. ``memory`` in MiB; ``root`` a raw disk image; ``append`` goes to the kernel's command line.

    ``incoming``: a file (frozen.py) of a guest with all else the same, which goes on from there. ``cell``:
    the jail that the hypervisor is in, if it is.
    """

    name: str
    kernel: str
    initramfs: str = ""
    root: str = ""
    append: str = ""
    memory: int = 256
    cpus: int = 1
    nics: tuple[Nic, ...] = ()
    accel: Accel = ""
    incoming: str = ""
    cell: Cell | None = None


def check(spec: GuestSpec) -> None:
    """Raises InvalidInput naming the field, the value and the way out. Files are for whoever opens them."""
    if not _NAME.fullmatch(spec.name):
        raise InvalidInput("name", spec.name, "1 to 63 letters, digits, '.', '_' and '-', no sign first")
    if not spec.kernel:
        raise InvalidInput("kernel", spec.kernel, "name a Linux image, such as /boot/vmlinuz-VERSION")
    if not (spec.initramfs or spec.root):
        raise InvalidInput("initramfs", spec.initramfs, "name an initramfs, or a root image, or both")
    _within("memory", spec.memory, *MEMORY, "MiB")
    _within("cpus", spec.cpus, 1, MAX_CPUS, "CPUs")
    if spec.accel not in ("kvm", "tcg", ""):
        raise InvalidInput("accel", spec.accel, "kvm, tcg, or nothing for what works here")
    if len(spec.nics) > MAX_NICS:
        raise InvalidInput("nics", len(spec.nics), f"at most {MAX_NICS} NICs")
    for index, nic in enumerate(spec.nics):
        field = f"nics[{index}]"
        if not 0 < len(nic.tap.encode()) < 16:
            raise InvalidInput(f"{field}.tap", nic.tap, "a tap's name has 1 to 15 bytes")
        if not _MAC.fullmatch(nic.mac) or int(nic.mac[:2], 16) & 1:
            why = "a unicast MAC address in lower case, such as 02:00:00:00:00:01"
            raise InvalidInput(f"{field}.mac", nic.mac, why)
        if nic.home != spec.nics[0].home:
            raise InvalidInput(f"{field}.home", nic.home, "all NICs' taps are in one namespace")
        if nic.mac in [other.mac for other in spec.nics[:index]]:
            raise InvalidInput(f"{field}.mac", nic.mac, "another NIC has it; give each its own")
        _within(f"{field}.mtu", nic.mtu, 68, 65535, "bytes")
        _within(f"{field}.queues", nic.queues, 1, MAX_QUEUES, "queues")
    if not (spec.append.isascii() and spec.append.isprintable()):
        raise InvalidInput("append", spec.append, "printable ASCII, on one line")
    if (length := len(command_line(spec))) > MAX_COMMAND_LINE:
        why = f"the kernel's command line would have {length} characters; it takes {MAX_COMMAND_LINE}"
        raise InvalidInput("append", spec.append, f"{why}; use fewer routes, addresses or words")


def command_line(spec: GuestSpec) -> str:
    """The kernel's command line. What the caller appends comes last, and so decides."""
    words = ["console=ttyS0", "panic=-1", "quiet"]
    if spec.accel == "tcg":
        words.append(_EMULATED)
    if spec.root:
        words.append("root=/dev/vda rw")
    if spec.append:
        words.append(spec.append)
    return " ".join(words)


def qemu_args(
    spec: GuestSpec, *, qmp: int, agent: int, cards: Sequence[Card], mux: bool = False, incoming: int = -1
) -> list[str]:
    """QEMU's arguments, without its own name, for a checked spec whose ``accel`` is chosen.

    ``qmp``, ``agent``: descriptors of connected Unix sockets; what comes on the second the guest reads at
    its port of the name AGENT. ``cards``: what is open of each NIC. The console is
    QEMU's stdin and stdout; with ``mux`` (for a terminal) ^A x there ends the guest. The guest starts at
    QMP's ``cont``, as the descriptor ``incoming`` says if there is one, and a reset ends it. QEMU opens
    nothing but the kernel, the initramfs and the disk.
    """
    args = [
        *("-name", f"guest={spec.name}"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S"),
        *("-machine", "q35,smbus=off,sata=off,usb=off,vmport=off"),
        *("-accel", spec.accel, "-cpu", "host" if spec.accel == "kvm" else "max"),
        *("-m", str(spec.memory), "-smp", str(spec.cpus)),
        *("-sandbox", _SANDBOX),
        *("-kernel", spec.kernel, "-append", command_line(spec)),
        *("-chardev", f"socket,id=qmp,fd={qmp},server=off", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"stdio,id=console,signal=off,mux={'on' if mux else 'off'}"),
        *("-serial", "chardev:console"),
        *("-chardev", f"socket,id=agent,fd={agent},server=off", "-device", "virtio-serial-pci,max_ports=2"),
        *("-device", f"virtserialport,chardev=agent,name={AGENT}"),
    ]
    for number in range(MAX_NICS):
        slot, function = divmod(number, _FUNCTIONS)
        place = f"addr={_FIRST_SLOT + slot:x}.{function}" + (",multifunction=on" if not function else "")
        # No window for I/O ports: there are few, and no card of ours uses them.
        args += ["-device", f"pcie-root-port,id=slot{number},chassis={number + 1},io-reserve=0,{place}"]
    if spec.initramfs:
        args += ["-initrd", spec.initramfs]
    if spec.root:
        image = spec.root.replace(",", ",,")  # QEMU's own way to write a comma in a value
        args += ["-drive", f"file={image},id=root,if=none,format=raw"]
        args += ["-device", "virtio-blk-pci,drive=root"]
    for index, (nic, card) in enumerate(zip(spec.nics, cards, strict=True)):
        args += ["-netdev", f"tap,id=net{index},{_descriptors(card)}"]
        args += ["-device", ",".join(_words(nic_device(index, nic)))]
    if incoming >= 0:
        args += ["-incoming", f"fd:{incoming}"]
    return args


def nic_device(number: int, nic: Nic) -> dict[str, object]:
    """The card in root port ``number``, on the netdev of that number, as QMP's device_add is told of it."""
    # No boot ROM: nobody boots from the network here, and its package need not be there.
    device: dict[str, object] = {
        "driver": "virtio-net-pci",
        "id": f"nic{number}",
        "netdev": f"net{number}",
        "bus": f"slot{number}",
        "mac": nic.mac,
        "host_mtu": nic.mtu,
        "romfile": "",
    }
    if nic.queues > 1:
        # One for each queue's two rings, one for the configuration, one for control.
        device |= {"mq": True, "vectors": 2 * nic.queues + 2}
    return device


def _words(device: dict[str, object]) -> list[str]:
    """The same for the command line."""
    named = {key: "on" if value is True else value for key, value in device.items()}
    return [str(named.pop("driver")), *(f"{key}={value}" for key, value in named.items())]


def _descriptors(card: Card) -> str:
    several = "s" if len(card.fds) > 1 else ""
    words = f"fd{several}={':'.join(map(str, card.fds))}"
    if card.vhost_fds:
        words += f",vhost=on,vhostfd{several}={':'.join(map(str, card.vhost_fds))}"
    return words


def _within(field: str, value: int, least: int, most: int, unit: str) -> None:
    if not least <= value <= most:
        raise InvalidInput(field, value, f"{least} to {most} {unit}")
