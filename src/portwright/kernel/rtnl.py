"""rtnetlink requests: what ``ip link|addr|route|neigh`` would send, one Request each.

Every builder is pure and cheap (struct packing), names its request as the command a person
would have typed (``if7`` is iproute2's own word for ifindex 7), and raises InvalidInput for
what cannot be packed. The kernel decides about everything else: NetlinkFailed on execution.
The readers of rtnl_parse are offered here too: ``rtnl.links(sock)``.

A link is meant by ifindex (int), or by name or altname (str). In a batch a name lets later
requests mean a link that an earlier one creates.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from typing import Literal

from portwright.kernel.netlink import NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, Request
from portwright.kernel.nlattr import attr, attr_nested, attr_str, attr_u8, attr_u32
from portwright.kernel.rtnl_inet import (
    RTPROT_STATIC,
    RouteFields,
    addr_add,
    addr_del,
    neigh_del,
    neigh_replace,
    parse_mac,
    route_add,
    route_del,
    route_replace,
)
from portwright.kernel.rtnl_parse import (
    IFF_UP,
    IFINFOMSG,
    IFLA_ADDRESS,
    IFLA_AF_SPEC,
    IFLA_ALT_IFNAME,
    IFLA_GROUP,
    IFLA_IFALIAS,
    IFLA_IFNAME,
    IFLA_INFO_DATA,
    IFLA_INFO_KIND,
    IFLA_LINKINFO,
    IFLA_MASTER,
    IFLA_MTU,
    IFLA_NET_NS_FD,
    IFLA_PROP_LIST,
    IFLA_TXQLEN,
    RT_TABLE_MAIN,
    RTM_DELLINK,
    RTM_NEWLINK,
    AddrInfo,
    LinkInfo,
    LinkStats,
    NeighInfo,
    RouteInfo,
    addresses,
    link_by_index,
    link_by_name,
    link_get,
    links,
    name_attr,
    neighbours,
    parse_link,
    routes,
)
from portwright.kernel.rtnl_uplink import default_oif, default_uplink, device_to
from portwright.model.errors import InvalidInput

__all__ = [
    "RTPROT_STATIC",
    "RT_TABLE_MAIN",
    "AddrInfo",
    "LinkInfo",
    "LinkStats",
    "NeighInfo",
    "RouteFields",
    "RouteInfo",
    "addr_add",
    "addr_del",
    "addresses",
    "altname_add",
    "altname_del",
    "default_oif",
    "default_uplink",
    "device_to",
    "link_by_index",
    "link_by_name",
    "link_del",
    "link_del_group",
    "link_get",
    "link_set",
    "links",
    "neigh_del",
    "neigh_replace",
    "neighbours",
    "parse_link",
    "route_add",
    "route_del",
    "route_replace",
    "routes",
    "veth_create",
]

_RTM_SETLINK = 19
_RTM_NEWLINKPROP, _RTM_DELLINKPROP = 108, 109
_VETH_INFO_PEER = 1  # include/uapi/linux/veth.h
_IFLA_INET6_ADDR_GEN_MODE = 8
_ADDR_GEN_MODES = {"eui64": 0, "none": 1, "stable_secret": 2, "random": 3}

Dev = int | str
AddrGenMode = Literal["eui64", "none", "stable_secret", "random"]


# --- links -----------------------------------------------------------------------------------


def veth_create(
    name: str,
    *,
    mac: str,
    mtu: int,
    peer_name: str,
    peer_mac: str,
    peer_mtu: int,
    peer_netns_fd: int | None = None,
    index: int = 0,
    peer_index: int = 0,
) -> Request:
    """Create a veth pair, both ends down, the peer born in its own namespace.

    The peer never exists on our side, so no one sees it move and nothing waits for an RCU
    grace period. An index of 0 lets the kernel pick; EEXIST if a name or index is taken. The
    kernel sets neither alias nor addrgenmode while it creates a link: follow with link_set().
    """
    peer = IFINFOMSG.pack(0, 0, peer_index, 0, 0) + _ends(peer_name, peer_mac, peer_mtu)
    words = f"ip link add {name} address {mac} mtu {mtu}"
    words += f"{f' index {index}' if index else ''} type veth peer name {peer_name} address {peer_mac}"
    words += f" mtu {peer_mtu}{f' index {peer_index}' if peer_index else ''}"
    if peer_netns_fd is not None:
        peer += attr_u32(IFLA_NET_NS_FD, peer_netns_fd)
        words += f" netns {_fd_path(peer_netns_fd)}"
    info = attr_nested(
        IFLA_LINKINFO,
        attr_str(IFLA_INFO_KIND, "veth"),
        attr_nested(IFLA_INFO_DATA, attr_nested(_VETH_INFO_PEER, peer)),
    )
    body = IFINFOMSG.pack(0, 0, index, 0, 0) + _ends(name, mac, mtu) + info
    return Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, words)


def link_set(
    dev: Dev,
    *,
    up: bool | None = None,
    mtu: int | None = None,
    mac: str | None = None,
    alias: str | None = None,
    name: str | None = None,
    txqlen: int | None = None,
    master: int | None = None,
    group: int | None = None,
    addrgenmode: AddrGenMode | None = None,
    netns_fd: int | None = None,
) -> Request:
    """Change what is given of one link, None leaves it.

    The kernel applies a request's parts one by one: what it did before a refusal stays. With
    ``netns_fd`` it moves first, then gets ``name`` and the rest there. A new ``name`` needs
    ``dev`` as ifindex, as the name in a request would be what finds the link. ``alias`` ''
    takes it away; ``master`` 0 releases from a bridge; addrgenmode only acts on the next up.
    """
    index, found_by, label = _target(dev)
    words, attrs = [f"ip link set dev {label}"], [found_by]
    if netns_fd is not None:
        attrs.append(attr_u32(IFLA_NET_NS_FD, netns_fd))
        words.append(f"netns {_fd_path(netns_fd)}")
    if name is not None:
        if not index:
            raise InvalidInput("name", name, "renaming needs the link's ifindex")
        attrs.append(attr_str(IFLA_IFNAME, name))
        words.append(f"name {name}")
    if alias is not None:
        # No NUL: an alias is bytes to the kernel, and the empty attribute clears it.
        attrs.append(attr(IFLA_IFALIAS, alias.encode()) if alias else attr(IFLA_IFALIAS, b""))
        words.append(f"alias '{alias}'")
    if mac is not None:
        attrs.append(attr(IFLA_ADDRESS, parse_mac(mac)))
        words.append(f"address {mac}")
    for kind, word, number in (
        (IFLA_MTU, "mtu", mtu),
        (IFLA_TXQLEN, "txqueuelen", txqlen),
        (IFLA_GROUP, "group", group),
        (IFLA_MASTER, "master", master),
    ):
        if number is not None:
            attrs.append(attr_u32(kind, number))
            words.append("nomaster" if kind == IFLA_MASTER and not number else f"{word} {_if(word, number)}")
    if addrgenmode is not None:
        mode = attr_u8(_IFLA_INET6_ADDR_GEN_MODE, _ADDR_GEN_MODES[addrgenmode])
        attrs.append(attr_nested(IFLA_AF_SPEC, attr_nested(socket.AF_INET6, mode)))
        words.append(f"addrgenmode {addrgenmode}")
    if up is not None:
        words.append("up" if up else "down")
    flags = (0, 0) if up is None else (IFF_UP if up else 0, IFF_UP)
    return Request(_RTM_SETLINK, 0, IFINFOMSG.pack(0, 0, index, *flags) + b"".join(attrs), " ".join(words))


def link_del(dev: Dev) -> Request:
    """Delete a link; its peer goes with it. ENODEV if there is none."""
    index, found_by, label = _target(dev)
    return Request(RTM_DELLINK, 0, IFINFOMSG.pack(0, 0, index, 0, 0) + found_by, f"ip link del dev {label}")


def link_del_group(group: int) -> Request:
    """Delete every link of a group in one go, *whoever's it is*; ENODEV if there is none.

    Each delete waits for RCU, about 20 ms with RTNL held, however many links it is for: 8 links
    took 196 ms one by one and 24 ms as a group. So tearing many down is: link_set(group=) with
    a number of our own, then this. Group 0 holds every link that was never put into one:
    InvalidInput.
    """
    if not group:
        raise InvalidInput("group", group, "is where every link is by default")
    body = IFINFOMSG.pack(0, 0, 0, 0, 0) + attr_u32(IFLA_GROUP, group)
    return Request(RTM_DELLINK, 0, body, f"ip link del group {group}")


def altname_add(dev: Dev, names: Iterable[str]) -> Request:
    """Give a link further names, up to 127 bytes each; EEXIST if one is taken here (earlier ones stay)."""
    return _altnames(_RTM_NEWLINKPROP, NLM_F_CREATE | NLM_F_EXCL | NLM_F_APPEND, "add", dev, names)


def altname_del(dev: Dev, names: Iterable[str]) -> Request:
    """Take altnames away; ENOENT or EINVAL if one is not this link's (earlier ones are gone)."""
    return _altnames(_RTM_DELLINKPROP, 0, "del", dev, names)


