"""What Firecracker's requests and answers are made of, and what a name in them may be."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from portwright.model.errors import InvalidInput

#: linux/if.h, IFNAMSIZ without the end.
MAX_NAME = 15
#: linux/un.h, sun_path without the end.
MAX_SOCKET_PATH = 107
_ID = re.compile(r"[A-Za-z0-9_]+")


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A value inside a request or an answer. None is left out when it is sent."""


class TokenBucket(Part, frozen=True, kw_only=True):
    """``size`` tokens, filled from empty in ``refill_time`` ms; 0 of either is no limit.

    ``one_time_burst`` is credit on top of ``size``, whatever the description says.
    """

    size: int
    refill_time: int
    one_time_burst: int | None = None


class RateLimiter(Part, frozen=True, kw_only=True):
    """``bandwidth`` counts bytes, ``ops`` frames. PATCH leaves alone what is None."""

    bandwidth: TokenBucket | None = None
    ops: TokenBucket | None = None


class NetworkOverride(Part, frozen=True, kw_only=True):
    """The tap that a NIC of a snapshot gets: its name, and nothing else of the NIC."""

    iface_id: str
    host_dev_name: str


class VsockOverride(Part, frozen=True, kw_only=True):
    """Where the socket of a snapshot's vsock is made."""

    uds_path: str


class MemoryBackend(Part, frozen=True, kw_only=True):
    """Where a snapshot's memory comes from."""

    backend_type: Literal["File", "Uffd"]
    backend_path: str


def check_tap(field: str, name: str) -> None:
    """Raise InvalidInput for what no Linux device is called."""
    if not 0 < len(name.encode()) <= MAX_NAME:
        raise InvalidInput(field, name, f"a device's name has 1 to {MAX_NAME} bytes")
    if (
        name in {".", ".."}
        or "/" in name
        or "%" in name
        or any(c.isspace() or not c.isprintable() for c in name)
    ):
        # '%' is where TUNSETIFF puts a number (tun%d): another device than the one that was named.
        raise InvalidInput(field, name, "a device's name has no '/', no '%' and no blanks")


def check_id(field: str, value: str) -> None:
    """Raise InvalidInput for what Firecracker takes for no id, and what would lead to another path."""
    if not _ID.fullmatch(value):
        raise InvalidInput(field, value, "an id has letters, digits and '_'")  # parsed_request.rs, checked_id


def check_socket(field: str, path: str) -> None:
    """Raise InvalidInput for a path that no Unix socket can have."""
    if not 0 < len(path.encode()) <= MAX_SOCKET_PATH:
        why = f"a socket's path has 1 to {MAX_SOCKET_PATH} bytes; inside a jail a relative one may be shorter"
        raise InvalidInput(field, path, why)
