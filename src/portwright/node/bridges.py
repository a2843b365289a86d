"""Who depends on a bridge of the host: its ports, and what of them is a sandbox that can be moved.

A container is a veth whose peer is in another namespace, whoever put it on the bridge (Docker, the bridge
plugin, podman); a guest is a tap that a hypervisor holds. What they have is read, nothing is asked of them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import msgspec

from portwright.kernel import clsact, netns, nsid, rtnl, rtnl_bridge
from portwright.kernel.netlink import NetlinkSocket
from portwright.model.errors import InvalidInput, NotFound, PortwrightError
from portwright.model.port import InnerBridge, NetnsRef
from portwright.node.switch import Switch

Kind = Literal["container", "guest", "other"]

#: Neighbour states in which the MAC was heard (NUD_REACHABLE, STALE, DELAY, PROBE, PERMANENT).
_HEARD = 0x02 | 0x04 | 0x08 | 0x10 | 0x80
_SCOPE_UNIVERSE = 0
_TC_H_CLSACT = 0xFFFFFFF1


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """A port of a bridge. ``trouble`` says why its sandbox can't be moved, '' if it can."""

    link: rtnl.LinkInfo
    kind: Kind
    trouble: str = ""
    sandbox: NetnsRef | None = None  # of a container
    ifname: str = ""
    mac: str = ""
    mtu: int = 0
    addresses: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()  # the subnets that it is in, as far as it says
    gateways: tuple[str, ...] = ()  # of a container's default routes, link-local ones left out
    clsact: bool = False
    settings: dict[str, int] = {}
    inner: InnerBridge | None = None  # behind which the sandbox is a guest


class Bridge(msgspec.Struct, frozen=True, kw_only=True):
    """A bridge with its ports. ``addresses``: its own, with prefix length, link-local ones left out."""

    link: rtnl.LinkInfo
    addresses: tuple[str, ...]
    filters_vlans: bool
    seats: tuple[Seat, ...]


def kind_of(link: rtnl.LinkInfo) -> Kind:
    """What a port of a bridge is, as far as the link itself says."""
    if link.kind == "veth" and link.link_netnsid is not None:
        return "container"
    if link.kind == "tun" and link.carrier:
        return "guest"
    return "other"


def dependants(switch: Switch) -> dict[str, dict[Kind, int]]:
    """How many of each kind are on each bridge that has a container or a guest."""
    links = rtnl.links(switch.rtnl, stats=False)
    names = {link.index: link.name for link in links if link.kind == "bridge"}
    found: dict[str, dict[Kind, int]] = {}
    for link in links:
        if link.master in names and kind_of(link) != "other":
            counts = found.setdefault(names[link.master], {})
            counts[kind_of(link)] = counts.get(kind_of(link), 0) + 1
    return found


def look(switch: Switch, name: str, named: dict[str, tuple[str, ...]]) -> list[Bridge]:
    """The bridge of that name, or with '' all that a sandbox depends on.

    ``named``: addresses by MAC, besides what is found. Raises NotFound, InvalidInput for a device of another
    kind.
    """
    links = rtnl.links(switch.rtnl, stats=False)
    chosen = [link for link in links if link.kind == "bridge" and name in ("", link.name)]
    if name and not chosen:
        if any(link.name == name for link in links):
            raise InvalidInput("bridge", name, "is a device of another kind")
        raise NotFound("bridge", name)
    if not name:
        used = {link.master for link in links if kind_of(link) != "other"}
        chosen = [link for link in chosen if link.index in used]
    ports = {one.index: [link for link in links if link.master == one.index] for one in chosen}
    return [_bridge(switch, one, ports[one.index], named) for one in chosen]


def _bridge(
    switch: Switch, link: rtnl.LinkInfo, ports: Sequence[rtnl.LinkInfo], named: dict[str, tuple[str, ...]]
) -> Bridge:
    ids = {port.link_netnsid for port in ports if kind_of(port) == "container"}
    with _namespaces(switch.rtnl, {number for number in ids if number is not None}) as spaces:
        segment = _Segment(switch.rtnl, link, named)
        seats = tuple(_seat(segment, port, spaces) for port in ports)
    addresses = tuple(
        f"{a.address}/{a.prefixlen}"
        for a in rtnl.addresses(switch.rtnl, link.index)
        if a.scope == _SCOPE_UNIVERSE
    )
    return Bridge(
        link=link,
        addresses=addresses,
        filters_vlans=rtnl_bridge.filters_vlans(switch.rtnl, link.index),
        seats=seats,
    )


@contextlib.contextmanager
def _namespaces(sock: NetlinkSocket, wanted: set[int]) -> Iterator[dict[int, tuple[str, int]]]:
    """Path and descriptor of each namespace with such an id in the socket's; of those that can be found."""
    found: dict[int, tuple[str, int]] = {}
    try:
        for path, fd in netns.named():
            number = None
            with contextlib.suppress(PortwrightError):  # ended meanwhile
                number = nsid.id_of(sock, fd)
            if number is not None and number in wanted and number not in found:
                found[number] = (path, os.dup(fd))
            if wanted <= found.keys():
                break
        yield found
    finally:
        for _, fd in found.values():
            os.close(fd)


class _Segment(NamedTuple):
    """What a seat is read in: a socket of the host's namespace, the bridge, addresses named by MAC."""

    sock: NetlinkSocket
    bridge: rtnl.LinkInfo
    named: dict[str, tuple[str, ...]]


