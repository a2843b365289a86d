"""A folder of manifests as it stands: every file's text, or one error; and the places to look at for changes.

The daemon does what the folder says, so whoever can write there is root. The way to each file is walked name
by name, links too, as the kernel walks it, and every directory on it must be such that only root can put
another file in its place. The same walk tells which names, in which directories, a change could come from: a
file written in place or renamed over, a link that is swapped (``..data`` of a mounted ConfigMap), the folder
itself when it comes back.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Final

import msgspec

from portwright.model.errors import InvalidInput

#: The bounds of a folder. A file's own is documents.MAX_BYTES; its content is bounded there too.
MAX_FILES: Final = 1_000
MAX_ENTRIES: Final = 10_000
MAX_FILE_BYTES: Final = 8 << 20
MAX_BYTES: Final = 64 << 20
#: Directories that links of the folder may lead through.
MAX_PLACES: Final = 64
#: As the kernel's own (MAXSYMLINKS).
_MAX_LINKS: Final = 40

SUFFIXES: Final = (".yaml", ".yml", ".json")
_OPTION: Final = "policy-dir"
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


class FolderState(msgspec.Struct, frozen=True, kw_only=True):
    """The watched folder, '' if there is none; ``error``: why what it says is not in force, '' if it is."""

    path: str = ""
    error: str = ""


class Place(msgspec.Struct):
    """A directory where changes of these names matter, and of ``every`` manifest's if it is the folder.

    ``content``: what is written into its files matters, not only which there are.
    """

    names: set[str] = msgspec.field(default_factory=set)
    every: bool = False
    content: bool = False

    def concerns(self, name: str) -> bool:
        """Whether a change of ``name`` matters; '' is the directory itself."""
        return not name or name in self.names or (self.every and is_manifest(name))

    def joined(self, other: Place) -> Place:
        """Both, of one directory that two ways lead to."""
        return Place(self.names | other.names, self.every or other.every, self.content or other.content)


Places = dict[str, Place]


def is_manifest(name: str) -> bool:
    """Whether a file of this name is one: not an editor's (hidden, or with another suffix)."""
    return not name.startswith(".") and name.endswith(SUFFIXES)


def forgotten(watched: Collection[str]) -> str:
    """What is wrong if nobody follows the folder that these files are of; '' if they are none."""
    if not watched:
        return ""
    return (
        f"{len(watched)} manifests of a folder that is no longer watched are in force ({min(watched)}); "
        "start with --policy-dir, or take them away with `portwright policy delete`"
    )


def is_inside(folder: Path, name: str) -> bool:
    """Whether a file of this absolute name would be one of the folder's, by whatever way it is named."""
    if not name.startswith("/"):
        return False
    parent = os.path.dirname(os.path.normpath(name))  # noqa: PTH120 - text, as the record has it
    return parent == str(folder) or os.path.realpath(parent) == os.path.realpath(folder)


def read_folder(folder: Path, places: Places) -> list[tuple[str, str]]:
    """(name, text) of every manifest in ``folder``, by name, which is the folder's and the file's, no link's.

    ``places`` is filled with where changes could come from, also if this raises: InvalidInput for what can't
    be read, is not a file, is empty, too much, or others than root could write.
    """
    at, mode = _walk("/", PurePosixPath(folder), places)
    if not stat.S_ISDIR(mode):
        raise InvalidInput(_OPTION, str(folder), "is no directory; name the folder of the manifests")
    place = _place(places, at)
    place.every = place.content = True
    _only_roots(at, os.stat(at), sticky=False)  # noqa: PTH116 - a path of the walk, as text
    found = []
    left = MAX_BYTES
    for name in _names(folder, at):
        path, mode = _walk(at, PurePosixPath(name), places)
        if stat.S_ISDIR(mode):
            continue
        _place(places, str(Path(path).parent)).content = True
        text = _text(folder / name, path)
        left -= len(text)
        if left < 0:
            raise InvalidInput(_OPTION, str(folder), f"holds more than {MAX_BYTES >> 20} MiB of manifests")
        found.append((str(folder / name), text))
    return found


