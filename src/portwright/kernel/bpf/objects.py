"""Programs and links: what runs, and what keeps it attached.

A :class:`Link` is the attachment. It lives for as long as somebody holds it: a descriptor,
or a pin. So a pinned link outlives the daemon, and the program that it runs is replaced in
place by :meth:`Link.update`, without a packet that sees none.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from dataclasses import dataclass
from typing import Final, Literal, Self

from portwright.kernel.bpf import _libbpf
from portwright.kernel.bpf._fd import OwnedFd, failed, object_info
from portwright.kernel.bpf._libbpf import LinkCreateOpts, LinkInfoRaw, ProgInfo, QueryOpts, TestRunOpts
from portwright.kernel.bpf.enums import AttachType, LinkType, ProgramType

Direction = Literal["ingress", "egress"]
"""Seen from the device, as in tc: ingress is what the device received."""

_TCX: Final = {"ingress": AttachType.TCX_INGRESS, "egress": AttachType.TCX_EGRESS}
_NETKIT: Final = {"primary": AttachType.NETKIT_PRIMARY, "peer": AttachType.NETKIT_PEER}
_XDP: Final = {"any": 0, "generic": 1 << 1, "driver": 1 << 2}  # XDP_FLAGS_*, linux/if_link.h


@dataclass(frozen=True)
class TestRun:
    """What a program did with one input: ``data`` and ``ctx`` as it left them.

    ``duration_ns`` is the mean of the repetitions, as the kernel measured it.
    """

    __test__ = False  # not a test class, whatever pytest thinks of its name

    retval: int
    data: bytes
    ctx: bytes
    duration_ns: int


class Program(OwnedFd):
    """A loaded program, held by a descriptor of our own.

    ``tag`` is the kernel's digest of its instructions, 16 hexadecimal digits. ``name`` is the
    function's where it came from a collection, and the kernel's (15 bytes) otherwise.
    """

    __slots__ = ("id", "name", "tag", "type")
    _KIND = "prog"
    _NOUN = "program"

    def __init__(self, fd: int, name: str | None = None) -> None:
        """Take over ``fd``, which must be a program's; it is closed when reading its info fails."""
        super().__init__(fd)
        info = ProgInfo()
        try:
            object_info(fd, info, "a program")
        except BaseException:
            self.close()
            raise
        self.id: int = info.id
        self.name: str = info.name.decode() if name is None else name
        self.type = ProgramType(info.type)
        self.tag: str = bytes(info.tag).hex()

    def test_run(
        self, data: bytes, *, ctx: bytes | None = None, repeat: int = 1, data_out_size: int | None = None
    ) -> TestRun:
        """Run the program on ``data`` (a frame, at least 14 bytes) without any device.

        ``ctx`` is a ``struct __sk_buff`` or ``xdp_md`` to start from, as far as the kernel lets
        a test set it. ``data_out_size`` bounds the frame that comes back, by default
        ``len(data) + 512``; a larger one is KernelFailed(ENOSPC). Maps are really changed.
        """
        out = ctypes.create_string_buffer(len(data) + 512 if data_out_size is None else data_out_size)
        ctx_out = ctypes.create_string_buffer(0 if ctx is None else len(ctx))
        opts = TestRunOpts(
            sz=ctypes.sizeof(TestRunOpts),
            data_in=ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p),
            data_size_in=len(data),
            data_out=ctypes.addressof(out),
            data_size_out=len(out),
            repeat=repeat,
        )
        if ctx is not None:
            opts.ctx_in, opts.ctx_size_in = ctypes.cast(ctypes.c_char_p(ctx), ctypes.c_void_p), len(ctx)
            opts.ctx_out, opts.ctx_size_out = ctypes.addressof(ctx_out), len(ctx_out)
        ret = _libbpf.bpf_prog_test_run_opts(self._fd, ctypes.byref(opts))
        if ret < 0:
            self._failed(ret, f"run {self!r} on {len(data)} bytes")
        return TestRun(
            opts.retval, out.raw[: opts.data_size_out], ctx_out.raw[: opts.ctx_size_out], opts.duration
        )


@dataclass(frozen=True)
class LinkInfo:
    """What the kernel says about a link.

    ``ifindex`` is 0 when the link is not on a device or its device is gone (or it was
    detached); it is the index in the device's own namespace.
    """

    id: int
    prog_id: int
    ifindex: int
    attach_type: AttachType
    type: LinkType


