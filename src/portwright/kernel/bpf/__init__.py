"""A thin binding of libbpf (1.0 or newer) through ctypes: load, attach, read and write maps.

Two halves, as in cilium/ebpf: a :class:`CollectionSpec` is what a file says, the same on every
host; a :class:`Collection` is what this kernel made of it. Objects own their descriptors.
Nothing here prints.
"""

from __future__ import annotations

from portwright.kernel.bpf._libbpf import LIBBPF_VERSION, LibbpfTooOld
from portwright.kernel.bpf.bpffs import is_bpffs, mount_bpffs, umount_bpffs
from portwright.kernel.bpf.enums import (
    BPF_ANY,
    BPF_EXIST,
    BPF_NOEXIST,
    AttachType,
    LinkType,
    MapType,
    ProgramType,
)
from portwright.kernel.bpf.features import Feature
from portwright.kernel.bpf.loader import Collection
from portwright.kernel.bpf.maps import Map, Packed, possible_cpus
from portwright.kernel.bpf.objects import Direction, Link, LinkInfo, Program, TestRun, prog_query_tcx
from portwright.kernel.bpf.ringbuf import RingBuffer
from portwright.kernel.bpf.spec import CollectionSpec, MapSpec, ProgramSpec, Variable

__all__ = [
    "BPF_ANY",
    "BPF_EXIST",
    "BPF_NOEXIST",
    "LIBBPF_VERSION",
    "AttachType",
    "Collection",
    "CollectionSpec",
    "Direction",
    "Feature",
    "LibbpfTooOld",
    "Link",
    "LinkInfo",
    "LinkType",
    "Map",
    "MapSpec",
    "MapType",
    "Packed",
    "Program",
    "ProgramSpec",
    "ProgramType",
    "RingBuffer",
    "TestRun",
    "Variable",
    "is_bpffs",
    "mount_bpffs",
    "possible_cpus",
    "prog_query_tcx",
    "umount_bpffs",
]
