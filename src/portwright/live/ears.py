"""Who listens in the sandboxes: a socket for each place and service, kept for as long as it may be asked.

TCP is heard by the kernel itself, whose listener answers; UDP and the rest by what arrives.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from portwright.kernel import netns
from portwright.live.packets import MARK
from portwright.model.errors import PortwrightError
from portwright.policy.rules import TCP, UDP

_RESET = struct.pack("ii", 1, 0)  # struct linger: close() sends a reset, and no timer stays behind
_BACKLOG = 1024


class ProbeFailed(PortwrightError):
    """Real packets have shown neither of the two verdicts; ``flow`` says of what."""

    code = "probe-failed"

    def __init__(self, flow: str, why: str) -> None:
        super().__init__(f"{flow}: {why}")
        self.flow = flow
        self.why = why


#: In a port's place: the host itself, and what is behind its own interface.
HOST, OUTSIDE = "host:", "outside:"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an address is: a namespace (its descriptor, the caller's), and the port before it, if any.

    ``port_id`` may be HOST or OUTSIDE, too.
    """

    netns: int
    port_id: str = ""


def open_socket(place: Place, version: int, protocol: int) -> socket.socket:
    """A socket at that place for that protocol, non-blocking: of its own kind, or a raw one."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    kind = {TCP: socket.SOCK_STREAM, UDP: socket.SOCK_DGRAM}.get(protocol, socket.SOCK_RAW)
    with netns.entered(place.netns):
        return socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)


def reset(sock: socket.socket) -> None:
    """Close a TCP socket at once, for both sides."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


class Ears:
    """The listeners of all places."""

    def __init__(self) -> None:
        self._open: dict[tuple[Place, int, int, int], socket.socket] = {}

    def at(self, place: Place, version: int, protocol: int, port: int | None) -> socket.socket:
        """The listener of a place for a service; made at the first time.

        Raises ProbeFailed where something else has the port.
        """
        key = (place, version, protocol, port if port is not None and protocol in {TCP, UDP} else 0)
        known = self._open.get(key)
        if known is not None:
            return known
        sock = open_socket(place, version, protocol)
        try:
            if protocol in {TCP, UDP}:
                if version == 6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(("0.0.0.0" if version == 4 else "::", key[3]))  # noqa: S104 - inside a sandbox
            if protocol == TCP:
                sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            raise ProbeFailed(f"a listener on port {key[3]}", error.strerror or str(error)) from None
        self._open[key] = sock
        return sock

    def keep(self, places: Iterable[Place]) -> None:
        """Close the listeners of all others."""
        kept = set(places)
        for key in [key for key in self._open if key[0] not in kept]:
            self._open.pop(key).close()

    def close(self) -> None:
        """Close them all."""
        for sock in self._open.values():
            sock.close()
        self._open.clear()


def heard(sock: socket.socket, protocol: int) -> set[bytes]:
    """The marks of all that has arrived: of TCP's connections, which are taken and reset, their openers."""
    marks: set[bytes] = set()
    while True:
        try:
            if protocol == TCP:
                taken, peer = sock.accept()
                reset(taken)
                marks.add(opener(peer))
                continue
            data = sock.recv(2048)
        except BlockingIOError:
            return marks
        except OSError as error:
            if error.errno not in {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH}:
                raise
            continue  # an ICMP error about something that this socket has sent
        if len(data) >= MARK:
            marks.add(data[-MARK:])


def opener(name: tuple[str, int]) -> bytes:
    """The mark of a TCP connection: its opener's address and port, as Python's sockets say them."""
    return f"{name[0]} {name[1]}".encode()
