"""What this kernel can do: each feature is tried, not guessed from a version.

A probe does in small what Portwright will do in earnest: it loads the program, makes the map,
attaches to a device that can't exist. It leaves nothing behind. Answers are kept
for the life of the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from portwright.kernel.bpf import _clsact_probe, _libbpf, _nflog_probe, _tproxy_probe
from portwright.kernel.bpf._fd import failed
from portwright.kernel.bpf.enums import AttachType, MapType, ProgramType
from portwright.kernel.bpf.maps import Map
from portwright.kernel.bpf.objects import Program
from portwright.kernel.bpf.spec import MapSpec
from portwright.model.errors import KernelFailed, KernelTooOld

_NO_DEVICE: Final = 0x7FFFFFFF
"""An ifindex that no device has: the kernel numbers them from 1."""

_NR_FSOPEN, _NR_FSCONFIG = 430, 431  # the same on x86-64 and arm64 (asm-generic/unistd.h)
_FSCONFIG_CMD_CREATE: Final = 6
_BTF_MAGIC: Final = 0xEB9F
_REDIRECT_PEER: Final = 155  # bpf_redirect_peer, linux/bpf.h

_libc = ctypes.CDLL(None, use_errno=True)
_lock = threading.Lock()


@dataclass(frozen=True)
class Feature:
    """What a probe found. ``supported`` is None when it couldn't be told (no privilege).

    ``need`` is the kernel that brings it, and its option; ``have`` the running release;
    ``detail`` what the probe saw, for ``portwright doctor``.
    """

    name: str
    need: str
    have: str
    supported: bool | None
    detail: str

    @property
    def need_version(self) -> tuple[int, int]:
        """The first kernel that has it, for comparing with :func:`running_version`."""
        return _PROBES[self.name].since

    def require(self) -> None:
        """KernelTooOld unless the feature is known to be there."""
        if not self.supported:
            raise KernelTooOld(self.name, self.need, f"{self.have}: {self.detail}")


@dataclass(frozen=True)
class _Probe:
    since: tuple[int, int]
    option: str
    run: Callable[[], str]
    """Returns what it saw; raises KernelFailed or _Missing when the feature isn't there."""


class _Missing(Exception):
    """The feature isn't there, for a reason that has no errno."""


def running_version() -> tuple[int, int]:
    """The running kernel's (major, minor)."""
    major, minor = os.uname().release.split("-", 1)[0].split(".")[:2]
    return int(major), int(minor)


def _insn(code: int, dst: int = 0, src: int = 0, imm: int = 0) -> bytes:
    """One instruction (``struct bpf_insn``)."""
    return struct.pack("=BBhi", code, src << 4 | dst, 0, imm)


_EXIT_0: Final = _insn(0xB7) + _insn(0x95)  # r0 = 0; exit


def _classifier(instructions: bytes = _EXIT_0) -> Program:
    """A loaded classifier of a few instructions."""
    fd: int = _libbpf.bpf_prog_load(
        ProgramType.SCHED_CLS, b"pw_probe", b"GPL", instructions, len(instructions) // 8, None
    )
    if fd < 0:
        failed(fd, "load a classifier")
    return Program(fd)


def _attaches(attach_type: AttachType) -> str:
    """Ask for a link on a device that isn't there. ENODEV comes from the hook itself: it exists."""
    with _classifier() as program:
        ret: int = _libbpf.bpf_link_create(program.fd, _NO_DEVICE, attach_type, None)
    if ret >= 0:
        os.close(ret)
    elif ret != -errno.ENODEV:
        failed(ret, f"attach at {attach_type.name}")
    return "a link was accepted up to its device"


def _tcx() -> str:
    return _attaches(AttachType.TCX_INGRESS)


def _netkit() -> str:
    return _attaches(AttachType.NETKIT_PRIMARY)


def _clsact() -> str:
    with _classifier() as program:
        return _clsact_probe.try_clsact(program.fd)


def _ringbuf() -> str:
    page = os.sysconf("SC_PAGE_SIZE")
    with Map.create(MapSpec("pw_probe", MapType.RINGBUF, 0, 0, page)):
        return "made one"


def _prog_test_run() -> str:
    with _classifier() as program:
        program.test_run(bytes(64))
    return "ran a classifier"


def _redirect_peer() -> str:
    # r1 = 1; r2 = 0; call bpf_redirect_peer; exit
    with _classifier(_insn(0xB7, 1, imm=1) + _insn(0xB7, 2) + _insn(0x85, imm=_REDIRECT_PEER) + _insn(0x95)):
        return "the verifier took the call"


