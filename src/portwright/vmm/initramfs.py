"""A small root file system for a guest: busybox, the kernel's virtio modules and ``init.sh``.

What the guest is to do comes with the kernel's command line (:mod:`portwright.vmm.cmdline`), so that one
initramfs serves every guest of a kernel. Nothing is run to build it, and the same input gives the same bytes.
"""

from __future__ import annotations

import gzip
import lzma
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from portwright.model.errors import InvalidInput, NotFound, NotSupported

BUSYBOX = Path("/bin/busybox")
INIT = Path(__file__).with_name("init.sh")
#: Sets routes and neighbours in the guest: guest/pwroute.c, which `make build` compiles.
PWROUTE = Path(__file__).parent / "guest" / "pwroute"
#: What a guest of ours may have to drive: NIC, disk and console by virtio, and the power button.
MODULES = ("virtio_pci", "virtio_mmio", "virtio_net", "virtio_blk", "virtio_console", "button", "evdev")
#: And for a disk that it is to go on from. ext4's checksums name their algorithm at run time only.
DISK_MODULES = ("crc32c_generic", "ext4")
_FOLDERS = ("bin", "dev", "etc", "lib", "mnt", "proc", "root", "run", "sys", "tmp", "www")
_PT_INTERP = 3  # elf.h


@dataclass(frozen=True)
class Entry:
    """One file of an archive. ``mode`` has the type too, as in stat(2); ``device`` is (major, minor)."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def build(modules: Path, *, busybox: Path = BUSYBOX, extra: Mapping[str, bytes] | None = None) -> bytes:
    """The initramfs of the kernel whose modules lie in ``modules`` (``/lib/modules/<release>``), gzipped.

    ``extra`` maps absolute paths to more files (mode 0644). Raises NotFound for a missing file, InvalidInput
    for a busybox that needs libraries, NotSupported for a module's packing that can't be undone here.
    """
    entries = [
        *(Entry(name, stat.S_IFDIR | 0o755) for name in _FOLDERS),
        # The kernel opens it for PID 1 before devtmpfs is there.
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        Entry("init", stat.S_IFREG | 0o755, INIT.read_bytes()),
        Entry("bin/busybox", stat.S_IFREG | 0o755, _static(busybox)),
        Entry("bin/pwroute", stat.S_IFREG | 0o755, _static(PWROUTE, "pwroute", "run make build")),
        Entry("bin/sh", stat.S_IFLNK | 0o777, b"busybox"),
    ]
    dep = _read(modules / "modules.dep").decode()
    packed: set[str] = set()
    for order, wanted in (("order", MODULES), ("order.disk", DISK_MODULES)):
        lines = []
        for path in load_order(dep, wanted):
            name = PurePosixPath(path).name.split(".")[0] + ".ko"
            if name not in packed:
                packed.add(name)
                lines.append(f"{name}\n")
                entries.append(Entry(f"lib/{name}", stat.S_IFREG | 0o644, _unpacked(modules / path)))
        entries.append(Entry(f"lib/{order}", stat.S_IFREG | 0o644, "".join(lines).encode()))
    made = set(_FOLDERS)
    for path, data in (extra or {}).items():
        for parent in reversed(PurePosixPath(path.lstrip("/")).parents[:-1]):
            if str(parent) not in made:
                made.add(str(parent))
                entries.append(Entry(str(parent), stat.S_IFDIR | 0o755))
        entries.append(Entry(path.lstrip("/"), stat.S_IFREG | 0o644, data))
    # mtime 0: the same input, the same bytes.
    return gzip.compress(archive(entries), compresslevel=6, mtime=0)


def load_order(modules_dep: str, wanted: Iterable[str]) -> list[str]:
    """The modules' paths in the order in which they load, as ``modprobe --show-depends`` says it. Pure.

    ``modules_dep``: the text of modules.dep, whose lines name what a module needs, the deepest last. A wanted
    module that isn't there is built in, or this kernel has none: both are the guest's kernel's business.
    """
    lines = dict(line.split(":", 1) for line in modules_dep.splitlines() if ":" in line)
    by_name = {PurePosixPath(path).name.split(".")[0].replace("-", "_"): path for path in lines}
    order: list[str] = []
    for name in wanted:
        if (path := by_name.get(name)) is not None:
            order += [*reversed(lines[path].split()), path]
    return list(dict.fromkeys(order))


def archive(entries: Iterable[Entry]) -> bytes:
    """The entries as a cpio archive of the kind "newc" (Documentation/driver-api/early-userspace)."""
    parts: list[bytes] = []
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], 1):
        name = entry.path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        fields = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        parts += [_padded(header + name), _padded(entry.data)]
    return b"".join(parts)


def _padded(data: bytes) -> bytes:
    """Up to the next multiple of four."""
    return data + bytes(-len(data) % 4)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFound("file", f"{path} ({error.strerror})") from None


def _unpacked(path: Path) -> bytes:
    data = _read(path)
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix != ".ko":
        raise NotSupported("initramfs", f"modules packed as {path.name}", "unpack them to .ko files first")
    return data


def _static(path: Path, field: str = "busybox", way_out: str = "install busybox-static") -> bytes:
    """The program, which must be an ELF that names no interpreter (ELF-64, little-endian)."""
    data = _read(path)
    if data[:6] != b"\x7fELF\x02\x01":
        raise InvalidInput(field, str(path), f"not a 64-bit ELF program; {way_out}")
    (offset,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    kinds = {struct.unpack_from("<I", data, offset + index * size)[0] for index in range(count)}
    if _PT_INTERP in kinds:
        raise InvalidInput(field, str(path), f"needs shared libraries; {way_out}")
    return data