def _seat(segment: _Segment, link: rtnl.LinkInfo, spaces: dict[int, tuple[str, int]]) -> Seat:
    kind = kind_of(link)
    if kind == "other":
        return Seat(link=link, kind=kind, trouble=_what(link))
    seat = Seat(
        link=link,
        kind=kind,
        mtu=link.mtu,
        clsact=_has_clsact(segment.sock, link.index),
        settings=rtnl_bridge.port_settings(segment.sock, link.index),
    )
    if kind == "guest":
        return _guest(segment, seat)
    space = spaces.get(link.link_netnsid if link.link_netnsid is not None else -1)
    if space is None:
        return _stuck(seat, "its sandbox's namespace can't be found: no process and no mount has it")
    path, fd = space
    with NetlinkSocket(netns_fd=fd) as sock:
        return _container(seat, path, sock, segment)


def _container(seat: Seat, path: str, sock: NetlinkSocket, segment: _Segment) -> Seat:
    device = rtnl.link_by_index(sock, seat.link.link_index)
    if device is None:
        return _stuck(seat, "its other end is gone")
    held = [a for a in rtnl.addresses(sock, device.index) if a.scope == _SCOPE_UNIVERSE]
    routes = rtnl.routes(sock, oif=device.index, table=rtnl.RT_TABLE_MAIN)
    defaults = [r.gw for r in routes if r.gw and r.dst in {"0.0.0.0/0", "::/0"}]
    seat = msgspec.structs.replace(
        seat,
        sandbox=NetnsRef(path=path, cookie=sock.netns_cookie(), boot_id=netns.boot_id()),
        ifname=device.name,
        mac=device.mac,
        addresses=_with([a.address for a in held], segment.named.get(device.mac, ())),
        prefixes=tuple(dict.fromkeys(_subnet(f"{a.address}/{a.prefixlen}") for a in held)),
        gateways=tuple(dict.fromkeys(gw for gw in defaults if not gw.startswith("fe80:"))),
    )
    if device.master:
        return _behind(seat, device, sock, segment)
    if not seat.addresses:
        way_out = f"its end {device.name} has no address: name it by --address {device.mac}=ADDRESS"
        return _stuck(seat, way_out)
    return seat


def _behind(seat: Seat, device: rtnl.LinkInfo, sock: NetlinkSocket, segment: _Segment) -> Seat:
    """Its device is on a bridge of its own namespace: a guest of Kata 1.x, if beside it is a tap alone."""
    links = rtnl.links(sock, stats=False)
    inner = next((link for link in links if link.index == device.master and link.kind == "bridge"), None)
    others = [link for link in links if link.master == device.master and link.index != device.index]
    if inner is None or len(others) != 1 or others[0].kind != "tun":
        return _stuck(seat, f"its end {device.name} is on a device of its own namespace that is no Kata's")
    tap = others[0]
    found = InnerBridge(
        bridge=inner.name,
        bridge_mac=inner.mac,
        device=device.name,
        device_index=device.index,
        tap=tap.name,
        tap_index=tap.index,
        device_clsact=_has_clsact(sock, device.index),
        tap_clsact=_has_clsact(sock, tap.index),
    )
    seat = msgspec.structs.replace(seat, inner=found)
    return _known(segment, seat, _learnt(sock, inner.index, tap.index))


def _guest(segment: _Segment, seat: Seat) -> Seat:
    seat = msgspec.structs.replace(seat, ifname=seat.link.name)
    return _known(segment, seat, _learnt(segment.sock, segment.bridge.index, seat.link.index))


def _learnt(sock: NetlinkSocket, bridge: int, port: int) -> list[str]:
    found = {e.mac for e in rtnl_bridge.fdb(sock, bridge) if e.index == port and not e.local}
    return sorted(mac for mac in found if _unicast(mac))


def _known(segment: _Segment, seat: Seat, macs: Sequence[str]) -> Seat:
    """The seat of a guest with these MACs, and the addresses that the host has heard or that were named."""
    if not macs:
        return _stuck(seat, "the bridge has learnt no MAC of its guest, which has to send something first")
    if len(macs) > 1:
        return _stuck(seat, f"several MACs are behind it ({', '.join(macs[:4])}): a port has one")
    heard = [
        n.address
        for n in rtnl.neighbours(segment.sock, segment.bridge.index)
        if n.mac == macs[0] and n.state & _HEARD and not n.address.startswith("fe80:")
    ]
    addresses = _with((*seat.addresses, *heard), segment.named.get(macs[0], ()))
    seat = msgspec.structs.replace(seat, mac=macs[0], addresses=addresses)
    if not seat.addresses:
        way_out = f"no address of its guest {macs[0]} is known: name each by --address {macs[0]}=ADDRESS"
        return _stuck(seat, way_out)
    return seat


def _has_clsact(sock: NetlinkSocket, index: int) -> bool:
    return any(q.parent == _TC_H_CLSACT for q in clsact.qdiscs(sock, index))


def _stuck(seat: Seat, trouble: str) -> Seat:
    return msgspec.structs.replace(seat, trouble=trouble)


def _what(link: rtnl.LinkInfo) -> str:
    if link.kind == "tun":
        return "no hypervisor holds this tap: start its guest, or take it off the bridge"
    kind = link.kind or "physical"
    return f"it is a {kind} device and no sandbox's: what is behind it would lose the segment"


def _with(found: Iterable[str], named: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*found, *named)))


def _subnet(prefix: str) -> str:
    return str(ipaddress.ip_network(prefix, strict=False))


def _unicast(mac: str) -> bool:
    return not int(mac[:2], 16) & 1