def _names(folder: Path, at: str) -> list[str]:
    names = []
    try:
        with os.scandir(at) as entries:
            for number, entry in enumerate(entries):
                if number >= MAX_ENTRIES:
                    why = f"has more than {MAX_ENTRIES} entries; give the manifests a folder of their own"
                    raise InvalidInput(_OPTION, str(folder), why)
                if is_manifest(entry.name):
                    names.append(entry.name)
    except OSError as error:
        raise _unreadable(at, error) from error
    if len(names) > MAX_FILES:
        why = f"has more than {MAX_FILES} manifests; join some of them in one file"
        raise InvalidInput(_OPTION, str(folder), why)
    return sorted(names)


def _walk(at: str, path: PurePosixPath, places: Places) -> tuple[str, int]:
    """Where ``path``, from ``at`` on, ends, and that one's mode; nothing on the way is anybody else's."""
    todo = [part for part in reversed(path.parts) if part != "/"]
    mode = stat.S_IFDIR
    links = 0
    while todo:
        name = todo.pop()
        if name == "..":
            at = str(Path(at).parent)
            continue
        entry = str(Path(at) / name)
        try:
            _place(places, at).names.add(name)  # first: the change that mends it is made here
            _only_roots(at, os.stat(at), sticky=True)  # noqa: PTH116 - a path of the walk, as text
            found = os.lstat(entry)
            target = PurePosixPath(os.readlink(entry)) if stat.S_ISLNK(found.st_mode) else None  # noqa: PTH115
        except OSError as error:
            raise _unreadable(entry, error) from error
        _only_roots(entry, found, sticky=True)
        mode = found.st_mode
        if target is None:
            at = entry
            continue
        links += 1
        if links > _MAX_LINKS:
            raise InvalidInput(_OPTION, entry, f"more than {_MAX_LINKS} links lead on from here")
        at = "/" if target.is_absolute() else at
        todo += [part for part in reversed(target.parts) if part != "/"]
    return at, mode


def _place(places: Places, at: str) -> Place:
    if at not in places and len(places) >= MAX_PLACES:
        why = f"links lead through more than {MAX_PLACES} directories; keep the files in fewer"
        raise InvalidInput(_OPTION, at, why)
    return places.setdefault(at, Place())


def _only_roots(path: str, found: os.stat_result, *, sticky: bool) -> None:
    """Raises if others than root could change it. ``sticky``: where only their own entries are theirs."""
    if found.st_uid not in {0, os.geteuid()}:
        why = f"belongs to user {found.st_uid}, who could change policy; chown it to root"
        raise InvalidInput(_OPTION, path, why)
    if stat.S_ISLNK(found.st_mode) or not found.st_mode & _OTHERS_WRITE:
        return
    if not (sticky and stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX):
        why = f"others than root could write it (mode {found.st_mode & 0o7777:o}); chmod go-w it"
        raise InvalidInput(_OPTION, path, why)


def _text(name: Path, path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise InvalidInput(_OPTION, str(name), "is no file; move it out of the folder")
            _only_roots(path, found, sticky=False)
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _unreadable(str(name), error) from error
    if not raw:
        why = "is empty; write the manifest, or remove the file to take its policies away"
        raise InvalidInput(_OPTION, str(name), why)
    if len(raw) > MAX_FILE_BYTES:
        why = f"is larger than {MAX_FILE_BYTES >> 20} MiB; split it"
        raise InvalidInput(_OPTION, str(name), why)
    try:
        str(name).encode()
        return raw.decode()
    except UnicodeError as error:
        raise InvalidInput(_OPTION, str(name), f"name and text must be UTF-8: {error}") from error


def _unreadable(path: str, error: OSError) -> InvalidInput:
    return InvalidInput(_OPTION, path, f"can't be read: {error.strerror}; what was in force stays")
