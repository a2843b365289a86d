"""What rtnetlink says, as values: links, addresses, routes and neighbours, and their readers.

Layouts: include/uapi/linux/if_link.h, if_addr.h, rtnetlink.h and neighbour.h. A field that
the kernel left out has its neutral value (0, '' or None); a message too short for its fixed
header is skipped.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Iterator

import msgspec

from portwright.kernel.netlink import Message, NetlinkSocket, Request, RequestFailed
from portwright.kernel.nlattr import attr_str, attr_u32, get_str, get_u8, get_u32, iter_attrs, parse_attrs

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_GETADDR = 20, 22
RTM_NEWROUTE, RTM_GETROUTE = 24, 26
RTM_NEWNEIGH, RTM_GETNEIGH = 28, 30

IFINFOMSG = struct.Struct("=BxHiII")  # family, type, index, flags, change
IFADDRMSG = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
NDMSG = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
_STATS64 = struct.Struct("=8Q")
_NEXTHOP = struct.Struct("=HBBi")  # struct rtnexthop: len, flags, hops, ifindex

(IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER, IFLA_TXQLEN) = (1, 3, 4, 5, 10, 13)
(IFLA_OPERSTATE, IFLA_LINKINFO, IFLA_IFALIAS, IFLA_STATS64, IFLA_AF_SPEC) = (16, 18, 20, 23, 26)
(IFLA_GROUP, IFLA_NET_NS_FD, IFLA_EXT_MASK, IFLA_CARRIER, IFLA_LINK_NETNSID) = (27, 28, 29, 33, 37)
(IFLA_GSO_MAX_SIZE, IFLA_NEW_NETNSID, IFLA_NEW_IFINDEX) = (41, 45, 49)
IFLA_PROP_LIST, IFLA_ALT_IFNAME = 52, 53
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
(IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS) = (1, 2, 8)
(RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC) = (1, 4, 5, 6, 7)
(RTA_METRICS, RTA_MULTIPATH, RTA_TABLE, RTA_VIA) = (8, 9, 15, 18)
RTAX_MTU, RTAX_ADVMSS = 2, 8
NDA_DST, NDA_LLADDR, NDA_IFINDEX = 1, 2, 8

IFF_UP = 0x1
# RTEXT_FILTER_SKIP_STATS leaves out the IPv6 SNMP counters, a quarter of each message, which we
# never read; the link's own counters always come.
_LEAN = attr_u32(IFLA_EXT_MASK, 1 << 3)
_AF_BRIDGE = 7
IFNAME_MAX = 15  # IFNAMSIZ less the NUL; longer names can only be altnames
RT_TABLE_MAIN = 254
ROUTE_TYPES = (
    *("unspec", "unicast", "local", "broadcast", "anycast", "multicast"),
    *("blackhole", "unreachable", "prohibit", "throw", "nat", "xresolve"),
)
_OPERSTATES = ("unknown", "notpresent", "down", "lowerlayerdown", "testing", "dormant", "up")
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_IPV4_LEN, _IPV6_LEN = 4, 16


class LinkStats(msgspec.Struct, frozen=True, kw_only=True):
    """A link's own counters, from the device's view (struct rtnl_link_stats64)."""

    rx_packets: int = 0
    tx_packets: int = 0
    rx_bytes: int = 0
    tx_bytes: int = 0
    rx_errors: int = 0
    tx_errors: int = 0
    rx_dropped: int = 0
    tx_dropped: int = 0


class LinkInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One network device.

    ``link_index`` is the peer's or the lower device's ifindex, in the namespace ``link_netnsid``
    (None: this one); ``kind`` is '' for hardware and loopback; ``mac`` is '' if it has none.
    In the news of a link that left for another namespace, ``new_netnsid`` and ``new_index`` say
    where it is now (None and 0 otherwise).
    """

    index: int
    name: str
    altnames: tuple[str, ...] = ()
    alias: str = ""
    mac: str = ""
    mtu: int = 0
    flags: int = 0
    up: bool = False
    carrier: bool = False
    operstate: str = "unknown"
    kind: str = ""
    link_index: int = 0
    link_netnsid: int | None = None
    master: int = 0
    txqlen: int = 0
    gso_max_size: int = 0
    new_netnsid: int | None = None
    new_index: int = 0
    stats64: LinkStats = LinkStats()


class AddrInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One address: ``address`` without its prefix length; ``flags`` are IFA_F_*."""

    index: int
    family: int
    address: str
    prefixlen: int
    scope: int
    flags: int = 0


class RouteInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One route: ``dst`` is canonical CIDR, ``0.0.0.0/0`` or ``::/0`` for the default.

    ``gw`` may be of the other family. Of a multipath route ``oif`` and ``gw`` are the first hop's.
    """

    family: int
    dst: str
    gw: str | None = None
    oif: int = 0
    table: int = RT_TABLE_MAIN
    priority: int = 0
    scope: int = 0
    mtu: int | None = None
    advmss: int | None = None
    type: str = "unicast"
    proto: int = 0
    src: str | None = None
    flags: int = 0


class NeighInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One neighbour entry: ``state`` is NUD_*, ``mac`` '' while unresolved."""

    index: int
    family: int
    address: str
    mac: str
    state: int
    flags: int


# --- readers ---------------------------------------------------------------------------------


def link_get(dev: int | str) -> Request:
    """Ask for one link by ifindex, name or altname; the reply is for parse_link()."""
    index, found_by, label = (dev, b"", f"if{dev}") if isinstance(dev, int) else (0, name_attr(dev), dev)
    body = IFINFOMSG.pack(0, 0, index, 0, 0) + found_by + _LEAN
    return Request(RTM_GETLINK, 0, body, f"ip link show dev {label}")


def name_attr(name: str) -> bytes:
    """Pack a name or altname as what finds a device."""
    return attr_str(IFLA_IFNAME if len(name.encode()) <= IFNAME_MAX else IFLA_ALT_IFNAME, name)


def links(sock: NetlinkSocket, *, stats: bool = True) -> list[LinkInfo]:
    """Return every link of the socket's namespace, about 40 µs each; counters zero without ``stats``."""
    request = Request(RTM_GETLINK, 0, IFINFOMSG.pack(0, 0, 0, 0, 0) + _LEAN, "ip link show")
    return list(_parsed_links(sock.dump(request), stats))


def link_by_name(sock: NetlinkSocket, name: str) -> LinkInfo | None:
    """Return the link with this name or altname, None if there is none."""
    return _one_link(sock, name)


def link_by_index(sock: NetlinkSocket, index: int) -> LinkInfo | None:
    """Return the link with this ifindex, None if there is none."""
    return _one_link(sock, index)


def addresses(sock: NetlinkSocket, index: int | None = None) -> list[AddrInfo]:
    """Return the addresses of the namespace, or of one link (none if the link is gone)."""
    body = IFADDRMSG.pack(0, 0, 0, 0, index or 0)
    request = Request(RTM_GETADDR, 0, body, "ip addr show", (errno.ENODEV,))
    found = (parse_address(message) for message in sock.dump(request))
    return [a for a in found if a is not None and index in (None, a.index)]


def routes(
    sock: NetlinkSocket, *, table: int | None = None, oif: int | None = None, family: int | None = None
) -> list[RouteInfo]:
    """Return the routes of all tables, or of one table, out of one link, or of one family.

    The kernel filters; ``oif`` finds a multipath route by any of its hops.
    """
    found = map(parse_route, route_messages(sock, table, oif, family))
    return [route for route in found if route is not None]


def neighbours(sock: NetlinkSocket, index: int | None = None) -> list[NeighInfo]:
    """Return the IPv4 and IPv6 neighbour entries, of one link if it is given."""
    body = NDMSG.pack(0, 0, 0, 0, 0) + (b"" if index is None else attr_u32(NDA_IFINDEX, index))
    request = Request(RTM_GETNEIGH, 0, body, "ip neigh show", (errno.ENODEV,))
    found = (parse_neighbour(message) for message in sock.dump(request))
    return [n for n in found if n is not None and index in (None, n.index)]


