"""Port mappings as values: which host ports a port claims, and what they need in the kernel.

A mapping becomes *elements* of the maps that ``plan/nat.py`` creates, one element for each
address family, whatever the number of mappings on the host. This module says which elements
those are, who holds a host port, which conntrack entries must go with a change, and what the
host's devices need so that a mapping also works from the host's own loopback.

Pure: values in, values out. Sections 1.6 and 8 (#18 to #20) of the CNI notes are the source
of what users miss elsewhere.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from portwright.model.errors import Conflict, InvalidInput
from portwright.model.port import PortAddress, PortMapping

Family = Literal[4, 6]
PROTOCOLS = ("tcp", "udp", "sctp")
_PORT_MAX = 65535
_AF: dict[Family, int] = {4: 2, 6: 10}  # AF_INET, AF_INET6; include/linux/socket.h
_ANY: dict[Family, str] = {4: "0.0.0.0", 6: "::"}  # noqa: S104 - names "every address", binds nothing


class Element(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One element of a set or map: ``key`` and (for a map) ``data``, each a concatenation.

    Compared by value, addresses and numbers in canonical text. ``comment`` names the holder
    for a person who lists the table; it is no part of :meth:`identity`.
    """

    set_name: str
    key: tuple[str, ...]
    data: tuple[str, ...] = ()
    comment: str = ""

    def identity(self) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """What the kernel's element must match to be this one."""
        return (self.set_name, self.key, self.data)

    def text(self, *, comment: bool = False) -> str:
        """The element in nft's grammar, without braces: ``tcp . 8080 : 10.0.0.2 . 80``."""
        note = f' comment "{self.comment}"' if comment and self.comment else ""
        data = f" : {' . '.join(self.data)}" if self.data else ""
        return f"{' . '.join(self.key)}{note}{data}"