def _altnames(kind: int, flags: int, verb: str, dev: Dev, names: Iterable[str]) -> Request:
    names = tuple(names)
    index, found_by, label = _target(dev)
    props = attr_nested(IFLA_PROP_LIST, *(attr_str(IFLA_ALT_IFNAME, name) for name in names))
    words = f"ip link property {verb} dev {label} " + " ".join(f"altname {name}" for name in names)
    return Request(kind, flags, IFINFOMSG.pack(0, 0, index, 0, 0) + found_by + props, words)


# --- small things ----------------------------------------------------------------------------


def _target(dev: Dev) -> tuple[int, bytes, str]:
    """Return (ifindex or 0, the attribute that finds it by name, how ip would call it)."""
    return (dev, b"", f"if{dev}") if isinstance(dev, int) else (0, name_attr(dev), dev)


def _ends(name: str, mac: str, mtu: int) -> bytes:
    return attr_str(IFLA_IFNAME, name) + attr(IFLA_ADDRESS, parse_mac(mac)) + attr_u32(IFLA_MTU, mtu)


def _if(word: str, number: int) -> str:
    return f"if{number}" if word in ("dev", "master") else str(number)


def _fd_path(fd: int) -> str:
    return f"/proc/{os.getpid()}/fd/{fd}"
