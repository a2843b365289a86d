"""Forgetting connections: deletes from the kernel's connection tracking table (ctnetlink).

Needed because NAT is decided on a connection's first packet: a UDP client that keeps its
source port goes on to an old target, long after the rule has changed, until its entry is gone.

Messages: include/uapi/linux/netfilter/nfnetlink_conntrack.h. Only whole entries that match
are deleted, one by one, by their tuple, zone and id.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

from portwright.kernel.netlink import NETLINK_NETFILTER, Message, NetlinkSocket, Request, RequestFailed
from portwright.kernel.nlattr import attr, attr_be16, attr_nested, attr_u8, iter_attrs, parse_attrs
from portwright.model.errors import InvalidInput, KernelFailed

_SUBSYS = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_CT_GET, _CT_DELETE, _CT_GET_STATS = _SUBSYS | 1, _SUBSYS | 2, _SUBSYS | 5
_NFGENMSG = struct.Struct(">BBH")  # family, version, resource id
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_ID, _CTA_ZONE = 1, 2, 12, 18
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
#: Attribute numbers of (source, destination) in a tuple's IP part, by family.
_CTA_IP = {int(socket.AF_INET): (1, 2), int(socket.AF_INET6): (3, 4)}
_CT_IP_LENGTHS = {int(socket.AF_INET): 4, int(socket.AF_INET6): 16}
_PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132, "icmp": 1, "icmpv6": 58}
_PORT_MAX = 65535

#: What an entry must contain: (which tuple, which part of it, the attribute as the kernel writes it).
_Want = tuple[int, int, bytes]


def available(netns_fd: int | None = None) -> bool:
    """Tell whether this kernel has connection tracking that we can read and delete from."""
    try:
        with NetlinkSocket(NETLINK_NETFILTER, netns_fd) as sock:
            sock.execute([Request(_CT_GET_STATS, 0, _NFGENMSG.pack(0, 0, 0), "conntrack --count")])
    except (RequestFailed, KernelFailed):
        return False
    return True


class Entries(NamedTuple):
    """Which conntrack entries: of one protocol (name or number) and family, matching all that is given.

    ``orig_*`` is what the client addressed (a published port), ``reply_*`` who really answers (the
    sandbox). At least one of the four is needed: there is no way to empty a table by mistake.
    """

    proto: str | int
    family: int
    orig_dst: str | None = None
    orig_dst_port: int | None = None
    reply_src: str | None = None
    reply_src_port: int | None = None


def purge(where: NetlinkSocket | int | None, *wanted: Entries) -> int:
    """Delete the entries that match any of ``wanted``; return how many.

    ``where`` is a NETLINK_NETFILTER socket, a namespace's descriptor or None for the thread's own.
    A descriptor costs a socket, and closing one waits until nf_tables has freed what the last
    transaction removed (nft_rcv_nl_event, net/netfilter/nf_tables_api.c; 10 ms after a DEL): who purges
    often keeps one. An entry that ends meanwhile is not counted. The kernel walks all buckets of the
    table once for each family, whatever is in them: 10 ms for the 262,144 of a usual host.
    Raises InvalidInput, or NetlinkFailed if the kernel refuses.
    """
    matchers: dict[int, list[Callable[[Message], bool]]] = {}
    for entries in wanted:
        matchers.setdefault(entries.family, []).append(_matcher(_wants(entries)))
    if not matchers:
        return 0
    if isinstance(where, NetlinkSocket):
        return sum(_purge(where, family, matches) for family, matches in matchers.items())
    with NetlinkSocket(NETLINK_NETFILTER, where) as sock:
        return sum(_purge(sock, family, matches) for family, matches in matchers.items())


class Reply(NamedTuple):
    """What answers a translated connection: where its packets come from, and whom they address."""

    proto: int
    src: str
    dst: str
    src_port: int
    dst_port: int


def translated(sock: NetlinkSocket) -> list[Reply]:
    """The replies of all connections with ports that are not simply their requests turned round."""
    found = []
    for family in _CT_IP_LENGTHS:
        for message in sock.dump(Request(_CT_GET, 0, _NFGENMSG.pack(family, 0, 0), "conntrack --dump")):
            attrs = parse_attrs(message.body, _NFGENMSG.size)
            asked, reply = (
                _tuple(attrs.get(which, b""), family) for which in (_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY)
            )
            if asked is None or reply is None:
                continue
            turned = Reply(asked.proto, asked.dst, asked.src, asked.dst_port, asked.src_port)
            if reply != turned:
                found.append(reply)
    return found


def _tuple(raw: bytes, family: int) -> Reply | None:
    """A tuple with ports; None for another."""
    attrs = parse_attrs(raw)
    ip, proto = parse_attrs(attrs.get(_CTA_TUPLE_IP, b"")), parse_attrs(attrs.get(_CTA_TUPLE_PROTO, b""))
    ends = [ip.get(kind, b"") for kind in _CTA_IP[family]]
    ports = [proto.get(kind, b"")[:2] for kind in (_CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT)]
    if any(len(end) != _CT_IP_LENGTHS[family] for end in ends) or any(len(port) != 2 for port in ports):
        return None
    number = proto.get(_CTA_PROTO_NUM, b"\0")[:1]
    return Reply(
        int.from_bytes(number, "big"),
        socket.inet_ntop(family, ends[0]),
        socket.inet_ntop(family, ends[1]),
        int.from_bytes(ports[0], "big"),
        int.from_bytes(ports[1], "big"),
    )


def _wants(entries: Entries) -> list[_Want]:
    proto, family = entries.proto, entries.family
    number = _PROTOCOLS.get(proto) if isinstance(proto, str) else proto
    if number is None:
        raise InvalidInput("proto", proto, f"must be a number or one of {', '.join(_PROTOCOLS)}")
    if family not in _CTA_IP:
        raise InvalidInput("family", family, "must be AF_INET or AF_INET6")
    source, destination = _CTA_IP[family]
    wants = [
        *_address("orig_dst", _CTA_TUPLE_ORIG, destination, family, entries.orig_dst),
        *_address("reply_src", _CTA_TUPLE_REPLY, source, family, entries.reply_src),
        *_port("orig_dst_port", _CTA_TUPLE_ORIG, _CTA_PROTO_DST_PORT, entries.orig_dst_port),
        *_port("reply_src_port", _CTA_TUPLE_REPLY, _CTA_PROTO_SRC_PORT, entries.reply_src_port),
    ]
    if not wants:
        raise InvalidInput("purge", None, "needs at least one address or port")
    wants.append((_CTA_TUPLE_ORIG, _CTA_TUPLE_PROTO, attr_u8(_CTA_PROTO_NUM, number)))
    return wants


def _purge(sock: NetlinkSocket, family: int, matchers: list[Callable[[Message], bool]]) -> int:
    listed = sock.dump(Request(_CT_GET, 0, _NFGENMSG.pack(family, 0, 0), "conntrack --dump"))
    # A delete answers with an ack alone, so "gone already" has to be told apart one by one.
    return sum(
        _execute_delete(sock, _delete(message, family))
        for message in listed
        if any(matches(message) for matches in matchers)
    )


def _execute_delete(sock: NetlinkSocket, request: Request) -> bool:
    try:
        sock.execute([request])
    except RequestFailed as exc:
        if exc.errno == errno.ENOENT:
            return False
        raise
    return True


def _address(field: str, which: int, kind: int, family: int, address: str | None) -> list[_Want]:
    """Return what an entry's tuple must contain to have this address; nothing if it is None."""
    if address is None:
        return []
    try:
        return [(which, _CTA_TUPLE_IP, attr(kind, socket.inet_pton(family, address)))]
    except (OSError, ValueError) as exc:
        raise InvalidInput(field, address, "not an address of this family") from exc


