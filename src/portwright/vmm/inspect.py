"""Reads what a namespace's devices have at layer 3, from the kernel, for a guest that takes their place.

What a guest can't be told is refused by name, and not left out. What the kernel keeps by itself is left out:
its ``local`` table, link-local addresses made of the MAC, and the routes to an address's own prefix.
Layouts: include/uapi/linux/if_addr.h, rtnetlink.h, fib_rules.h.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final, TypeAlias

from portwright.kernel import rtnl, rtnl_parse
from portwright.kernel.netlink import NetlinkSocket, Request
from portwright.kernel.nlattr import get_str, get_u32, parse_attrs
from portwright.model.errors import NotFound, NotSupported
from portwright.vmm.layer3 import LINK, MAIN, Address, Hop, Layer3, Neighbour, Route, Rule

Attrs: TypeAlias = dict[int, bytes]

_RTM_GETRULE = 34
_RULE = struct.Struct("=8BI")  # family, dst_len, src_len, tos, table, res1, res2, action, flags
_IFA_LABEL, _IFA_BROADCAST, _IFA_ANYCAST, _IFA_CACHEINFO, _IFA_RT_PRIORITY = 3, 4, 5, 6, 9
_F_SECONDARY, _F_NOPREFIXROUTE, _F_TENTATIVE, _F_NODAD, _F_PERMANENT = 0x01, 0x200, 0x40, 0x02, 0x80
_FOREVER = 0xFFFFFFFF
#: What an address may carry without losing anything on the way to a guest, which checks for no duplicates.
_PLAIN_FLAGS = _F_SECONDARY | _F_NOPREFIXROUTE | _F_TENTATIVE | _F_NODAD | _F_PERMANENT
_LOCAL_TABLE, _KERNEL, _RA = 255, 2, 9
_METRIC6_KERNEL = 256  # IP6_RT_PRIO_ADDRCONF
_ONLINK, _CLONED = 0x4, 0x200  # RTNH_F_ONLINK, RTM_F_CLONED
#: RTAX_* by number; the one that is a text, congctl, has no word.
_METRICS = {1: "lock", 2: "mtu", 3: "window", 4: "rtt", 5: "rttvar", 6: "ssthresh", 7: "cwnd", 8: "advmss"}
_METRICS |= {9: "reordering", 10: "hoplimit", 11: "initcwnd", 12: "features", 13: "rto_min", 14: "initrwnd"}
_METRICS |= {15: "quickack", 17: "fastopen"}
_RTA_SRC, _RTA_FLOW, _RTA_CACHEINFO, _RTA_PREF, _RTA_ENCAP, _RTA_NH_ID = 2, 11, 12, 20, 22, 30
_NEXTHOP = struct.Struct("=HBBi")  # struct rtnexthop: len, flags, hops, ifindex
_TOS = 3  # where it stands in struct rtmsg
_NOWHERE = frozenset({"blackhole", "unreachable", "prohibit", "throw"})
_FRA_DST, _FRA_SRC, _FRA_IIF, _FRA_PRIORITY, _FRA_MARK = 1, 2, 3, 6, 10
_FRA_SUPPRESS_GROUP, _FRA_SUPPRESS, _FRA_TABLE, _FRA_MASK, _FRA_PAD, _FRA_PROTOCOL = 13, 14, 15, 16, 18, 21
_KNOWN_FRA = {_FRA_DST, _FRA_SRC, _FRA_IIF, _FRA_PRIORITY, _FRA_MARK, _FRA_SUPPRESS_GROUP, _FRA_SUPPRESS}
_KNOWN_FRA |= {_FRA_TABLE, _FRA_MASK, _FRA_PAD, _FRA_PROTOCOL}
_INVERT, _TO_TABLE, _UNSET = 0x2, 1, 0xFFFFFFFF
#: The rules that every namespace begins with: (priority, table).
_STANDARD = {4: ((0, 255), (32766, 254), (32767, 253)), 6: ((0, 255), (32766, 254))}
_NUD_PERMANENT = 0x80
_WAY_OUT: Final = "take it away, or give the guest an initramfs of yours that sets it up"


def read(netns_fd: int, devices: Iterable[str]) -> Layer3:
    """What these devices of a namespace have. Raises NotFound, and NotSupported naming what has no words."""
    with NetlinkSocket(netns_fd=netns_fd) as sock:
        known: dict[int, rtnl.LinkInfo] = {}
        for name in devices:
            link = rtnl.link_by_name(sock, name)
            if link is None:
                raise NotFound("device", name)
            known[link.index] = link
        names = {index: link.name for index, link in known.items()}
        kept = list(_routes(sock, names))
        made = {(r.device, r.dst): r for r in kept if r.proto == _KERNEL and r.table == MAIN}
        addresses = [a for index in known for a in _addresses(sock, known[index], made)]
        by_kernel = {(a.device, _prefix_of(a)) for a in addresses if not a.noprefixroute}
        return Layer3(
            addresses=tuple(addresses),
            routes=tuple(
                r
                for r in _ordered(kept)
                if made.get((r.device, r.dst)) is not r or (r.device, r.dst) not in by_kernel
            ),
            rules=tuple(_rules(sock)),
            neighbours=tuple(n for index in known for n in _neighbours(sock, known[index])),
        )


# --- addresses -------------------------------------------------------------------------------


def _addresses(
    sock: NetlinkSocket, link: rtnl.LinkInfo, made: Mapping[tuple[str, str], Route]
) -> list[Address]:
    body = rtnl_parse.IFADDRMSG.pack(0, 0, 0, 0, link.index)
    found: list[Address] = []
    for message in sock.dump(Request(rtnl_parse.RTM_GETADDR, 0, body, f"ip addr show dev {link.name}")):
        info = rtnl_parse.parse_address(message)
        if info is None or info.index != link.index or info.address == _eui64(link.mac):
            continue
        attrs = parse_attrs(message.body, rtnl_parse.IFADDRMSG.size)
        found.append(_address(link, info, attrs, made))
    # The kernel puts an IPv6 address before those that it has (net/ipv6/addrconf.c, ipv6_link_dev_addr).
    six = [a for a in found if ":" in a.text]
    return [a for a in found if ":" not in a.text] + six[::-1]


def _address(
    link: rtnl.LinkInfo, info: rtnl.AddrInfo, attrs: Attrs, made: Mapping[tuple[str, str], Route]
) -> Address:
    text = f"{info.address}/{info.prefixlen}"
    what = f"the address {text} of {link.name}"
    if info.flags & ~_PLAIN_FLAGS:
        raise NotSupported("a guest", f"{what} with the flags {info.flags & ~_PLAIN_FLAGS:#x}", _WAY_OUT)
    lifetimes = struct.unpack_from("=II", attrs.get(_IFA_CACHEINFO, b"\xff" * 8))
    if lifetimes != (_FOREVER, _FOREVER):
        raise NotSupported("a guest", f"{what}, which ends", f"have no router believed there; {_WAY_OUT}")
    if _IFA_ANYCAST in attrs:
        raise NotSupported("a guest", f"{what}: anycast", _WAY_OUT)
    six = info.family == socket.AF_INET6
    peer = rtnl_parse.ip_text(info.family, attrs.get(rtnl_parse.IFA_ADDRESS)) or info.address
    if six and peer != info.address:
        raise NotSupported("a guest", f"{what} with a peer", _WAY_OUT)
    one = Address(
        device=link.name,
        text=text,
        peer="" if peer == info.address else peer,
        broadcast=rtnl_parse.ip_text(info.family, attrs.get(_IFA_BROADCAST)) or "",
        scope=0 if six else info.scope,  # of IPv6 the kernel knows it by the address
        label=get_str(attrs, _IFA_LABEL),
        noprefixroute=bool(info.flags & _F_NOPREFIXROUTE),
    )
    # Whatever the flag says: the guest has a route to the prefix exactly if the namespace has the usual one.
    route = made.get((link.name, _prefix_of(one)))
    usual = route is not None and (
        route.metric == _METRIC6_KERNEL if six else (route.metric, route.scope) == (0, LINK)
    )
    needs = _prefix_of(one) != ""
    secondary = bool(info.flags & _F_SECONDARY)
    return one if not needs or usual or secondary else replace(one, noprefixroute=True)


def _prefix_of(one: Address) -> str:
    """Where the kernel makes a route to of that address, '' for none (fib_frontend.c, fib_add_ifaddr)."""
    length = one.text.partition("/")[2]
    network = ipaddress.ip_network(f"{one.peer or one.text.partition('/')[0]}/{length}", strict=False)
    alone = network.version == 4 and network.prefixlen == network.max_prefixlen and not one.peer
    return "" if alone or (network.version == 6 and network.is_link_local) else str(network)


def _eui64(mac: str) -> str:
    """The link-local address that the kernel makes of a MAC (RFC 4291, appendix A)."""
    raw = bytes.fromhex(mac.replace(":", ""))
    if len(raw) != 6:
        return ""
    return str(
        ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:])
    )


# --- routes ----------------------------------------------------------------------------------


def _routes(sock: NetlinkSocket, names: Mapping[int, str]) -> Iterator[Route]:
    for message in rtnl_parse.route_messages(sock, None, None, None):
        info = rtnl_parse.parse_route(message)
        if info is None or info.flags & _CLONED:
            continue
        attrs = parse_attrs(message.body, rtnl_parse.RTMSG.size)
        nowhere = info.type in _NOWHERE
        mine = _leads_by(attrs, info) & names.keys()
        if not (nowhere or mine) or (info.table == _LOCAL_TABLE and info.proto == _KERNEL):
            continue
        six = info.family == socket.AF_INET6
        if six and info.proto == _KERNEL and ipaddress.ip_network(info.dst).is_link_local:
            continue
        _refuse(attrs, info)
        hops = tuple(_hops(attrs, info.family, names))
        if any(not hop.device for hop in hops):
            raise NotSupported(
                "a guest", f"the route to {info.dst}, by a device that has no tap too", _WAY_OUT
            )
        metrics = parse_attrs(attrs.get(rtnl_parse.RTA_METRICS, b""))
        yield Route(
            device="" if nowhere or hops else names[info.oif],
            dst=info.dst,
            via="" if hops else info.gw or "",
            hops=hops,
            src=info.src or "",
            kind=info.type,
            metrics=tuple((_METRICS[n], get_u32(metrics, n)) for n in sorted(metrics) if n in _METRICS),
            metric=info.priority,
            table=info.table,
            scope=0 if six else info.scope,
            proto=info.proto,
            onlink=bool(info.flags & _ONLINK) and not hops,
            tos=message.body[_TOS],
            realm=get_u32(attrs, _RTA_FLOW),
            pref=attrs.get(_RTA_PREF, b"\0")[0],
        )


def _hops(attrs: Attrs, family: int, names: Mapping[int, str]) -> Iterator[Hop]:
    """A route's next hops, where it has several; with no device where that is none of the guest's."""
    raw = attrs.get(rtnl_parse.RTA_MULTIPATH, b"")
    while len(raw) >= _NEXTHOP.size:
        length, flags, weight, oif = _NEXTHOP.unpack_from(raw)
        yield Hop(
            device=names.get(oif, ""),
            via=rtnl_parse.gateway(family, parse_attrs(raw[:length], _NEXTHOP.size)) or "",
            weight=weight + 1,
            flags=flags & _ONLINK,
        )
        raw = raw[max(_NEXTHOP.size, (length + 3) & ~3) :]


def _leads_by(attrs: Attrs, info: rtnl.RouteInfo) -> set[int]:
    """The devices that a route leads by."""
    raw, found = attrs.get(rtnl_parse.RTA_MULTIPATH, b""), {info.oif}
    while len(raw) >= _NEXTHOP.size:
        length, _, _, oif = _NEXTHOP.unpack_from(raw)
        found.add(oif)
        raw = raw[max(_NEXTHOP.size, (length + 3) & ~3) :]
    return found


def _refuse(attrs: Attrs, info: rtnl.RouteInfo) -> None:
    """Raises NotSupported for what a route may have and a guest can't be told."""
    metrics = parse_attrs(attrs.get(rtnl_parse.RTA_METRICS, b""))
    expires = attrs.get(_RTA_CACHEINFO, bytes(12))
    lacks = [
        *(["a source prefix"] if _RTA_SRC in attrs else []),
        *(["an encapsulation"] if _RTA_ENCAP in attrs else []),
        *(["a next hop object"] if _RTA_NH_ID in attrs else []),
        *(["an end"] if len(expires) >= 12 and struct.unpack_from("=i", expires, 8)[0] else []),
        *(["been learned from a router"] if info.proto == _RA else []),
        *(["a congestion control of its own"] if metrics.keys() - _METRICS.keys() else []),
    ]
    if lacks:
        raise NotSupported("a guest", f"the route to {info.dst}, which has {lacks[0]}", _WAY_OUT)


