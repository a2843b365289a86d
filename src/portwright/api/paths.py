"""Where the daemon's files are, and how a caller names a network namespace."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from portwright.model.errors import InvalidInput

DEFAULT_RUN_DIR: Final = "/run/portwright"
DEFAULT_STATE_DIR: Final = "/var/lib/portwright"
RUN_DIR_VARIABLE: Final = "PORTWRIGHT_RUN_DIR"
STATE_DIR_VARIABLE: Final = "PORTWRIGHT_STATE_DIR"
#: Where ``ip netns`` keeps its names.
NETNS_DIR: Final = "/run/netns"

#: How a network namespace is named: a path, a name in /run/netns, ``pid:N``, or an open descriptor.
NetnsSpec = str | os.PathLike[str] | int


def socket_path(run_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the daemon's socket in ``run_dir`` (default: $PORTWRIGHT_RUN_DIR, else /run/portwright)."""
    if run_dir is None:
        run_dir = os.environ.get(RUN_DIR_VARIABLE) or DEFAULT_RUN_DIR
    return Path(run_dir) / "portwright.sock"


def netns_path(spec: NetnsSpec) -> str:
    """Return the path that ``spec`` stands for: ``pid:N`` and names without a slash are written out.

    Raises InvalidInput for ``pid:`` without a positive number, and for an empty name.
    """
    if isinstance(spec, int):
        try:
            return str(Path(f"/proc/self/fd/{spec}").readlink())
        except OSError as error:
            raise InvalidInput("netns", spec, f"not an open descriptor: {error.strerror}") from None
    text = os.fspath(spec)
    if text.startswith("pid:"):
        pid = text.removeprefix("pid:")
        if not (pid.isascii() and pid.isdigit() and int(pid) > 0):
            raise InvalidInput("netns", text, "pid: has to be followed by a process id")
        return f"/proc/{int(pid)}/ns/net"
    if text in ("", ".", ".."):
        raise InvalidInput("netns", text, "name a path, a name in /run/netns, or pid:N")
    return text if "/" in text else f"{NETNS_DIR}/{text}"


def open_netns(spec: NetnsSpec) -> int:
    """Return a close-on-exec descriptor of the namespace, the caller's to close.

    Raises InvalidInput naming the path if it can't be opened. Whether it is a network namespace
    is for the daemon to say.
    """
    try:
        if isinstance(spec, int):
            return os.dup(spec)
        return os.open(netns_path(spec), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        given = spec if isinstance(spec, int) else os.fspath(spec)
        why = (
            f"can't open {netns_path(spec)}: {error.strerror}"
            if not isinstance(spec, int)
            else str(error.strerror)
        )
        raise InvalidInput("netns", given, why) from None
