"""What an executable needs to run: its loader and its shared libraries, read from its ELF headers.

Nothing is executed, as ``ldd`` does it: what goes into a jail is not trusted before. ELF is read by
pyelftools. A library is looked for where the loader does (ld.so(8)): the paths that the file itself names,
then the loader's cache, whose list ``ldconfig -p`` prints, then the usual directories.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from portwright.model.errors import InvalidInput, NotFound, NotSupported

#: The loader's list of libraries; a loader in the jail reads it too.
CACHE: Final = "/etc/ld.so.cache"
_USUAL: Final = ("/lib", "/usr/lib", "/lib64", "/usr/lib64")
_CACHED: Final = re.compile(r"^\t(\S+) \([^)]*\) => (\S+)$", re.MULTILINE)
#: Of one executable; QEMU has some 90.
MAX_LIBRARIES: Final = 1000


@dataclass(frozen=True)
class Elf:
    """What is asked of a file. ``machine``: class and architecture, which have to agree."""

    machine: tuple[int, str]
    loader: str = ""
    needed: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()


def of(path: str) -> tuple[str, ...]:
    """The absolute paths of all that the file needs besides itself; none for a static one.

    Raises NotFound for a library that is nowhere, InvalidInput for a script.
    """
    first = read(path)
    if first is None:
        raise InvalidInput(
            "command", path, "not an ELF executable; name a script's interpreter, and --file it"
        )
    found = {path: first} | ({first.loader: Elf(first.machine)} if first.loader else {})
    names: set[str] = set()  # a loader loads what has one name once
    waiting = [path]
    while waiting:
        wanting = waiting.pop()
        for name in found[wanting].needed:
            if name in names:
                continue
            names.add(name)
            library, there = _library(name, wanting, found[wanting], first)
            if library not in found:
                found[library] = there
                waiting.append(library)
        if len(found) > MAX_LIBRARIES:
            raise NotSupported(
                "jail", f"an executable with over {MAX_LIBRARIES} libraries", "link it statically"
            )
    return tuple(list(found)[1:])


def read(path: str) -> Elf | None:
    """The file's headers; None if it isn't ELF, or can't be read."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a str is what all of this is about
    except OSError:
        return None
    return _read(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=4096)
def _read(path: str, _identity: tuple[int, ...]) -> Elf | None:
    """As read(), once for a file that stays what it is: one takes milliseconds, and QEMU has fifty."""
    from elftools.common.exceptions import ELFError  # noqa: PLC0415 - of the extra `jail`
    from elftools.elf.dynamic import DynamicSegment  # noqa: PLC0415 - the same
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415 - the same
    from elftools.elf.segments import InterpSegment  # noqa: PLC0415 - the same

    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a str is what all of this is about
            elf = ELFFile(file)
            loader, needed, paths = "", [], []
            for segment in elf.iter_segments():
                if isinstance(segment, InterpSegment):
                    loader = segment.get_interp_name()
                elif isinstance(segment, DynamicSegment):
                    for tag in segment.iter_tags():
                        if tag.entry.d_tag == "DT_NEEDED":
                            needed.append(str(tag.needed))  # type: ignore[attr-defined]  # made at run time
                        elif tag.entry.d_tag in {"DT_RUNPATH", "DT_RPATH"}:
                            words = str(getattr(tag, tag.entry.d_tag.removeprefix("DT_").lower()))
                            paths += [word for word in words.split(":") if word]
            return Elf((elf.elfclass, str(elf["e_machine"])), loader, tuple(needed), tuple(paths))
    except (ELFError, OSError, UnicodeDecodeError):
        return None


def _library(name: str, wanting: str, elf: Elf, first: Elf) -> tuple[str, Elf]:
    """Where the loader finds ``name``, which the file ``wanting`` needs, and what that is."""
    for candidate in [name] if "/" in name else _candidates(name, wanting, elf, first):
        there = read(candidate)
        if there is not None and there.machine == elf.machine:
            return candidate, there
    raise NotFound(f"the library that {wanting} needs,", name)


def _candidates(name: str, wanting: str, elf: Elf, first: Elf) -> Iterator[str]:
    origin = os.path.dirname(os.path.realpath(wanting))  # noqa: PTH120 - as above
    for path in (*elf.paths, *first.paths):
        folder = path.replace("${ORIGIN}", origin).replace("$ORIGIN", origin)
        yield os.path.normpath(f"{folder}/{name}")
    yield from _cache().get(name, ())
    for folder in _USUAL:
        yield f"{folder}/{name}"


@functools.cache
def _cache() -> dict[str, list[str]]:
    """Names and paths in the loader's cache; none where there is no such program (musl)."""
    for program in ("/sbin/ldconfig", "/usr/sbin/ldconfig"):
        if os.access(program, os.X_OK):
            done = subprocess.run([program, "-p"], capture_output=True, text=True, check=False, env={})
            found: dict[str, list[str]] = {}
            for name, path in _CACHED.findall(done.stdout):
                found.setdefault(name, []).append(path)
            return found
    return {}
