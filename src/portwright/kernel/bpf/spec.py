"""What an ELF object holds, read without asking the kernel.

A :class:`CollectionSpec` depends on the file alone: the same file gives the same spec on
every host and under every kernel. What depends on the kernel happens when a
:class:`~portwright.kernel.bpf.loader.Collection` is loaded from it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

from portwright.kernel.bpf import _libbpf
from portwright.kernel.bpf.enums import MapType, ProgramType
from portwright.model.errors import InvalidInput, NotFound

_SECTION_TYPES: Final[Mapping[str, ProgramType]] = {
    "tc": ProgramType.SCHED_CLS,
    "tcx": ProgramType.SCHED_CLS,
    "netkit": ProgramType.SCHED_CLS,
    "classifier": ProgramType.SCHED_CLS,
}
"""Section prefixes whose type we decide: libbpf 1.1 doesn't know tcx and netkit, later ones do."""

_BTF_KIND_DATASEC: Final = 15
_VLEN_MASK: Final = 0xFFFF


@dataclass(frozen=True)
class MapSpec:
    """A map as its source declares it. Sizes in bytes; ``flags`` are BPF_F_*.

    Sections of global variables are maps too, named as in the ELF: ``.rodata``, ``.bss``.
    """

    name: str
    type: MapType
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0
    inner: MapSpec | None = None
    """The template that a map of maps accepts as its values; None for other maps."""


@dataclass(frozen=True)
class ProgramSpec:
    """A program: its function's ``name``, its ELF ``section`` and the type that follows from it."""

    name: str
    section: str
    type: ProgramType


@dataclass(frozen=True)
class Variable:
    """A ``const volatile`` global: where it lies in its section's map, in bytes."""

    name: str
    section: str
    offset: int
    size: int


@dataclass(frozen=True)
class CollectionSpec:
    """Everything in one ELF object: ``maps``, ``programs``, and ``constants`` settable at load."""

    name: str
    elf: bytes = field(repr=False)
    maps: Mapping[str, MapSpec]
    programs: Mapping[str, ProgramSpec]
    constants: Mapping[str, Variable]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read the ELF object at ``path``. The file is not needed afterwards.

        NotFound when there is no such file, InvalidInput when it is not a BPF object.
        """
        path = Path(path)
        try:
            elf = path.read_bytes()
        except FileNotFoundError:
            raise NotFound("BPF object", str(path)) from None
        name = path.name.split(".", 1)[0]
        with opened(elf, name, str(path)) as obj:
            maps = [_map_spec(handle) for handle in each_map(obj)]
            programs = [_program_spec(handle) for handle in each_program(obj)]
            constants = _constants(obj)
        return cls(
            name,
            elf,
            MappingProxyType({spec.name: spec for spec in maps}),
            MappingProxyType({spec.name: spec for spec in programs}),
            MappingProxyType(constants),
        )


@contextmanager
def opened(elf: bytes, name: str, origin: str) -> Iterator[int]:
    """An open ``struct bpf_object *`` of ``elf``; closed at the end. Doesn't touch the kernel."""
    opts = _libbpf.OpenOpts(sz=ctypes.sizeof(_libbpf.OpenOpts), object_name=name.encode())
    with _libbpf.captured_messages() as said:
        obj = _libbpf.object_open_mem(elf, len(elf), ctypes.byref(opts))
    if not obj:
        why = "; ".join(line.strip() for line in said) or os.strerror(ctypes.get_errno())
        raise InvalidInput("object", origin, f"not a BPF ELF object that libbpf can read: {why}")
    try:
        yield obj
    finally:
        _libbpf.object_close(obj)


def _each(following: Callable[..., Any], obj: int) -> Iterator[int]:
    handle = following(obj, None)
    while handle:
        yield handle
        handle = following(obj, handle)


def each_map(obj: int) -> Iterator[int]:
    """Every ``struct bpf_map *`` of an open object, in the file's order."""
    return _each(_libbpf.object_next_map, obj)


def each_program(obj: int) -> Iterator[int]:
    """Every ``struct bpf_program *`` of an open object, in the file's order."""
    return _each(_libbpf.object_next_program, obj)


def map_key(handle: int) -> str:
    """The name of a map in our dictionaries; libbpf prefixes sections with the object's name."""
    name: str = _libbpf.map_name(handle).decode()
    return "." + name.partition(".")[2] if _libbpf.map_is_internal(handle) else name


def section_type(handle: int) -> ProgramType:
    """The type that a program's section says, the same under every libbpf; UNSPEC if none."""
    section: str = _libbpf.program_section_name(handle).decode()
    known = _SECTION_TYPES.get(section.lstrip("?").partition("/")[0])
    return ProgramType(_libbpf.program_type(handle)) if known is None else known


def _map_spec(handle: int) -> MapSpec:
    inner = _libbpf.map_inner(handle)
    return MapSpec(
        name=map_key(handle),
        type=MapType(_libbpf.map_type(handle)),
        key_size=_libbpf.map_key_size(handle),
        value_size=_libbpf.map_value_size(handle),
        max_entries=_libbpf.map_max_entries(handle),
        flags=_libbpf.map_flags(handle),
        inner=_map_spec(inner) if inner else None,
    )


def _program_spec(handle: int) -> ProgramSpec:
    return ProgramSpec(
        name=_libbpf.program_name(handle).decode(),
        section=_libbpf.program_section_name(handle).decode(),
        type=section_type(handle),
    )


def _constants(obj: int) -> dict[str, Variable]:
    """The globals in .rodata, from the object's BTF.

    Layout, from include/uapi/linux/btf.h: ``struct btf_type`` is three u32 (name_off, info, size or
    type), and a DATASEC is followed by info & 0xffff times ``struct btf_var_secinfo``: type, offset, size.
    """
    btf = _libbpf.object_btf(obj)
    section = _libbpf.btf_find_by_name_kind(btf, b".rodata", _BTF_KIND_DATASEC) if btf else -1
    if section < 0:
        return {}
    head = (ctypes.c_uint32 * 3).from_address(_libbpf.btf_type_by_id(btf, section))
    count = head[1] & _VLEN_MASK
    rows = (ctypes.c_uint32 * (3 + 3 * count)).from_address(ctypes.addressof(head))
    found = {}
    for type_id, offset, size in zip(rows[3::3], rows[4::3], rows[5::3], strict=True):
        name_offset = ctypes.c_uint32.from_address(_libbpf.btf_type_by_id(btf, type_id)).value
        name = _libbpf.btf_str_by_offset(btf, name_offset).decode()
        found[name] = Variable(name, ".rodata", offset, size)
    return found