def _btf() -> str:
    path = Path("/sys/kernel/btf/vmlinux")
    try:
        with path.open("rb") as file:
            (magic,) = struct.unpack("=H", file.read(2))
    except (OSError, struct.error) as error:
        raise _Missing(f"{path}: {error}") from error
    if magic != _BTF_MAGIC:
        raise _Missing(f"{path} is not BTF")
    return str(path)


def _batch_ops() -> str:
    number = struct.Struct("=I").pack
    entries = [(number(index), number(index)) for index in range(3)]
    for kind, flags in ((MapType.HASH, 0), (MapType.LPM_TRIE, 1)):  # BPF_F_NO_PREALLOC
        key_size = 4 if kind is MapType.HASH else 8
        with Map.create(MapSpec("pw_probe", kind, key_size, 4, 8, flags)) as table:
            count = ctypes.c_uint32(len(entries))
            keys = b"".join(key if key_size == 4 else number(32) + key for key, _ in entries)
            values = b"".join(value for _, value in entries)
            # Not Map.update_batch(): that would quietly go one by one.
            ret = _libbpf.bpf_map_update_batch(table.fd, keys, values, ctypes.byref(count), None)
            if ret < 0:
                failed(ret, f"update a {kind.name} in a batch")
    return "wrote a hash and an LPM trie"


def _bpffs() -> str:
    fd: int = _libc.syscall(_NR_FSOPEN, b"bpf", 1)  # FSOPEN_CLOEXEC
    if fd < 0:
        raise KernelFailed(ctypes.get_errno(), "open the bpf file system")
    try:
        if _libc.syscall(_NR_FSCONFIG, fd, _FSCONFIG_CMD_CREATE, None, None, 0) != 0:
            raise KernelFailed(ctypes.get_errno(), "make a bpf file system")
    finally:
        os.close(fd)
    return "made one that nobody mounted"


_PROBES: Final[dict[str, _Probe]] = {
    "tcx": _Probe((6, 6), "CONFIG_NET_XGRESS", _tcx),
    "netkit": _Probe((6, 7), "CONFIG_NETKIT", _netkit),
    "clsact": _Probe((4, 5), "CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF", _clsact),
    "ringbuf": _Probe((5, 8), "CONFIG_BPF_SYSCALL", _ringbuf),
    "prog_test_run": _Probe((4, 12), "CONFIG_BPF_SYSCALL", _prog_test_run),
    "redirect_peer": _Probe((5, 10), "CONFIG_NET", _redirect_peer),
    "btf": _Probe((5, 4), "CONFIG_DEBUG_INFO_BTF", _btf),
    "batch_ops": _Probe((5, 13), "CONFIG_BPF_SYSCALL", _batch_ops),
    "bpffs": _Probe((5, 2), "CONFIG_BPF_SYSCALL", _bpffs),
    "tproxy": _Probe((4, 19), "CONFIG_NFT_TPROXY", _tproxy_probe.try_tproxy),
    "nflog": _Probe((3, 17), "CONFIG_NETFILTER_NETLINK_LOG", _nflog_probe.try_nflog),
}

_found: dict[str, Feature] = {}


def options(name: str) -> tuple[str, ...]:
    """The kernel's build options that the feature needs."""
    return tuple(_PROBES[name].option.split(", "))


def probe(name: str) -> Feature:
    """Try the feature, once per process. KeyError for a name that isn't in :func:`names`."""
    with _lock:
        if name not in _found:
            answer = _run(name, _PROBES[name])
            if answer.supported is None:
                return answer  # privilege may come: don't keep it
            _found[name] = answer
        return _found[name]


def names() -> tuple[str, ...]:
    """Every feature that can be probed."""
    return tuple(_PROBES)


def all() -> list[Feature]:
    """Every feature, probed."""
    return [probe(name) for name in _PROBES]


def _run(name: str, this: _Probe) -> Feature:
    need = f"Linux {this.since[0]}.{this.since[1]} ({this.option})"
    supported: bool | None
    try:
        supported, detail = True, this.run()
    except KernelFailed as error:
        supported = None if error.errno in (errno.EPERM, errno.EACCES) else False
        detail = str(error)
    except (_Missing, KernelTooOld) as error:
        supported, detail = False, str(error)
    return Feature(name, need, os.uname().release, supported, detail)