class Publication(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All mappings of one port. ``holder`` is its port_id or another unique name."""

    holder: str
    mappings: tuple[PortMapping, ...]
    addresses: tuple[PortAddress | str, ...]


class Purge(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The arguments of one ``kernel.conntrack.purge`` call, by name; None = any.

    ``family`` is AF_INET or AF_INET6.
    """

    proto: str
    family: int
    orig_dst_port: int
    orig_dst: str | None = None
    reply_src: str | None = None
    reply_src_port: int | None = None


class LoopbackAccess(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the representor needs so that the host reaches a mapping by 127.0.0.1 and [::1].

    ``sysctls`` are (path under /proc/sys, value); ``local_routes`` are (destination, table,
    metric) of routes of type *local* on the representor. Both vanish with the device.
    """

    sysctls: tuple[tuple[str, str], ...] = ()
    local_routes: tuple[tuple[str, str, int], ...] = ()


class _Target(msgspec.Struct, frozen=True):
    """One mapping in one family: ``host`` is an address or '' for every one."""

    family: Family
    proto: str
    host: str
    host_port: int
    address: str
    port: int


def elements(
    mappings: Iterable[PortMapping], addresses: Iterable[PortAddress | str], *, holder: str = ""
) -> tuple[Element, ...]:
    """The elements that these mappings to these addresses need, in the mappings' order.

    The first address of each family is the target, as with the reference ``portmap``. A
    ``host_ip`` of '' publishes in every family that the port has; ``0.0.0.0`` and ``::`` in
    theirs only; another address binds to it.

    Raises InvalidInput for a port outside 1..65535, a protocol other than tcp, udp or sctp,
    a ``host_ip`` that is no address, a mapping that no address of the port can serve, and two
    mappings of the same host port.
    """
    note = _comment(holder)
    found: dict[tuple[str, tuple[str, ...]], Element] = {}
    hairpins: dict[str, Element] = {}
    for target in _targets(mappings, addresses):
        key: tuple[str, ...] = (target.proto, str(target.host_port))
        name = f"any{target.family}"
        if target.host:
            name, key = f"bound{target.family}", (target.host, *key)
        if (name, key) in found:
            spot = f"{target.host or '*'}:{target.host_port}/{target.proto}"
            raise InvalidInput("portMappings", spot, "this host port is mapped twice")
        found[name, key] = Element(
            set_name=name, key=key, data=(target.address, str(target.port)), comment=note
        )
        hairpins[target.address] = Element(
            set_name=f"hairpin{target.family}", key=(target.address, target.address)
        )
    return (*found.values(), *hairpins.values())


def purges(
    mappings: Iterable[PortMapping], addresses: Iterable[PortAddress | str], *, added: bool
) -> list[Purge]:
    """The conntrack entries that must go after mappings were added (or removed).

    Issue them *after* the elements have changed: before, the client's next packet would make
    the stale entry again.

    Added: UDP entries to the host port, wherever they lead. A client that keeps its source
    port keeps its entry alive, and the entry keeps its old target or none at all (plugins#123,
    kubernetes#58336). TCP and SCTP start anew with a new connection, and a purge could take
    the NAT from a live connection to the same port number elsewhere.

    Removed: entries of every protocol that lead through the mapping to this very target. The
    peer of a live TCP connection then gets a reset instead of silence.
    """
    found: dict[Purge, None] = {}
    for target in _targets(mappings, addresses):
        bound = target.host or None
        if not added:
            purge = Purge(
                proto=target.proto, family=_AF[target.family], orig_dst_port=target.host_port, orig_dst=bound,
                reply_src=target.address, reply_src_port=target.port,
            )  # fmt: skip
        elif target.proto == "udp":
            purge = Purge(
                proto="udp", family=_AF[target.family], orig_dst_port=target.host_port, orig_dst=bound
            )
        else:
            continue
        found[purge] = None
    return list(found)


def loopback_access(
    rep_name: str, mappings: Iterable[PortMapping], addresses: Iterable[PortAddress | str]
) -> LoopbackAccess:
    """What the representor needs for the host's own loopback; empty where no mapping asks for it.

    IPv4: ``route_localnet``, or the kernel takes 127.0.0.0/8 on a device other than ``lo`` for
    a martian (net/ipv4/route.c, both __mkroute_output and ip_route_input_slow). It would also
    let a sandbox send *to* 127.0.0.1 (CVE-2020-8558); the chain ``guard`` of ``nat.py`` drops
    that, so the sysctl may be set only after the table is there.

    IPv6 has no such sysctl. Packets with ::1 are refused on the wire before any hook
    (ip6_rcv_core), so all that a reply lacks, once its address is translated back, is a route:
    a lookup for ::1 is strict about the device (rt6_need_strict), hence a local route for it on
    the representor. ``lo``'s own has metric 0 and goes on serving everything else. Each route has a
    metric of its own, for two of the same metric would be one route to the kernel (EEXIST).

    Raises InvalidInput as :func:`elements`, and for a ``rep_name`` that is not ``pw`` and 8 hex digits.
    """
    sysctls: dict[tuple[str, str], None] = {}
    routes: dict[tuple[str, str, int], None] = {}
    for target in _targets(mappings, addresses):
        if target.host and not ipaddress.ip_address(target.host).is_loopback:
            continue
        if target.family == 4:
            sysctls[f"net/ipv4/conf/{rep_name}/route_localnet", "1"] = None
        else:
            if not re.fullmatch(r"pw[0-9a-f]{8}", rep_name):
                raise InvalidInput("rep_name", rep_name, "not a representor's name: pw and 8 hex digits")
            routes["::1/128", "local", int(rep_name[2:], 16) or 1] = None
    return LoopbackAccess(sysctls=tuple(sysctls), local_routes=tuple(routes))


class HostPorts:
    """Who holds which host port: an index over the publications of one host namespace.

    A claim is checked in time proportional to the claim, however many there are. Two claims
    collide on (family, protocol, port) if their host addresses are equal or one of them is
    "every address": what bind(2) would refuse, too. A process of the host that listens on the
    port is not seen.
    """

    def __init__(self, publications: Iterable[Publication] = ()) -> None:
        """Index what is there. Nothing is checked between them: they are already published."""
        self._held: dict[tuple[Family, str, int], dict[str, str]] = {}
        self._by_holder: dict[str, Publication] = {}
        for publication in publications:
            self._put(publication)

    def check(self, new: Publication) -> None:
        """Raise Conflict, naming the holder, if any mapping of ``new`` is another holder's.

        The holder's own former claim does not count. Raises InvalidInput as :func:`elements`.
        """
        elements(new.mappings, new.addresses)  # collisions inside of `new`
        for target in _targets(new.mappings, new.addresses):
            there = self._held.get((target.family, target.proto, target.host_port), {})
            for host, holder in there.items():
                if holder != new.holder and (not host or not target.host or host == target.host):
                    spot = f"{target.host or '*'}:{target.host_port}/{target.proto}"
                    raise Conflict("host port", spot, f"held by port {holder} on {host or 'every address'}")

    def claim(self, new: Publication) -> None:
        """Check, then record; the holder's former claim is replaced. On a raise nothing changes."""
        self.check(new)
        self.release(new.holder)
        self._put(new)

    def release(self, holder: str) -> Publication | None:
        """Forget the holder's claim and return it, or None if it has none."""
        old = self._by_holder.pop(holder, None)
        if old is not None:
            for target in _targets(old.mappings, old.addresses):
                slot = (target.family, target.proto, target.host_port)
                there = self._held.get(slot, {})
                there.pop(target.host, None)
                if not there:
                    self._held.pop(slot, None)
        return old

    def publications(self) -> list[Publication]:
        """All claims, in the order they were made."""
        return list(self._by_holder.values())

    def _put(self, publication: Publication) -> None:
        self._by_holder[publication.holder] = publication
        for target in _targets(publication.mappings, publication.addresses):
            slot = (target.family, target.proto, target.host_port)
            self._held.setdefault(slot, {})[target.host] = publication.holder


def conflicts(existing: Iterable[Publication], new: Publication) -> None:
    """Raise Conflict if ``new`` collides with ``existing``: :class:`HostPorts` for a single question."""
    HostPorts(existing).check(new)


def missing(wanted: Iterable[Element], observed: Iterable[Element]) -> list[Element]:
    """Those of ``wanted`` that ``observed`` lacks (or holds with other data), in order."""
    there = {e.identity() for e in observed}
    return [e for e in wanted if e.identity() not in there]


def _targets(mappings: Iterable[PortMapping], addresses: Iterable[PortAddress | str]) -> list[_Target]:
    first = _first_of_each_family(addresses)
    return [
        _Target(family, mapping.protocol, host, mapping.host_port, first[family], mapping.container_port)
        for i, mapping in enumerate(mappings)
        for family, host in _families(_checked(i, mapping), f"portMappings[{i}].hostIP", first)
    ]


def _first_of_each_family(addresses: Iterable[PortAddress | str]) -> dict[Family, str]:
    first: dict[Family, str] = {}
    for entry in addresses:
        text = entry if isinstance(entry, str) else entry.address
        try:
            ip = ipaddress.ip_address(text)
        except ValueError as exc:
            raise InvalidInput("addresses", text, "not an IP address") from exc
        first.setdefault(4 if isinstance(ip, ipaddress.IPv4Address) else 6, str(ip))
    return first


def _checked(i: int, mapping: PortMapping) -> PortMapping:
    for field, port in (("hostPort", mapping.host_port), ("containerPort", mapping.container_port)):
        if not 1 <= port <= _PORT_MAX:
            raise InvalidInput(f"portMappings[{i}].{field}", port, "must be 1 to 65535")
    if mapping.protocol not in PROTOCOLS:
        raise InvalidInput(f"portMappings[{i}].protocol", mapping.protocol, "must be tcp, udp or sctp")
    return mapping


def _families(mapping: PortMapping, field: str, first: dict[Family, str]) -> Sequence[tuple[Family, str]]:
    """The (family, host address or '') pairs that the mapping is published under."""
    text = mapping.host_ip
    if not text:
        if not first:
            raise InvalidInput(field, text, "the port has no address to publish")
        return [(family, "") for family in sorted(first)]
    try:
        ip = ipaddress.ip_address(text)
    except ValueError as exc:
        raise InvalidInput(field, text, "not an IP address") from exc
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            raise InvalidInput(field, text, "an address with a scope can't be published on")
        ip = ip.ipv4_mapped or ip
    if ip.is_multicast:
        raise InvalidInput(field, text, "a multicast address can't be published on")
    family: Family = 4 if isinstance(ip, ipaddress.IPv4Address) else 6
    if family not in first:
        raise InvalidInput(field, text, f"the port has no IPv{family} address to publish")
    return [(family, "" if str(ip) == _ANY[family] else str(ip))]


def _comment(holder: str) -> str:
    """The holder as an nft comment: at most 128 bytes of plain characters (NFTNL_UDATA_COMMENT_MAXLEN)."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._:/@-") else "_" for c in holder)[:120]