def _one_link(sock: NetlinkSocket, dev: int | str) -> LinkInfo | None:
    try:
        (replies,) = sock.execute([link_get(dev)])
    except RequestFailed as exc:
        if exc.errno == errno.ENODEV:
            return None
        raise
    return next(_parsed_links(replies), None)


def _parsed_links(messages: Iterable[Message], stats: bool = True) -> Iterator[LinkInfo]:
    parsed = (parse_link(message, stats=stats) for message in messages)
    return (link for link in parsed if link is not None)


def route_messages(
    sock: NetlinkSocket, table: int | None, oif: int | None, family: int | None
) -> Iterator[Message]:
    """Give the messages of a dump of routes, to be parsed or not; arguments as of routes()."""
    # RTA_TABLE makes the kernel filter; a table that does not exist yet is ENOENT, an empty one to us.
    attrs = (b"" if table is None else attr_u32(RTA_TABLE, table)) + (
        b"" if oif is None else attr_u32(RTA_OIF, oif)
    )
    for wanted in _FAMILIES if family is None else (family,):
        body = RTMSG.pack(wanted, 0, 0, 0, 0, 0, 0, 0, 0) + attrs
        name = f"ip {'-6 ' if wanted == socket.AF_INET6 else ''}route show"
        for message in sock.dump(Request(RTM_GETROUTE, 0, body, name, (errno.ENOENT, errno.ENODEV))):
            # Without IPv6 in the kernel, asking for it is answered with every family it has.
            if message.body[:1] == bytes([wanted]):
                yield message


# --- parsers ---------------------------------------------------------------------------------


def parse_link(message: Message, *, stats: bool = True) -> LinkInfo | None:
    """Read a RTM_NEWLINK or RTM_DELLINK, counters if ``stats``; None for any other message.

    A bridge speaks about its ports in the same types with family AF_BRIDGE, where "del" means
    that the port left the bridge: those are None too.
    """
    body = message.body
    if message.type not in (RTM_NEWLINK, RTM_DELLINK) or len(body) < IFINFOMSG.size or body[0] == _AF_BRIDGE:
        return None
    _, _, index, flags, _ = IFINFOMSG.unpack_from(body)
    attrs = parse_attrs(body, IFINFOMSG.size)
    operstate = get_u8(attrs, IFLA_OPERSTATE)
    info = attrs.get(IFLA_LINKINFO)
    props = attrs.get(IFLA_PROP_LIST)
    return LinkInfo(
        index=index,
        name=get_str(attrs, IFLA_IFNAME),
        altnames=()
        if props is None
        else tuple(get_str({kind: raw}, kind) for kind, raw in iter_attrs(props) if kind == IFLA_ALT_IFNAME),
        alias=get_str(attrs, IFLA_IFALIAS),
        mac=_mac(attrs.get(IFLA_ADDRESS, b"")),
        mtu=get_u32(attrs, IFLA_MTU),
        flags=flags,
        up=bool(flags & IFF_UP),
        carrier=bool(get_u8(attrs, IFLA_CARRIER)),
        operstate=_OPERSTATES[operstate] if operstate < len(_OPERSTATES) else str(operstate),
        kind="" if info is None else get_str(parse_attrs(info), IFLA_INFO_KIND),
        link_index=get_u32(attrs, IFLA_LINK),
        link_netnsid=get_u32(attrs, IFLA_LINK_NETNSID) if IFLA_LINK_NETNSID in attrs else None,
        master=get_u32(attrs, IFLA_MASTER),
        txqlen=get_u32(attrs, IFLA_TXQLEN),
        gso_max_size=get_u32(attrs, IFLA_GSO_MAX_SIZE),
        new_netnsid=get_u32(attrs, IFLA_NEW_NETNSID) if IFLA_NEW_NETNSID in attrs else None,
        new_index=get_u32(attrs, IFLA_NEW_IFINDEX),
        stats64=_stats(attrs.get(IFLA_STATS64, b"") if stats else b""),
    )


