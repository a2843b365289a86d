"""Putting the shim and a network list where a CNI runtime looks for them, atomically.

A runtime may execute the shim or read the list at any moment, so every file is written beside
its final name, synced, and renamed: a reader sees the old one or the new one, whole. The shim
is a regular file (libcni's FindInPath wants one), never a symbolic link.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from portwright.model.errors import Conflict, InvalidInput, KernelFailed, NotFound

#: The plugin's type, and so the name of the executable.
PLUGIN: Final = "portwright"
#: Where the build leaves the shim.
SHIM: Final = Path(__file__).parent / "shim" / "portwright-cni"
#: What the list offers to runtimes; all of it is honoured.
CAPABILITIES: Final = ("portMappings", "bandwidth", "ips", "ipRanges", "mac", "dns")
#: The key by which a list is known to be ours. Runtimes ignore keys that they don't know.
MARKER: Final = "x-portwright-installed"

_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*", re.ASCII)
#: The slots in the shim: marker, then a path and zeros up to the size (shim/portwright-cni.c).
_SOCKET_MARK: Final = b"PORTWRIGHT-SOCKET:"
_SPOOL_MARK: Final = b"PORTWRIGHT-SPOOL=:"
_SLOT: Final = 256
#: struct sockaddr_un has room for 107 bytes and a zero (unix(7)).
_MAX_SOCKET: Final = 107
#: The list's own version is the newest that runtimes of Debian 12 know; newer ones choose from the array.
_LIST_VERSION: Final = "1.0.0"
_LIST_VERSIONS: Final = ("1.0.0", "1.1.0")


def install(
    bin_dir: Path,
    conf_dir: Path,
    *,
    network: str | None,
    socket: Path,
    spool: Path,
    shim: Path = SHIM,
    extras: Mapping[str, object] | None = None,
    chained: Iterable[Mapping[str, object]] = (),
) -> list[Path]:
    """Install the shim into ``bin_dir`` and, if ``network`` is named, its list into ``conf_dir``.

    The installed shim forwards to ``socket`` and spools in ``spool`` (absolute paths). ``extras`` are
    further keys of our plugin's object (``ipam``, ``mtu``, …), ``chained`` further plugins after it.
    Missing directories are made. Returns the files written; running it again gives the same files.
    Raises InvalidInput, NotFound (no shim built), Conflict (a file that is there and not ours; nothing
    is written then) or KernelFailed (the file system refused).
    """
    binary = patched(_read(shim), socket=socket, spool=spool)
    files = [(bin_dir / PLUGIN, binary, 0o755)]
    if network is not None:
        body = conflist(network, extras=extras or {}, chained=chained)
        files.append((conflist_path(conf_dir, network), body, 0o644))
    for path, _, _ in files:
        if os.path.lexists(path) and not is_ours(path):
            raise Conflict("file", str(path), "was not installed by Portwright; move it away first")
    for path, data, mode in files:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, data, mode)
        except OSError as error:
            raise KernelFailed(error.errno or 0, f"write {path}", str(error)) from error
    return [path for path, _, _ in files]


def uninstall(bin_dir: Path, conf_dir: Path, *, network: str | None = None) -> list[Path]:
    """Remove what :func:`install` wrote: the shim, and the list of ``network`` or every list of ours.

    Files that are not ours stay. Lists go first, so that no runtime is left with a list whose
    plugin is missing. Returns the files removed; raises KernelFailed.
    """
    lists = [conflist_path(conf_dir, network)] if network else sorted(conf_dir.glob("*.conflist"))
    removed = []
    for path in [*lists, bin_dir / PLUGIN]:
        if not is_ours(path):
            continue
        try:
            path.unlink()
        except OSError as error:
            raise KernelFailed(error.errno or 0, f"remove {path}") from error
        removed.append(path)
    return removed


def conflist_path(conf_dir: Path, network: str) -> Path:
    """Return where the list of ``network`` belongs; raises InvalidInput for a name that CNI forbids."""
    if not _NAME.fullmatch(network):
        raise InvalidInput("network", network, "invalid characters found in network name")
    return conf_dir / f"10-portwright-{network}.conflist"


def conflist(network: str, *, extras: Mapping[str, object], chained: Iterable[Mapping[str, object]]) -> bytes:
    """Return the network configuration list, as the file's bytes.

    ``cniVersion`` is 1.0.0 because libcni before 1.2 knows no newer one; ``cniVersions`` lets a newer
    runtime take 1.1.0, and with it GC and STATUS.
    """
    if {"type", "name", "cniVersion"} & set(extras):
        raise InvalidInput("extras", sorted(extras), "type, name and cniVersion are not for extras")
    own = {"type": PLUGIN, "capabilities": dict.fromkeys(CAPABILITIES, True), **extras}
    body = {
        "cniVersion": _LIST_VERSION,
        "cniVersions": list(_LIST_VERSIONS),
        "name": network,
        MARKER: True,
        "plugins": [own, *(dict(one) for one in chained)],
    }
    return json.dumps(body, indent=2).encode() + b"\n"


def patched(binary: bytes, *, socket: Path, spool: Path) -> bytes:
    """Return the shim with its two paths overwritten; its length stays.

    Raises InvalidInput for a path that is relative or too long, or if ``binary`` is not the shim.
    """
    for field, path, mark, limit in (
        ("socket", socket, _SOCKET_MARK, _MAX_SOCKET),
        ("spool", spool, _SPOOL_MARK, _SLOT - 1),
    ):
        raw = os.fsencode(path)
        if not path.is_absolute() or b"\0" in raw:
            raise InvalidInput(field, str(path), "must be an absolute path")
        if len(raw) > limit:
            raise InvalidInput(field, str(path), f"is longer than {limit} bytes")
        at = binary.find(mark)
        if at < 0 or binary.find(mark, at + 1) >= 0:
            raise InvalidInput("shim", mark.decode(), "the file is not portwright-cni: no such slot, or two")
        start = at + len(mark)
        binary = binary[:start] + raw.ljust(_SLOT, b"\0") + binary[start + _SLOT :]
    return binary


def is_ours(path: Path) -> bool:
    """Tell whether ``path`` is a regular file that :func:`install` wrote; False if it is absent."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        data = path.read_bytes()
    except OSError:
        return False
    if path.suffix != ".conflist":
        return _SOCKET_MARK in data and _SPOOL_MARK in data
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(body, dict) and body.get(MARKER) is True


def _read(shim: Path) -> bytes:
    try:
        return shim.read_bytes()
    except FileNotFoundError:
        raise NotFound("shim", f"{shim} (build it: make)") from None
    except OSError as error:
        raise KernelFailed(error.errno or 0, f"read {shim}") from error


def _replace(path: Path, data: bytes, mode: int) -> None:
    """Write ``data`` to ``path`` in one step that also survives a power cut."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)
            file.write(data)
            file.flush()
            os.fsync(handle)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