def _port(field: str, which: int, kind: int, port: int | None) -> list[_Want]:
    """Return what an entry's tuple must contain to have this port; nothing if it is None."""
    if port is None:
        return []
    if not 0 <= port <= _PORT_MAX:
        raise InvalidInput(field, port, "not a port")
    return [(which, _CTA_TUPLE_PROTO, attr_be16(kind, port))]


def _matcher(wants: list[_Want]) -> Callable[[Message], bool]:
    """Build the test: a plain search for the bytes first, parsing only what passes it.

    A busy host has 100,000s of entries; nearly all fail the search, which costs well under 1 µs.
    """
    # Padding bytes are left out of the comparison: only the attribute itself counts.
    needles = [want[:-pad] if pad else want for _, _, want in wants for pad in (_padding(want),)]

    def matches(message: Message) -> bool:
        if not all(needle in message.body for needle in needles):
            return False
        attrs = parse_attrs(message.body, _NFGENMSG.size)
        for which, part, want in wants:
            inside = parse_attrs(parse_attrs(attrs.get(which, b"")).get(part, b""))
            if any(inside.get(kind) != value for kind, value in iter_attrs(want)):
                return False
        return True

    return matches


def _padding(packed: bytes) -> int:
    return len(packed) - int(struct.unpack_from("=H", packed)[0])


def _delete(message: Message, family: int) -> Request:
    """Make the request that deletes exactly this entry."""
    # Scary spot. A delete without a tuple empties the whole table (ctnetlink_del_conntrack ->
    # ctnetlink_flush_conntrack): every connection through NAT on the host, anybody's. The tuple
    # is there because the matcher saw it; a KeyError here is the better end if it ever is not.
    attrs = parse_attrs(message.body, _NFGENMSG.size)
    body = _NFGENMSG.pack(family, 0, 0) + attr_nested(_CTA_TUPLE_ORIG, attrs[_CTA_TUPLE_ORIG])
    body += attr(_CTA_ID, attrs[_CTA_ID])  # so that a successor with the same tuple is spared
    if _CTA_ZONE in attrs:
        body += attr(_CTA_ZONE, attrs[_CTA_ZONE])
    return Request(_CT_DELETE, 0, body, "conntrack --delete")
