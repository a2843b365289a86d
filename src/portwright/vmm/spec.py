"""What a guest is, as a value, and the arguments that make QEMU run it. Pure: nothing is opened."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from portwright.model.errors import InvalidInput

#: How the guest's CPUs run; '' leaves it to :func:`portwright.vmm.accel.choose`.
Accel: TypeAlias = Literal["kvm", "tcg", ""]

#: COMMAND_LINE_SIZE of x86, less the final zero (arch/x86/include/asm/setup.h).
MAX_COMMAND_LINE: Final = 2047
MEMORY: Final = (64, 1 << 20)  # MiB
#: q35's, without an IOMMU.
MAX_CPUS: Final = 255
#: A root port of q35 for each would be needed beyond; slots 0, 1 and 31 are the machine's own.
MAX_NICS: Final = 24
MAX_QUEUES: Final = 256
#: What a guest under emulation does without: defences against other processes' speculation, which there are
#: none of, and a fifth level of page tables.
_FASTER: Final = "mitigations=off no5lvl"
#: Seccomp: what a hypervisor that was given its descriptors never needs.
_SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


@dataclass(frozen=True, kw_only=True)
class Nic:
    """A virtio NIC on a tap: ``tap`` is its name in the sandbox's namespace.

    ``device`` is the one that the tap is joined with there; the guest sees its carrier. '': none is.
    """

    tap: str
    mac: str
    mtu: int
    queues: int = 1
    device: str = ""


@dataclass(frozen=True, kw_only=True)
class GuestSpec:
    """A guest. ``memory`` in MiB; ``root`` a raw disk image; ``append`` goes to the kernel's command line."""

    name: str
    kernel: str
    initramfs: str = ""
    root: str = ""
    append: str = ""
    memory: int = 256
    cpus: int = 1
    nics: tuple[Nic, ...] = ()
    accel: Accel = ""


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
        words.append(_FASTER)
    if spec.root:
        words.append("root=/dev/vda rw")
    if spec.append:
        words.append(spec.append)
    return " ".join(words)


def qemu_args(spec: GuestSpec, *, qmp: int, taps: Sequence[Sequence[int]], mux: bool = False) -> list[str]:
    """QEMU's arguments, without its own name, for a checked spec whose ``accel`` is chosen.

    ``qmp``: the descriptor of a connected Unix socket. ``taps``: those of each NIC's queues. The console is
    QEMU's stdin and stdout; with ``mux`` (for a terminal) ^A x there ends the guest. The guest starts at
    QMP's ``cont``, and a reset ends it. QEMU opens nothing but the kernel, the initramfs and the disk.
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
    ]
    if spec.initramfs:
        args += ["-initrd", spec.initramfs]
    if spec.root:
        image = spec.root.replace(",", ",,")  # QEMU's own way to write a comma in a value
        args += ["-drive", f"file={image},id=root,if=none,format=raw"]
        args += ["-device", "virtio-blk-pci,drive=root"]
    for index, (nic, fds) in enumerate(zip(spec.nics, taps, strict=True)):
        args += ["-netdev", f"tap,id=net{index},{_descriptors(fds)}"]
        # No boot ROM: nobody boots from the network here, and its package need not be there.
        device = f"virtio-net-pci,id=nic{index},netdev=net{index},mac={nic.mac},host_mtu={nic.mtu},romfile="
        # One for each queue's two rings, one for the configuration, one for control.
        args += ["-device", device + (f",mq=on,vectors={2 * nic.queues + 2}" if nic.queues > 1 else "")]
    return args


def _descriptors(fds: Sequence[int]) -> str:
    return f"fd={fds[0]}" if len(fds) == 1 else f"fds={':'.join(map(str, fds))}"


def _within(field: str, value: int, least: int, most: int, unit: str) -> None:
    if not least <= value <= most:
        raise InvalidInput(field, value, f"{least} to {most} {unit}")
