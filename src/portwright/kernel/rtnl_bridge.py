"""Linux bridges: who is on one, with what settings, and which MACs it has learnt; only its ports are changed.

Layouts: include/uapi/linux/if_link.h (IFLA_BR_*, IFLA_BRPORT_*), neighbour.h.
"""

from __future__ import annotations

import errno
import socket
from typing import Final

import msgspec

from portwright.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    NetlinkSocket,
    Request,
)
from portwright.kernel.nlattr import attr, attr_nested, attr_str, attr_u8, attr_u32, get_u8, parse_attrs
from portwright.kernel.rtnl_inet import parse_ip, parse_mac
from portwright.kernel.rtnl_parse import (
    IFINFOMSG,
    IFLA_ADDRESS,
    IFLA_IFNAME,
    IFLA_INFO_DATA,
    IFLA_INFO_KIND,
    IFLA_LINKINFO,
    NDA_DST,
    NDA_LLADDR,
    NDMSG,
    RTM_GETNEIGH,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    link_get,
)

_INFO_SLAVE_KIND, _INFO_SLAVE_DATA = 4, 5
_BR_VLAN_FILTERING, _BR_MCAST_SNOOPING = 7, 23
_AF_BRIDGE = 7
_NDA_MASTER = 9
_NUD_PERMANENT = 0x80
_NTF_PROXY = 0x08
_RTM_DELNEIGH = 29
#: What a port of a bridge is set to, by the words of ``bridge link``; all of them bytes.
_SETTINGS: Final = {
    "hairpin": 4,
    "guard": 5,
    "root_block": 6,
    "fastleave": 7,
    "learning": 8,
    "flood": 9,
    "proxy_arp": 10,
    "proxy_arp_wifi": 12,
    "mcast_flood": 27,
    "mcast_to_unicast": 28,
    "bcast_flood": 30,
    "neigh_suppress": 32,
    "isolated": 33,
}


class FdbInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A MAC that a bridge has: ``index`` is the port's. ``local``: of the bridge's own ports."""

    index: int
    mac: str
    local: bool


def port_settings(sock: NetlinkSocket, index: int) -> dict[str, int]:
    """What a port of a bridge is set to; {} if the link is none, or gone."""
    info = _link_info(sock, index)
    if info.get(_INFO_SLAVE_KIND, b"").rstrip(b"\0") != b"bridge":
        return {}
    data = parse_attrs(info.get(_INFO_SLAVE_DATA, b""))
    return {word: data[kind][0] for word, kind in _SETTINGS.items() if data.get(kind)}


def filters_vlans(sock: NetlinkSocket, index: int) -> bool:
    """Whether a bridge keeps VLANs apart."""
    return bool(get_u8(parse_attrs(_link_info(sock, index).get(IFLA_INFO_DATA, b"")), _BR_VLAN_FILTERING))


def port_set(index: int, settings: dict[str, int]) -> Request:
    """Set a link that is on a bridge as ``port_settings`` read it; nothing if it is on none."""
    known = {word: value for word, value in settings.items() if word in _SETTINGS}
    data = attr_nested(_INFO_SLAVE_DATA, *(attr_u8(_SETTINGS[word], value) for word, value in known.items()))
    info = attr_nested(IFLA_LINKINFO, attr_str(_INFO_SLAVE_KIND, "bridge"), data)
    words = " ".join(f"{word} {value}" for word, value in known.items())
    body = IFINFOMSG.pack(0, 0, index, 0, 0) + info
    return Request(RTM_NEWLINK, 0, body, f"bridge link set dev if{index} {words}")


def bridge_create(name: str, mac: str) -> Request:
    """A bridge, down, that forwards at once and snoops on no multicast."""
    info = attr_nested(
        IFLA_LINKINFO,
        attr_str(IFLA_INFO_KIND, "bridge"),
        attr_nested(IFLA_INFO_DATA, attr_u8(_BR_MCAST_SNOOPING, 0)),
    )
    body = IFINFOMSG.pack(0, 0, 0, 0, 0) + attr_str(IFLA_IFNAME, name)
    body += attr(IFLA_ADDRESS, parse_mac(mac)) + info
    words = f"ip link add {name} address {mac} type bridge mcast_snooping 0"
    return Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, words)


def answer_add(index: int, address: str) -> Request:
    """Have the host answer for an address that is elsewhere to who asks on this link, by ARP or ND.

    ND needs the link's ``proxy_ndp`` besides. Gone with the link, and when it is set down.
    """
    return _answer(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, "add", index, address)


def answer_del(index: int, address: str) -> Request:
    """End that; ENOENT if the host does not answer for it there."""
    return _answer(_RTM_DELNEIGH, 0, "del", index, address)


def _answer(kind: int, flags: int, verb: str, index: int, address: str) -> Request:
    family, raw = parse_ip(address, "address")
    body = NDMSG.pack(family, index, _NUD_PERMANENT, _NTF_PROXY, 0) + attr(NDA_DST, raw)
    return Request(kind, flags, body, f"ip neigh {verb} proxy {address} dev if{index}")


def fdb(sock: NetlinkSocket, bridge: int) -> list[FdbInfo]:
    """What a bridge knows of who is where; [] if it is gone."""
    body = NDMSG.pack(_AF_BRIDGE, 0, 0, 0, 0) + attr_u32(_NDA_MASTER, bridge)
    request = Request(RTM_GETNEIGH, 0, body, f"bridge fdb show br if{bridge}", (errno.ENODEV,))
    return [entry for message in sock.dump(request) for entry in _entry(message, bridge)]


def _entry(message: Message, bridge: int) -> list[FdbInfo]:
    body = message.body
    if message.type != RTM_NEWNEIGH or len(body) < NDMSG.size:
        return []
    family, index, state, _, _ = NDMSG.unpack_from(body)
    attrs = parse_attrs(body, NDMSG.size)
    mac, master = attrs.get(NDA_LLADDR, b""), attrs.get(_NDA_MASTER, b"")
    if family != _AF_BRIDGE or len(mac) != 6 or (master and master != attr_u32(0, bridge)[4:]):
        return []
    return [FdbInfo(index=index, mac=mac.hex(":"), local=bool(state & _NUD_PERMANENT))]


def _link_info(sock: NetlinkSocket, index: int) -> dict[int, bytes]:
    (replies,) = sock.execute([link_get(index).tolerating(errno.ENODEV)])
    for message in replies:
        if message.type == RTM_NEWLINK and message.body[:1] == bytes([socket.AF_UNSPEC]):
            return parse_attrs(parse_attrs(message.body, IFINFOMSG.size).get(IFLA_LINKINFO, b""))
    return {}
