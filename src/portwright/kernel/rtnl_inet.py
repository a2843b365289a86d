"""rtnetlink requests of layer 3: addresses, routes and neighbours, both families alike.

See rtnl.py, which offers them, for what all builders share.
"""

from __future__ import annotations

import socket
import struct
from typing import TypedDict, Unpack

from portwright.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Request
from portwright.kernel.nlattr import attr, attr_nested, attr_u32
from portwright.kernel.rtnl_parse import (
    IFA_ADDRESS,
    IFA_FLAGS,
    IFA_LOCAL,
    IFADDRMSG,
    NDA_DST,
    NDA_LLADDR,
    NDMSG,
    ROUTE_TYPES,
    RT_TABLE_MAIN,
    RTA_DST,
    RTA_GATEWAY,
    RTA_METRICS,
    RTA_OIF,
    RTA_PREFSRC,
    RTA_PRIORITY,
    RTA_TABLE,
    RTA_VIA,
    RTAX_ADVMSS,
    RTAX_MTU,
    RTM_NEWADDR,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
    RTMSG,
)
from portwright.model.errors import InvalidInput

RTPROT_STATIC = 4
_RTM_DELADDR, _RTM_DELROUTE, _RTM_DELNEIGH = 21, 25, 29
_IFA_F_NODAD, _IFA_F_NOPREFIXROUTE = 0x02, 0x200
_RTNH_F_ONLINK = 4
_RT_SCOPE_UNIVERSE, _RT_SCOPE_LINK, _RT_SCOPE_HOST, _RT_SCOPE_NOWHERE = 0, 253, 254, 255
_RT_TABLE_COMPAT = 252  # in the header's byte when the number only fits into RTA_TABLE
_NUD_REACHABLE, _NUD_PERMANENT = 0x02, 0x80
_MAC_LEN = 6
_BYTE_MAX = 255
_U16 = struct.Struct("=H")
_FAMILY_WORDS = {int(socket.AF_INET): "inet", int(socket.AF_INET6): "inet6"}


# --- addresses -------------------------------------------------------------------------------


def addr_add(
    index: int, cidr: str, *, nodad: bool = True, noprefixroute: bool = False, scope: int = _RT_SCOPE_UNIVERSE
) -> Request:
    """Add an address (``10.0.0.2/32``); EEXIST if the link has it already.

    ``nodad`` (IPv6 only) makes it usable at once: without it, it is tentative for a second.
    ``noprefixroute`` leaves out the route to its prefix.
    """
    family, address, length = parse_cidr(cidr)
    flags = (_IFA_F_NODAD if nodad and family == socket.AF_INET6 else 0) | (
        _IFA_F_NOPREFIXROUTE if noprefixroute else 0
    )
    body = IFADDRMSG.pack(family, length, 0, scope, index) + attr(IFA_LOCAL, address)
    body += attr(IFA_ADDRESS, address) + (attr_u32(IFA_FLAGS, flags) if flags else b"")
    words = f"ip addr add {cidr} dev if{index}{f' scope {scope}' if scope else ''}"
    words += f"{' nodad' if flags & _IFA_F_NODAD else ''}{' noprefixroute' if noprefixroute else ''}"
    return Request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, body, words)


def addr_del(index: int, cidr: str) -> Request:
    """Remove an address; EADDRNOTAVAIL if the link does not have it."""
    family, address, length = parse_cidr(cidr)
    body = IFADDRMSG.pack(family, length, 0, 0, index) + attr(IFA_LOCAL, address) + attr(IFA_ADDRESS, address)
    return Request(_RTM_DELADDR, 0, body, f"ip addr del {cidr} dev if{index}")


# --- routes ----------------------------------------------------------------------------------


class RouteFields(TypedDict, total=False):
    """What a route may have besides its destination; what is absent is left to the kernel.

    ``oif``: ifindex. ``gw``: may be of the other family (IPv4 via fe80::1). ``scope``: by
    default what ip would choose, link for a route without a gateway, else global. ``table``: main
    by default. ``type``: one of ROUTE_TYPES, unicast by default. ``proto``: RTPROT_STATIC by default.
    """

    oif: int | None
    gw: str | None
    onlink: bool
    scope: int | None
    table: int | None
    priority: int | None
    mtu: int | None
    advmss: int | None
    src: str | None
    proto: int
    type: str


def route_add(dst: str, **fields: Unpack[RouteFields]) -> Request:
    """Add a route to canonical CIDR ``dst`` (``0.0.0.0/0``); EEXIST if it is there."""
    return _route("add", RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, dst, fields)


def route_replace(dst: str, **fields: Unpack[RouteFields]) -> Request:
    """Add a route or replace the one with the same dst, table and priority, *whoever's it is*."""
    return _route("replace", RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, dst, fields)


def route_del(dst: str, **fields: Unpack[RouteFields]) -> Request:
    """Delete the first route that matches all that is given; ESRCH if none does."""
    wildcards: RouteFields = {"type": "unspec", "proto": 0, "scope": _RT_SCOPE_NOWHERE}
    return _route("del", _RTM_DELROUTE, 0, dst, {**wildcards, **fields})


