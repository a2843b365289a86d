"""The directory of a guest's API socket: private, and gone when the guest is, whatever ended its owner.

``<run dir>/vm/<name>.<cookie>.fc`` (0700), with the cookie of the guest's namespace, is there while its
``vm run`` is. What was killed together with its guard leaves one, which the next guest of that name removes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from portwright.model.errors import InvalidInput
from portwright.vmm.firecracker.parts import MAX_SOCKET_PATH

_SOCKET: Final = "api.sock"
#: A Firecracker that is about to be killed may still make its socket, once, while the directory is removed.
_TRIES: Final = 3


def path(folder: Path, name: str, cookie: int) -> Path:
    """The guest's directory; ``folder`` is that of the control sockets."""
    return folder / f"{name}.{cookie}.fc"


@contextlib.contextmanager
def made(folder: Path, name: str, cookie: int) -> Iterator[Path]:
    """The path for the API socket, in a directory of the guest's own; for whoever has claimed the name.

    Raises InvalidInput where that is too long for a socket.
    """
    where = path(folder, name, cookie)
    if len(os.fsencode(where / _SOCKET)) > MAX_SOCKET_PATH:
        why = f"with it {where / _SOCKET} is longer than a Unix socket's {MAX_SOCKET_PATH} bytes"
        raise InvalidInput("name", name, f"{why}; use a shorter one")
    mine = re.compile(rf"{re.escape(name)}\.\d+\.fc")
    for left in folder.iterdir():  # the name is ours, so nobody lives in one
        if mine.fullmatch(left.name):
            _remove(left)
    where.mkdir(mode=0o700)
    try:
        yield where / _SOCKET
    finally:
        _remove(where)


def sweep(folder: Path, name: str, cookie: int) -> None:
    """Remove the directory of a guest whose ``vm run`` is gone."""
    _remove(path(folder, name, cookie))


def _remove(where: Path) -> None:
    for _ in range(_TRIES):
        shutil.rmtree(where, ignore_errors=True)
        if not where.exists():
            return
