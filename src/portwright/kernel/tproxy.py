"""Sockets of a transparent proxy for DNS: what was sent to anybody's port 53 arrives, and is answered as he.

nftables' ``tproxy`` hands a packet to a local socket and changes nothing in it (Documentation/networking/
tproxy.rst). The socket must be transparent (IP_TRANSPARENT, IPV6_TRANSPARENT: CAP_NET_ADMIN). TCP: an
accepted connection's own address is the one that the client dialled. UDP: the datagram's destination comes
with it (IP_ORIGDSTADDR), and the answer has to be sent from there.

UDP answers go out by a raw socket bound to that address. A UDP socket bound to its port 53 would be refused
where the host has a name server of its own on every address (EADDRINUSE); a raw socket has no port to
collide, and the kernel still builds the IP header, routes, and fragments.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import NamedTuple

from portwright.kernel.netns import entered
from portwright.model.errors import KernelFailed

#: The largest query that is read: RFC 6891's common buffer size. Longer ones are noise.
MAX_QUERY = 4096
_SOL_IPV6 = 41
_IP_TRANSPARENT, _IP_ORIGDSTADDR = 19, 20  # include/uapi/linux/in.h
_IPV6_ORIGDSTADDR, _IPV6_TRANSPARENT = 74, 75  # include/uapi/linux/in6.h
_LOOPBACK = {int(socket.AF_INET): "127.0.0.1", int(socket.AF_INET6): "::1"}
_UDP = struct.Struct("!4H")
_PORT_TRIES = 16
#: Of the 16 bits of UDP's length.
MAX_PAYLOAD = 65535 - 8 - 40

#: (address, port)
Where = tuple[str, int]


class Datagram(NamedTuple):
    """What a client sent, and to whom."""

    payload: bytes
    source: Where
    destination: Where


class Listeners(NamedTuple):
    """Four sockets on one port of the loopback addresses: both families, UDP and TCP."""

    port: int
    udp: tuple[socket.socket, ...]
    tcp: tuple[socket.socket, ...]

    def close(self) -> None:
        """Close all of them."""
        for sock in (*self.udp, *self.tcp):
            sock.close()


def listen(netns_fd: int, backlog: int = 64) -> Listeners:
    """Open the listeners in a namespace, on a port that is free for all four; not blocking.

    On the loopback addresses, so that nobody outside can dial them; tproxy hands over what was dialled
    elsewhere. Raises KernelFailed, with nothing left open.
    """
    with entered(netns_fd):
        for _ in range(_PORT_TRIES):
            made: list[socket.socket] = []
            try:
                return _listen(made, backlog)
            except OSError as error:
                for sock in made:
                    sock.close()
                if error.errno != errno.EADDRINUSE:
                    raise KernelFailed(error.errno or errno.EIO, "transparent listener") from error
    raise KernelFailed(errno.EADDRINUSE, "transparent listener", f"no free port in {_PORT_TRIES} tries")


def _listen(made: list[socket.socket], backlog: int) -> Listeners:
    port = 0
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        for family in (socket.AF_INET, socket.AF_INET6):
            sock = _transparent(family, kind, 0)
            made.append(sock)
            sock.setblocking(False)
            if family == socket.AF_INET6:
                sock.setsockopt(_SOL_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((_LOOPBACK[family], port))
            port = sock.getsockname()[1]
            if kind == socket.SOCK_STREAM:
                sock.listen(backlog)
            elif family == socket.AF_INET:
                sock.setsockopt(socket.SOL_IP, _IP_ORIGDSTADDR, 1)
            else:
                sock.setsockopt(_SOL_IPV6, _IPV6_ORIGDSTADDR, 1)
    return Listeners(port, tuple(made[2:]), tuple(made[:2]))


def receive(sock: socket.socket) -> Datagram | None:
    """The next datagram of a listener; None for one that is too long or has no destination with it.

    Raises BlockingIOError when there is none.
    """
    payload, ancillary, flags, source = sock.recvmsg(MAX_QUERY, 128)
    if flags & socket.MSG_TRUNC:
        return None
    for _, kind, data in ancillary:
        if kind == _IP_ORIGDSTADDR and len(data) >= 8:
            (port,) = struct.unpack_from("!H", data, 2)
            return Datagram(payload, source[:2], (socket.inet_ntop(socket.AF_INET, data[4:8]), port))
        if kind == _IPV6_ORIGDSTADDR and len(data) >= 24:
            (port,) = struct.unpack_from("!H", data, 2)
            return Datagram(payload, source[:2], (socket.inet_ntop(socket.AF_INET6, data[8:24]), port))
    return None


def answer(netns_fd: int, datagram: Datagram, payload: bytes) -> None:
    """Send a datagram back to whom one came from, as whom it was for. Raises OSError.

    It may be lost like any other: where the socket's buffer is full, BlockingIOError says so.
    """
    family = socket.AF_INET6 if ":" in datagram.source[0] else socket.AF_INET
    source, target = datagram.destination, datagram.source
    length = _UDP.size + len(payload)
    pseudo = socket.inet_pton(family, source[0]) + socket.inet_pton(family, target[0])
    header = _UDP.pack(source[1], target[1], length, 0)
    check = _checksum(pseudo + struct.pack("!HH", socket.IPPROTO_UDP, length) + header + payload)
    with entered(netns_fd):
        sock = _transparent(family, socket.SOCK_RAW, socket.IPPROTO_UDP)
    with sock:
        sock.setblocking(False)
        sock.bind((source[0], 0))
        sock.sendto(_UDP.pack(source[1], target[1], length, check) + payload, (target[0], 0))


def _transparent(family: int, kind: int, protocol: int) -> socket.socket:
    sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
    try:
        if family == socket.AF_INET:
            sock.setsockopt(socket.SOL_IP, _IP_TRANSPARENT, 1)
        else:
            sock.setsockopt(_SOL_IPV6, _IPV6_TRANSPARENT, 1)
    except OSError:
        sock.close()
        raise
    return sock


def _checksum(data: bytes) -> int:
    """UDP's, never 0, which says that there is none (RFC 768)."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF or 0xFFFF