def _route(verb: str, kind: int, flags: int, dst: str, fields: RouteFields) -> Request:
    family, address, length = parse_cidr(dst)
    type_, gw, scope = fields.get("type", "unicast"), fields.get("gw"), fields.get("scope")
    onlink, table, src = fields.get("onlink", False), fields.get("table"), fields.get("src")
    mtu, advmss = fields.get("mtu"), fields.get("advmss")
    if type_ not in ROUTE_TYPES:
        raise InvalidInput("type", type_, f"no such route type; one of {', '.join(ROUTE_TYPES)}")
    shown = "" if type_ in ("unicast", "unspec") else f"{type_} "
    words = [f"ip {'-6 ' if family == socket.AF_INET6 else ''}route {verb} {shown}{dst}"]
    attrs = [attr(RTA_DST, address)] if length else []
    if gw is not None:
        gw_family, raw = parse_ip(gw, "gw")
        same = gw_family == family
        attrs.append(attr(RTA_GATEWAY, raw) if same else attr(RTA_VIA, _U16.pack(gw_family) + raw))
        words.append(f"via {gw}" if same else f"via {_FAMILY_WORDS[gw_family]} {gw}")
    for attribute, word, number in (
        (RTA_OIF, "dev if", fields.get("oif")),
        (RTA_TABLE, "table ", table),
        (RTA_PRIORITY, "metric ", fields.get("priority")),
    ):
        if number is not None:
            attrs.append(attr_u32(attribute, number))
            words.append(f"{word}{number}")
    if src is not None:
        attrs.append(attr(RTA_PREFSRC, parse_ip(src, "src")[1]))
        words.append(f"src {src}")
    metrics = [attr_u32(k, v) for k, v in ((RTAX_MTU, mtu), (RTAX_ADVMSS, advmss)) if v is not None]
    if metrics:
        attrs.append(attr_nested(RTA_METRICS, *metrics))
        words += [f"{word} {v}" for word, v in (("mtu", mtu), ("advmss", advmss)) if v is not None]
    if scope is None:
        scope = _default_scope(type_, gw)
    elif scope != _RT_SCOPE_NOWHERE:
        words.append(f"scope {scope}")
    if onlink:
        words.append("onlink")
    short = RT_TABLE_MAIN if table is None else table if table <= _BYTE_MAX else _RT_TABLE_COMPAT
    proto, route_flags = fields.get("proto", RTPROT_STATIC), _RTNH_F_ONLINK if onlink else 0
    head = RTMSG.pack(family, length, 0, 0, short, proto, scope, ROUTE_TYPES.index(type_), route_flags)
    return Request(kind, flags, head + b"".join(attrs), " ".join(words))


def _default_scope(kind: str, gw: str | None) -> int:
    """Choose the scope as iproute2 does (iproute.c); IPv6 ignores it."""
    if kind in ("local", "nat"):
        return _RT_SCOPE_HOST
    if kind in ("broadcast", "multicast", "anycast") or (kind == "unicast" and gw is None):
        return _RT_SCOPE_LINK
    return _RT_SCOPE_UNIVERSE


# --- neighbours ------------------------------------------------------------------------------


def neigh_replace(index: int, ip: str, mac: str, *, permanent: bool = True) -> Request:
    """Set a neighbour's MAC, for good or until the kernel finds it stale."""
    family, address = parse_ip(ip, "ip")
    state = _NUD_PERMANENT if permanent else _NUD_REACHABLE
    body = NDMSG.pack(family, index, state, 0, 0) + attr(NDA_DST, address) + attr(NDA_LLADDR, parse_mac(mac))
    words = (
        f"ip neigh replace {ip} lladdr {mac} dev if{index} nud {'permanent' if permanent else 'reachable'}"
    )
    return Request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body, words)


def neigh_del(index: int, ip: str) -> Request:
    """Delete a neighbour entry; ENOENT if there is none."""
    family, address = parse_ip(ip, "ip")
    body = NDMSG.pack(family, index, 0, 0, 0) + attr(NDA_DST, address)
    return Request(_RTM_DELNEIGH, 0, body, f"ip neigh del {ip} dev if{index}")


# --- text to bytes ----------------------------------------------------------------------------


def parse_mac(text: str) -> bytes:
    """Return the six bytes of ``ee:ee:ee:ee:ee:ee``."""
    try:
        raw = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        raw = b""
    if len(raw) != _MAC_LEN:
        raise InvalidInput("mac", text, "not a MAC address")
    return raw


def parse_ip(text: str, field: str) -> tuple[int, bytes]:
    """Return (family, packed address); ``field`` is what an InvalidInput names."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        return family, socket.inet_pton(family, text)
    except (OSError, ValueError) as exc:
        raise InvalidInput(field, text, "not an IP address") from exc


def parse_cidr(text: str) -> tuple[int, bytes, int]:
    """Return (family, packed address, prefix length)."""
    address, _, length = text.partition("/")
    family, raw = parse_ip(address, "prefix")
    bits = int(length) if length.isdecimal() else -1
    if not 0 <= bits <= len(raw) * 8:
        raise InvalidInput("prefix", text, "needs a prefix length that fits its family")
    return family, raw, bits