class Link(OwnedFd):
    """An attachment, held by a descriptor of our own.

    Without a pin, closing the last descriptor detaches the program. A link on a device goes
    numb, and is not removed, when the device goes.
    """

    __slots__ = ()
    _KIND = "link"
    _NOUN = "link"

    @classmethod
    def attach_tcx(cls, program: Program, ifindex: int, direction: Direction) -> Self:
        """Attach behind what is attached to the device already, touching none of it (Linux 6.6).

        ``ifindex`` is looked up in the network namespace of the calling thread; the link
        works for its device wherever that, or the thread, moves later.
        KernelFailed: ENODEV, EEXIST when the program is there already, EINVAL without TCX.
        """
        return cls._create(program, ifindex, _TCX[direction])

    @classmethod
    def attach_netkit(cls, program: Program, ifindex: int, end: Literal["primary", "peer"]) -> Self:
        """Attach to a netkit pair (Linux 6.7). ``ifindex`` is the primary's for both ends.

        Namespace and errors as for :meth:`attach_tcx`; EACCES for the peer's own index.
        """
        return cls._create(program, ifindex, _NETKIT[end])

    @classmethod
    def attach_xdp(
        cls, program: Program, ifindex: int, mode: Literal["any", "generic", "driver"] = "any"
    ) -> Self:
        """Attach to the device's XDP hook, which holds one link. Namespace as for :meth:`attach_tcx`.

        KernelFailed: EBUSY when another link is there, EOPNOTSUPP when the driver has no XDP.
        """
        return cls._create(program, ifindex, AttachType.XDP, _XDP[mode])

    @classmethod
    def attach_cgroup(cls, program: Program, cgroup_fd: int, attach_type: AttachType) -> Self:
        """Attach to an open cgroup v2 directory, beside what is there (BPF_F_ALLOW_MULTI)."""
        return cls._create(program, cgroup_fd, attach_type)

    @classmethod
    def _create(cls, program: Program, target: int, attach_type: AttachType, flags: int = 0) -> Self:
        opts = LinkCreateOpts(sz=ctypes.sizeof(LinkCreateOpts), flags=flags)
        fd: int = _libbpf.bpf_link_create(
            program.fd, target, attach_type, ctypes.byref(opts) if flags else None
        )
        if fd < 0:
            failed(fd, f"attach {program.name} to {attach_type.name} of {target}")
        return cls(fd)

    def update(self, program: Program) -> None:
        """Replace the program in one step: each packet sees the old or the new, never none.

        KernelFailed(ENOLINK) when the device is gone or the link was detached.
        """
        ret = _libbpf.bpf_link_update(self._fd, program.fd, None)
        if ret < 0:
            self._failed(ret, f"put {program.name} into {self!r}")

    def info(self) -> LinkInfo:
        """Ask the kernel."""
        raw = LinkInfoRaw()
        object_info(self.fd, raw, "a link")
        kind = LinkType(raw.type)
        first, second = struct.unpack_from("=II", bytes(raw.union))
        if kind in (LinkType.TCX, LinkType.NETKIT):
            return LinkInfo(raw.id, raw.prog_id, first, AttachType(second), kind)
        if kind is LinkType.XDP:
            return LinkInfo(raw.id, raw.prog_id, first, AttachType.XDP, kind)
        if kind is LinkType.CGROUP:  # u64 cgroup_id, u32 attach_type
            (attach_type,) = struct.unpack_from("=8xI", bytes(raw.union))
            return LinkInfo(raw.id, raw.prog_id, 0, AttachType(attach_type), kind)
        # The rest (tracing, perf events, …) are not ours, and their unions say other things.
        return LinkInfo(raw.id, raw.prog_id, 0, AttachType(0xFFFFFFFF), kind)

    def detach(self) -> None:
        """Take the program off now, whoever else holds the link. Detaching twice is fine."""
        ret = _libbpf.bpf_link_detach(self._fd)
        if ret < 0 and not (ret == -errno.ENOLINK and self._fd >= 0):
            self._failed(ret, f"detach {self!r}")


def prog_query_tcx(ifindex: int, direction: Direction) -> list[int]:
    """The ids of the programs at a device's TCX hook, in the order in which they run.

    ``ifindex`` is looked up in the network namespace of the calling thread.
    KernelFailed: ENODEV, EINVAL without TCX.
    """
    room = 64  # the kernel's limit (BPF_MPROG_MAX, linux/bpf_mprog.h)
    ids = (ctypes.c_uint32 * room)()
    opts = QueryOpts(sz=ctypes.sizeof(QueryOpts), prog_ids=ids, prog_cnt=room)
    ret = _libbpf.bpf_prog_query_opts(ifindex, _TCX[direction], ctypes.byref(opts))
    if ret < 0:
        failed(ret, f"query tcx {direction} of device {ifindex}")
    return list(ids[: opts.prog_cnt])
