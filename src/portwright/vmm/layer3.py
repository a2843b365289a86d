"""What a namespace's devices have at layer 3, as a guest is told it: values, and their words. Pure.

The words are those of docs/vm.md; ``init.sh`` gives them to the guest's kernel. What they leave out is the
same on both sides: what a kernel makes of an address by itself, and defaults of the field.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from portwright.model.errors import NotSupported

GLOBAL, HOST, LINK = 0, 254, 253  # scopes of rtnetlink.h
MAIN = 254
STATIC: Final = 4  # RTPROT_STATIC
#: The kernel's own for an IPv6 route without one (include/net/ip6_route.h, IP6_RT_PRIO_USER).
METRIC6: Final = 1024
#: What a shell, a comma and the kernel's command line leave alone.
_PLAIN = re.compile(r"[A-Za-z0-9._:@+-]+")


@dataclass(frozen=True, kw_only=True)
class Address:
    """``text`` with the prefix length; ``peer`` and ``broadcast`` without, '' for none."""

    device: str
    text: str
    peer: str = ""
    broadcast: str = ""
    scope: int = GLOBAL
    label: str = ""
    noprefixroute: bool = False


@dataclass(frozen=True, kw_only=True)
class Hop:
    """One of several next hops. ``flags``: RTNH_F_*."""

    device: str
    via: str = ""
    weight: int = 1
    flags: int = 0


@dataclass(frozen=True, kw_only=True)
class Route:
    """``device`` '' for one that leads nowhere, or by ``hops``; ``metrics`` are RTAX_*, by name."""

    device: str
    dst: str
    via: str = ""
    hops: tuple[Hop, ...] = ()
    src: str = ""
    kind: str = "unicast"
    metrics: tuple[tuple[str, int], ...] = ()
    metric: int = 0
    table: int = MAIN
    scope: int = GLOBAL
    proto: int = STATIC
    onlink: bool = False
    tos: int = 0
    realm: int = 0
    pref: int = 0


@dataclass(frozen=True, kw_only=True)
class Rule:
    """``source`` and ``to`` are CIDR, '' for all; ``suppress`` a prefix length or None; mark 0 is none."""

    family: int  # 4 or 6
    priority: int
    table: int
    source: str = ""
    to: str = ""
    iif: str = ""
    mark: int = 0
    mask: int = 0xFFFFFFFF
    suppress: int | None = None


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A permanent one."""

    device: str
    address: str
    mac: str


@dataclass(frozen=True, kw_only=True)
class Layer3:
    """Of one namespace, for some of its devices; each in the order in which it has to be made again."""

    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    rules: tuple[Rule, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()

    def words(self) -> list[str]:
        """Words of the kernel's command line. Raises NotSupported for a name that can't be one."""
        return [
            *(f"portwright.addr={_address(one)}" for one in self.addresses),
            *(f"portwright.neigh={_name(n.device)},{n.address},{n.mac}" for n in self.neighbours),
            *(f"portwright.route={_route(one)}" for one in self.routes),
            *(f"portwright.rule={_rule(one)}" for one in self.rules),
        ]


def default_scope(route: Route) -> int:
    """What ``ip`` gives an IPv4 route that says none (iproute2, ip/iproute.c); IPv6 has none."""
    if ":" in route.dst:
        return GLOBAL
    if route.kind == "local":
        return HOST
    gateway = route.via or any(hop.via for hop in route.hops)
    kinds = {"unicast", "broadcast", "anycast", "multicast"}
    return LINK if route.kind in kinds and not gateway else GLOBAL


def _address(one: Address) -> str:
    return _joined(
        _name(one.device),
        one.text,
        peer=one.peer,
        brd=one.broadcast,
        scope=one.scope or "",
        label="" if one.label in ("", one.device) else _name(one.label),
        noprefixroute="1" if one.noprefixroute else "",
    )


def _route(one: Route) -> str:
    six = ":" in one.dst
    said = "" if one.onlink == (bool(one.via) and ":" not in one.via) else str(int(one.onlink))
    words = _joined(
        _name(one.device) if one.device else "-",
        one.dst,
        type="" if one.kind == "unicast" else one.kind,
        via=one.via,
        **dict(one.metrics),
        metric="" if one.metric == (METRIC6 if six else 0) else one.metric,
        table="" if one.table == MAIN else one.table,
        scope="" if one.scope == default_scope(one) else one.scope,
        src=one.src,
        proto="" if one.proto == STATIC else one.proto,
        onlink=said,
        tos=one.tos or "",
        realm=one.realm or "",
        pref=one.pref or "",
    )
    return ",".join([words, *map(_hop, one.hops)])


def _hop(one: Hop) -> str:
    if "+" in one.device:
        raise NotSupported(
            "a guest", f"a device called {one.device!r} as one of several next hops", "rename it"
        )
    return f"hop={one.via}@{_name(one.device)}+{one.weight}+{one.flags}"


def _rule(one: Rule) -> str:
    mask = "" if one.mask == 0xFFFFFFFF else f"/{one.mask:#x}"
    return _joined(
        str(one.family),
        str(one.priority),
        str(one.table),
        **{"from": one.source},
        to=one.to,
        iif=_name(one.iif) if one.iif else "",
        fwmark=f"{one.mark:#x}{mask}" if one.mark or mask else "",
        suppress_prefixlength="" if one.suppress is None else one.suppress,
    )


def _joined(*first: str, **more: object) -> str:
    return ",".join([*first, *(f"{key}={value}" for key, value in more.items() if value != "")])


def _name(text: str) -> str:
    if not _PLAIN.fullmatch(text):
        raise NotSupported(
            "a guest", f"a device called {text!r}", "rename it: letters, digits and ._:@+- only"
        )
    return text
