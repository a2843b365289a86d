"""Which device leads to the world: the default route's.

Every new port asks, for the MTU. On a host with a thousand ports or a full BGP table, listing the table would
cost more than the rest of the port.
"""

from __future__ import annotations

import socket

from portwright.kernel.netlink import NetlinkSocket, Request, RequestFailed
from portwright.kernel.nlattr import attr, parse_attrs
from portwright.kernel.rtnl_parse import (
    RT_TABLE_MAIN,
    RTA_DST,
    RTA_MULTIPATH,
    RTM_GETROUTE,
    RTMSG,
    LinkInfo,
    RouteInfo,
    link_by_index,
    parse_route,
    route_messages,
)

#: rtnetlink.h: answer with the route that matched, as it stands in its table, and with that table.
_RTM_F_LOOKUP_TABLE, _RTM_F_FIB_MATCH = 0x1000, 0x2000
#: Documentation addresses (RFC 5737, RFC 3849), that no route but the default one should lead to.
_NOWHERE = {
    int(socket.AF_INET): socket.inet_pton(socket.AF_INET, "198.51.100.1"),
    int(socket.AF_INET6): socket.inet_pton(socket.AF_INET6, "2001:db8:ffff:ffff::1"),
}


def default_uplink(sock: NetlinkSocket, family: int) -> LinkInfo | None:
    """Return the device of :func:`default_oif`, if there is one."""
    oif = default_oif(sock, family)
    return link_by_index(sock, oif) if oif else None


def device_to(sock: NetlinkSocket, address: str) -> LinkInfo | None:
    """Return the device by which a packet to ``address`` would leave; None for none, or if it is ours."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    packed = socket.inet_pton(family, address)
    body = RTMSG.pack(family, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0) + attr(RTA_DST, packed)
    try:
        (replies,) = sock.execute([Request(RTM_GETROUTE, 0, body, f"ip route get {address}")])
    except RequestFailed:  # unreachable
        return None
    for message in replies:
        route = parse_route(message)
        if route is not None and route.type == "unicast" and route.oif:
            return link_by_index(sock, route.oif)
    return None


def default_oif(sock: NetlinkSocket, family: int) -> int:
    """Return the ifindex of the main table's default route with the lowest metric; 0 without one.

    Asks for the route to one address that nobody owns, whatever else the table holds; only where that is
    not answered by a plain default route of the main table (policy rules, several hops, a
    route to just that address, no default route) is the whole table listed.
    """
    return _default_by_lookup(sock, family) or _default_by_dump(sock, family)


def _default_by_lookup(sock: NetlinkSocket, family: int) -> int:
    """The ifindex of the default route, as a lookup finds it; 0 if that says nothing certain."""
    address, length = _NOWHERE[family], 32 if family == socket.AF_INET else 128
    body = RTMSG.pack(family, length, 0, 0, 0, 0, 0, 0, _RTM_F_LOOKUP_TABLE | _RTM_F_FIB_MATCH)
    body += attr(RTA_DST, address)
    try:
        (replies,) = sock.execute([Request(RTM_GETROUTE, 0, body, "ip route get fibmatch")])
    except RequestFailed:
        return 0
    for message in replies:
        route = parse_route(message)
        plain = route is not None and (route.type, route.table) == ("unicast", RT_TABLE_MAIN)
        if route is not None and plain and route.family == family and not message.body[1]:
            return 0 if RTA_MULTIPATH in parse_attrs(message.body, RTMSG.size) else route.oif
    return 0


def _default_by_dump(sock: NetlinkSocket, family: int) -> int:
    best: RouteInfo | None = None
    for message in route_messages(sock, RT_TABLE_MAIN, None, family):
        if len(message.body) > 1 and message.body[1]:
            continue  # not a default route: a full BGP table passes here without being parsed
        route = parse_route(message)
        if route is None or route.family != family or route.type != "unicast" or not route.oif:
            continue
        if best is None or route.priority < best.priority:
            best = route
    return 0 if best is None else best.oif
