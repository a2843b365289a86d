"""From a spec to objects in the kernel: maps made or reused, programs verified and loaded.

Everything that depends on this host happens here: sizes, what is reused from a daemon
that ran before, CO-RE relocation against the running kernel's types.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Mapping
from typing import Final, Self

from portwright.kernel.bpf import _libbpf
from portwright.kernel.bpf._fd import failed
from portwright.kernel.bpf.enums import ProgramType
from portwright.kernel.bpf.maps import Map
from portwright.kernel.bpf.objects import Program
from portwright.kernel.bpf.spec import (
    CollectionSpec,
    MapSpec,
    each_map,
    each_program,
    map_key,
    opened,
    section_type,
)
from portwright.model.errors import Conflict, InvalidInput, VerifierRejected

_LOG: Final = re.compile(
    r"prog '(?P<program>[^']*)': -- BEGIN PROG LOAD LOG --\n(?P<log>.*?)-- END PROG LOAD LOG --", re.DOTALL
)
_NOISE: Final = re.compile(
    r"^(processed \d+ insns|verification time|stack depth|max_states|mark_read|reg type unsupported)"
)
_SUMMARY_LINES: Final = 4


class Collection:
    """The loaded maps and programs of one object, each with a descriptor of its own.

    Closing the collection closes them all; what was pinned or attached stays in the kernel.
    """

    def __init__(self, maps: dict[str, Map], programs: dict[str, Program]) -> None:
        """Take over objects that are loaded; use :meth:`load`."""
        self.maps = maps
        self.programs = programs

    @classmethod
    def load(
        cls,
        spec: CollectionSpec,
        reuse: Mapping[str, Map] | None = None,
        max_entries: Mapping[str, int] | None = None,
        constants: Mapping[str, bytes] | None = None,
    ) -> Self:
        """Make the maps of ``spec`` and load its programs: all of them, or none.

        ``reuse`` gives existing maps to use in the place of new ones, with what they hold
        (the caller keeps its own object; the collection has another descriptor).
        ``max_entries`` overrides sizes, ``constants`` sets ``const volatile`` globals to
        values in the kernel's layout.

        Raises VerifierRejected; Conflict when a map to reuse doesn't fit the spec;
        InvalidInput for a name that the spec lacks, a constant of another size, or a program
        whose section names no type; KernelFailed for anything else. Leaves nothing behind then.
        """
        reuse, max_entries, constants = reuse or {}, max_entries or {}, constants or {}
        _check(spec, reuse, max_entries, constants)
        with opened(spec.elf, spec.name, spec.name) as obj:
            for handle in each_map(obj):
                name = map_key(handle)
                # Pins are made by us, at paths we choose, or not at all.
                _libbpf.map_set_pin_path(handle, None)
                if name in reuse:
                    _tune(_libbpf.map_reuse_fd(handle, reuse[name].fd), f"reuse the map {name}")
                elif name in max_entries:
                    _tune(_libbpf.map_set_max_entries(handle, max_entries[name]), f"size the map {name}")
                _set_constants(spec, handle, name, constants)
            for handle in each_program(obj):
                _set_type(handle)
            with _libbpf.captured_messages() as said:
                ret = _libbpf.object_load(obj)
            if ret < 0:
                raise_load_failure(spec.name, ret, "".join(said))
            return cls._take(obj)

    @classmethod
    def _take(cls, obj: int) -> Self:
        """Duplicate every descriptor out of a loaded object, which may then be closed."""
        taken = cls({}, {})
        try:
            for handle in each_map(obj):
                name = map_key(handle)
                taken.maps[name] = Map(_own(_libbpf.map_fd(handle)), name)
            for handle in each_program(obj):
                name = _libbpf.program_name(handle).decode()
                taken.programs[name] = Program(_own(_libbpf.program_fd(handle)), name)
        except BaseException:
            taken.close()
            raise
        return taken

    def close(self) -> None:
        """Close every map and program. Closing twice is fine."""
        for item in (*self.maps.values(), *self.programs.values()):
            item.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _own(fd: int) -> int:
    """A close-on-exec duplicate."""
    copy = os.dup(fd)
    os.set_inheritable(copy, False)
    return copy


def _tune(ret: int, what: str) -> None:
    if ret < 0:
        failed(ret, what)


def _check(
    spec: CollectionSpec,
    reuse: Mapping[str, Map],
    max_entries: Mapping[str, int],
    constants: Mapping[str, bytes],
) -> None:
    """Refuse what can be seen to be wrong before the kernel is touched."""
    for title, given, known in (
        ("reuse", reuse, spec.maps),
        ("max_entries", max_entries, spec.maps),
        ("constants", constants, spec.constants),
    ):
        for name in given:
            if name not in known:
                raise InvalidInput(f"{title}.{name}", name, f"{spec.name} has only {sorted(known)}")
    for name, old in reuse.items():
        _check_reuse(spec.maps[name], old, max_entries.get(name, spec.maps[name].max_entries))
    for name, value in constants.items():
        if len(value) != spec.constants[name].size:
            raise InvalidInput(f"constants.{name}", value, f"needs {spec.constants[name].size} bytes")
    for program in spec.programs.values():
        if program.type is ProgramType.UNSPEC:
            raise InvalidInput(
                f"programs.{program.name}", program.section, "the section names no program type"
            )


def _check_reuse(want: MapSpec, have: Map, max_entries: int) -> None:
    """Conflict unless ``have`` is what loading ``want`` would make. libbpf itself wouldn't notice."""
    pairs = {
        "type": (want.type, have.type),
        "key_size": (want.key_size, have.key_size),
        "value_size": (want.value_size, have.value_size),
        "max_entries": (max_entries, have.max_entries),
        "flags": (want.flags, have.flags),
    }
    if max_entries == 0:  # libbpf or the kernel chooses (possible CPUs, a page)
        del pairs["max_entries"]
    wrong = [
        f"{what} is {has!r} and must be {needs!r}" for what, (needs, has) in pairs.items() if needs != has
    ]
    if wrong:
        raise Conflict("map", want.name, "cannot be reused: " + ", ".join(wrong))