def _ordered(routes: Iterable[Route]) -> list[Route]:
    """Those without a gateway first: a gateway has to be reachable by them."""
    return sorted(routes, key=lambda route: bool(route.via or route.hops))


# --- rules and neighbours --------------------------------------------------------------------


def _rules(sock: NetlinkSocket) -> Iterator[Rule]:
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        request = Request(_RTM_GETRULE, 0, _RULE.pack(family, *[0] * 8), "ip rule show")
        standard = list(_STANDARD[version])
        for message in sock.dump(request):
            if len(message.body) < _RULE.size or message.body[0] != family:
                continue
            rule = _rule(version, message.body)
            plain = Rule(family=version, priority=rule.priority, table=rule.table)
            if rule == plain and (rule.priority, rule.table) in standard:
                standard.remove((rule.priority, rule.table))
                continue
            yield rule
        if standard:
            why = f"an IPv{version} without the rule {standard[0][0]} (table {standard[0][1]})"
            raise NotSupported("a guest", why, "add it again")


def _rule(version: int, body: bytes) -> Rule:
    family, dst_len, src_len, tos, table, _, _, action, flags = _RULE.unpack_from(body)
    attrs = parse_attrs(body, _RULE.size)
    priority = get_u32(attrs, _FRA_PRIORITY)
    more = sorted(attrs.keys() - _KNOWN_FRA)
    if get_u32(attrs, _FRA_SUPPRESS_GROUP, _UNSET) != _UNSET:
        more.append(_FRA_SUPPRESS_GROUP)
    if more or tos or flags & _INVERT or action != _TO_TABLE:
        what = (
            f"attribute {more[0]}" if more else "tos" if tos else "not" if flags & _INVERT else "its action"
        )
        raise NotSupported("a guest", f"the rule {priority} (IPv{version}) with {what}", _WAY_OUT)
    suppress = get_u32(attrs, _FRA_SUPPRESS, _UNSET)

    def prefix(kind: int, length: int) -> str:
        text = rtnl_parse.ip_text(family, attrs.get(kind))
        return f"{text}/{length}" if text is not None else ""

    mark = get_u32(attrs, _FRA_MARK)
    return Rule(
        family=version,
        priority=priority,
        table=get_u32(attrs, _FRA_TABLE, table),
        source=prefix(_FRA_SRC, src_len),
        to=prefix(_FRA_DST, dst_len),
        iif=get_str(attrs, _FRA_IIF),
        mark=mark,
        mask=get_u32(attrs, _FRA_MASK, 0xFFFFFFFF),
        suppress=None if suppress == _UNSET else suppress,
    )


def _neighbours(sock: NetlinkSocket, link: rtnl.LinkInfo) -> Iterator[Neighbour]:
    for one in rtnl.neighbours(sock, link.index):
        if one.state != _NUD_PERMANENT or not one.mac:
            continue
        yield Neighbour(device=link.name, address=one.address, mac=one.mac)