def parse_address(message: Message) -> AddrInfo | None:
    """Read a RTM_NEWADDR; None for any other message or family."""
    body = message.body
    if message.type != RTM_NEWADDR or len(body) < IFADDRMSG.size:
        return None
    family, prefixlen, flags, scope, index = IFADDRMSG.unpack_from(body)
    attrs = parse_attrs(body, IFADDRMSG.size)
    # On a point-to-point address IFA_ADDRESS is the other end; IFA_LOCAL is always ours.
    address = ip_text(family, attrs.get(IFA_LOCAL) or attrs.get(IFA_ADDRESS))
    if address is None:
        return None
    return AddrInfo(
        index=index,
        family=family,
        address=address,
        prefixlen=prefixlen,
        scope=scope,
        flags=get_u32(attrs, IFA_FLAGS, flags),
    )


def parse_route(message: Message) -> RouteInfo | None:
    """Read a RTM_NEWROUTE; None for any other message or family."""
    body = message.body
    if message.type != RTM_NEWROUTE or len(body) < RTMSG.size:
        return None
    family, dst_len, _, _, table, proto, scope, kind, flags = RTMSG.unpack_from(body)
    if family not in _FAMILIES:
        return None
    attrs = parse_attrs(body, RTMSG.size)
    anywhere = "0.0.0.0" if family == socket.AF_INET else "::"  # noqa: S104 - a route, not a bind
    metrics = parse_attrs(attrs.get(RTA_METRICS, b""))
    oif = get_u32(attrs, RTA_OIF)
    hops = attrs.get(RTA_MULTIPATH, b"")
    if len(hops) >= _NEXTHOP.size:
        length, _, _, oif = _NEXTHOP.unpack_from(hops)
        attrs = parse_attrs(hops[:length], _NEXTHOP.size) | attrs
    return RouteInfo(
        family=family,
        dst=f"{ip_text(family, attrs.get(RTA_DST)) or anywhere}/{dst_len}",
        gw=gateway(family, attrs),
        oif=oif,
        table=get_u32(attrs, RTA_TABLE, table),
        priority=get_u32(attrs, RTA_PRIORITY),
        scope=scope,
        mtu=get_u32(metrics, RTAX_MTU) or None,
        advmss=get_u32(metrics, RTAX_ADVMSS) or None,
        type=ROUTE_TYPES[kind] if kind < len(ROUTE_TYPES) else str(kind),
        proto=proto,
        src=ip_text(family, attrs.get(RTA_PREFSRC)),
        flags=flags,
    )


def parse_neighbour(message: Message) -> NeighInfo | None:
    """Read a RTM_NEWNEIGH; None for any other message or family (bridge entries)."""
    body = message.body
    if message.type != RTM_NEWNEIGH or len(body) < NDMSG.size:
        return None
    family, index, state, flags, _ = NDMSG.unpack_from(body)
    attrs = parse_attrs(body, NDMSG.size)
    address = ip_text(family, attrs.get(NDA_DST))
    if address is None:
        return None
    mac = _mac(attrs.get(NDA_LLADDR, b""))
    return NeighInfo(index=index, family=family, address=address, mac=mac, state=state, flags=flags)


def _stats(raw: bytes) -> LinkStats:
    if len(raw) < _STATS64.size:
        return LinkStats()
    names = LinkStats.__struct_fields__
    return LinkStats(**dict(zip(names, _STATS64.unpack_from(raw), strict=True)))


def _mac(raw: bytes) -> str:
    return raw.hex(":") if raw else ""


def ip_text(family: int, raw: bytes | None) -> str | None:
    """Render an address; None if there is none or its length does not fit its family."""
    if raw is None or (family, len(raw)) not in ((socket.AF_INET, _IPV4_LEN), (socket.AF_INET6, _IPV6_LEN)):
        return None
    return socket.inet_ntop(family, raw)


def gateway(family: int, attrs: dict[int, bytes]) -> str | None:
    """The gateway among a route's or a next hop's attributes, of either family; None without one."""
    via = attrs.get(RTA_VIA)
    if via is not None and len(via) > 2:  # struct rtvia: u16 family, address
        return ip_text(struct.unpack_from("=H", via)[0], via[2:])
    return ip_text(family, attrs.get(RTA_GATEWAY))