def _set_constants(spec: CollectionSpec, handle: int, section: str, constants: Mapping[str, bytes]) -> None:
    """Write the constants that lie in ``section`` into the image that becomes its map."""
    mine = [(spec.constants[name], value) for name, value in constants.items()]
    mine = [(variable, value) for variable, value in mine if variable.section == section]
    if not mine:
        return
    size = ctypes.c_size_t()
    image = _libbpf.map_initial_value(handle, ctypes.byref(size))
    for variable, value in mine:
        if not image or variable.offset + variable.size > size.value:
            raise InvalidInput(f"constants.{variable.name}", value, f"lies outside of {section}")
        ctypes.memmove(image + variable.offset, value, variable.size)


def _set_type(handle: int) -> None:
    """Give a program its section's type.

    A classifier gets no expected attach type, whatever its section: newer libbpf would set
    TCX's, and the same program then behaved differently by library. The kernel asks for none
    (kernel/bpf/syscall.c: bpf_prog_attach_check_attach_type), so one program goes to
    TCX, netkit and clsact alike.
    """
    kind = section_type(handle)
    if kind is ProgramType.SCHED_CLS:
        _tune(_libbpf.program_set_type(handle, kind), "set a program's type")
        _tune(_libbpf.program_set_expected_attach_type(handle, 0), "set a program's attach type")


def raise_load_failure(name: str, ret: int, said: str) -> None:
    """Turn what libbpf said about a failed load into VerifierRejected or KernelFailed."""
    found = _LOG.search(said)
    # E2BIG or ENOSPC may come with a log too, but what it says is the verifier's word in all cases.
    if found and found["log"].strip():
        log = found["log"]
        raise VerifierRejected(found["program"], summarize(log), log)
    failed(ret, f"load {name}", summarize(said))


def summarize(log: str) -> str:
    """The lines of a verifier log that matter: the last ones, without its statistics.

    A line of source (``; …``) that precedes them is kept, for the programmer's eye.
    """
    lines = [line.rstrip() for line in log.splitlines() if line.strip() and not _NOISE.match(line)]
    if not lines:
        return os.strerror(errno.EINVAL)
    tail = lines[-_SUMMARY_LINES:]
    if not any(line.startswith(";") for line in tail):
        tail = [line for line in lines[:-_SUMMARY_LINES] if line.startswith(";")][-1:] + tail
    return "\n".join(tail)
