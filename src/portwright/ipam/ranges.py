"""Range sets: from what a user wrote to what an allocator can count with.

The rules and the phrases are host-local's (containernetworking/plugins,
plugins/ipam/host-local/backend/allocator), because tests and people grep for them.
Where host-local is silent, the stricter reading holds:

- The network address is never given out, nor IPv4's broadcast address, whatever
  ``start`` and ``end`` say (host-local allows a ``rangeStart`` of ``.0``). IPv6 has no
  broadcast; its all-zeros address is the subnet-router anycast (RFC 4291, 2.6.1).
- The gateway of a range is never given out from any range of the network. If none is
  named it is the first host address (``.1``, ``::1``), as users expect their first
  sandbox at ``.2``; only a named one is reported (Portwright's own router is link-local).
- What no sandbox can have (loopback, multicast, ``0.0.0.0/8``) can't be in a range.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from portwright.model.errors import InvalidInput
from portwright.model.network import GATEWAY4, GATEWAY6, AddressRange

#: Bounds on a configuration: allocation is linear in the ranges of a set.
MAX_RANGE_SETS = 16
MAX_RANGES_PER_SET = 64
MAX_RESERVED = 1024

_CIDR = re.compile(r"[0-9A-Fa-f:.]+/\d{1,3}")
_UNUSABLE = tuple(ip_network(n) for n in ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "::1/128", "ff00::/8"))
_WIDTH = {4: 32, 6: 128}


@dataclass(frozen=True, slots=True)
class Range:
    """One validated range. Integers are addresses; ``first`` and ``last`` are inclusive.

    ``first``..``last`` excludes the network and broadcast address; the gateway and
    reserved addresses may lie inside and are cut out by :class:`RangeSet`.
    """

    family: int
    subnet: str
    prefix_len: int
    first: int
    last: int
    gateway: int
    gateway_named: bool

    def __contains__(self, value: int) -> bool:
        """Tell whether the address is within first..last (gateway and reserved included)."""
        return self.first <= value <= self.last

    def __str__(self) -> str:
        """``10.1.2.1-10.1.2.254``, the form used in messages."""
        return f"{text(self.family, self.first)}-{text(self.family, self.last)}"


@dataclass(frozen=True, slots=True)
class RangeSet:
    """Ranges of one family; a port gets one address of the set.

    ``pieces`` are the runs that may be given out, in the order of the configuration;
    ``total`` counts their addresses.
    """

    index: int
    family: int
    ranges: tuple[Range, ...]
    pieces: tuple[tuple[int, int], ...]
    total: int

    def __str__(self) -> str:
        """All ranges, comma separated."""
        return ",".join(map(str, self.ranges))


@dataclass(frozen=True, slots=True)
class Pools:
    """The validated range sets of one network, ready for :func:`allocate`."""

    network: str
    sets: tuple[RangeSet, ...]
    gateways: frozenset[tuple[int, int]]  # (family, address), named or not

    def find(self, family: int, value: int) -> tuple[RangeSet, Range] | None:
        """Return the set and the range that hold the address, or None."""
        for range_set in self.sets:
            if range_set.family == family:
                for each in range_set.ranges:
                    if value in each:
                        return range_set, each
        return None

    def range_of(self, address: str) -> Range | None:
        """Return the range that holds ``address`` (canonical or not), or None."""
        family, value = parse_address("address", address)
        found = self.find(family, value)
        return found[1] if found else None

    def gateway_of(self, address: str) -> str | None:
        """Return the gateway *named* in the range that holds ``address``, else None."""
        found = self.range_of(address)
        return text(found.family, found.gateway) if found and found.gateway_named else None


def text(family: int, value: int) -> str:
    """Return the canonical text (RFC 5952 for IPv6) of an address."""
    return str(IPv4Address(value) if family == 4 else IPv6Address(value))


def parse_address(field: str, address: str) -> tuple[int, int]:
    """Return (family, integer) of an address without prefix, in any textual form.

    Raises InvalidInput for what is no address, carries a zone, or is IPv4 in IPv6 clothes.
    """
    try:
        parsed = ip_address(address)
    except ValueError:
        raise InvalidInput(field, address, "not an IPv4 or IPv6 address") from None
    if isinstance(parsed, IPv6Address):
        if parsed.scope_id is not None:
            raise InvalidInput(field, address, "an address with a zone (%...) can't be used here")
        if parsed.ipv4_mapped is not None:
            raise InvalidInput(field, address, f"IPv4-mapped; write {parsed.ipv4_mapped}")
    return parsed.version, int(parsed)


def parse_gateway(field: str, address: str) -> tuple[int, int]:
    """As :func:`parse_address`, for what is to be a router: the address of one device."""
    family, value = parse_address(field, address)
    parsed = ip_address(address)
    if parsed.is_unspecified or parsed.is_multicast or parsed.is_loopback or address == "255.255.255.255":
        raise InvalidInput(field, address, "a gateway needs the address of one device")
    return family, value


def canonical_pools(
    pools: Sequence[Sequence[AddressRange]], *, field: str = "ipam.ranges"
) -> tuple[tuple[AddressRange, ...], ...]:
    """Return the same ranges with every address in canonical text.

    Raises InvalidInput as :func:`compile_pools` does; None stays None.
    """
    sets = _parse_sets(pools, field)

    def again(given: AddressRange, parsed: Range) -> AddressRange:
        def canon(address: str | None) -> str | None:
            return None if address is None else text(*parse_address(field, address))

        return AddressRange(
            subnet=parsed.subnet,
            start=canon(given.start),
            end=canon(given.end),
            gateway=canon(given.gateway),
        )

    return tuple(
        tuple(again(g, p) for g, p in zip(given, parsed, strict=True))
        for given, parsed in zip(pools, sets, strict=True)
    )


def compile_pools(
    network: str,
    pools: Sequence[Sequence[AddressRange]],
    reserved: Iterable[str] = (),
    *,
    field: str = "ipam.ranges",
) -> Pools:
    """Validate range sets and cut out what is never given out.

    ``reserved`` holds addresses or CIDR blocks. ``field`` is the path of ``pools`` in
    what the user wrote; errors extend it (``ipam.ranges[0][1].subnet``). Raises
    InvalidInput; the same arguments give the same (cached) value.
    """
    return _compile(network, tuple(tuple(s) for s in pools), tuple(reserved), field)


@lru_cache(maxsize=256)
def _compile(
    network: str, pools: tuple[tuple[AddressRange, ...], ...], reserved: tuple[str, ...], field: str
) -> Pools:
    parsed = _parse_sets(pools, field)
    gateways = frozenset((r.family, r.gateway) for s in parsed for r in s)
    routers = {*gateways, parse_address("", GATEWAY4), parse_address("", GATEWAY6)}
    blocks = [*_reserved(reserved), *((f, v, v) for f, v in routers)]
    sets = []
    for index, ranges in enumerate(parsed):
        family = ranges[0].family
        holes = sorted((lo, hi) for f, lo, hi in blocks if f == family)
        pieces = tuple(p for r in ranges for p in _cut(r.first, r.last, holes))
        if not pieces:
            raise InvalidInput(
                f"{field}[{index}]",
                ",".join(map(str, ranges)),
                "no address to give out: all are gateway or reserved",
            )
        total = sum(hi - lo + 1 for lo, hi in pieces)
        sets.append(RangeSet(index, family, ranges, pieces, total))
    return Pools(network, tuple(sets), gateways)


def _reserved(reserved: tuple[str, ...]) -> Iterator[tuple[int, int, int]]:
    if len(reserved) > MAX_RESERVED:
        raise InvalidInput("reserved", len(reserved), f"at most {MAX_RESERVED} entries; use CIDR blocks")
    for i, entry in enumerate(reserved):
        field = f"reserved[{i}]"
        if "/" in entry:
            net = _parse_network(field, entry)
            yield net.version, int(net.network_address), int(net.broadcast_address)
        else:
            family, value = parse_address(field, entry)
            yield family, value, value


def _cut(first: int, last: int, holes: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield first..last without the ascending ``holes``."""
    for lo, hi in holes:
        if hi < first or lo > last:
            continue
        if lo > first:
            yield first, lo - 1
        first = hi + 1
    if first <= last:
        yield first, last


def _parse_sets(pools: Sequence[Sequence[AddressRange]], field: str) -> list[tuple[Range, ...]]:
    if not pools:
        raise InvalidInput(field, None, "no IP ranges specified")
    if len(pools) > MAX_RANGE_SETS:
        raise InvalidInput(field, len(pools), f"at most {MAX_RANGE_SETS} range sets")
    sets = [_parse_set(ranges, f"{field}[{i}]") for i, ranges in enumerate(pools)]
    for i, one in enumerate(sets):
        for j in range(i + 1, len(sets)):
            if any(_overlap(a, b) for a in one for b in sets[j]):
                raise InvalidInput(
                    f"{field}[{j}]", ",".join(map(str, sets[j])), f"range set {i} overlaps with {j}"
                )
    return sets


def _parse_set(ranges: Sequence[AddressRange], field: str) -> tuple[Range, ...]:
    if not ranges:
        raise InvalidInput(field, None, "empty range set: no IP ranges specified")
    if len(ranges) > MAX_RANGES_PER_SET:
        raise InvalidInput(field, len(ranges), f"at most {MAX_RANGES_PER_SET} ranges in a set")
    parsed = [_parse_range(r, f"{field}[{i}]") for i, r in enumerate(ranges)]
    for i, each in enumerate(parsed):
        if each.family != parsed[0].family:
            raise InvalidInput(f"{field}[{i}].subnet", each.subnet, "mixed address families in one range set")
        for j in range(i):
            if _overlap(parsed[j], each):
                raise InvalidInput(
                    f"{field}[{i}]", str(each), f"subnets {parsed[j].subnet} and {each.subnet} overlap"
                )
    return tuple(parsed)


def _overlap(a: Range, b: Range) -> bool:
    # Ranges, not subnets: .10-.19 and .20-.29 of one subnet may be two ranges, as in host-local.
    return a.family == b.family and a.first <= b.last and b.first <= a.last


def _parse_network(field: str, cidr: str) -> IPv4Network | IPv6Network:
    if not _CIDR.fullmatch(cidr):
        raise InvalidInput(field, cidr, "not a subnet; write ADDRESS/PREFIX_LENGTH, such as 10.1.2.0/24")
    try:
        net = ip_network(cidr, strict=False)
    except ValueError:
        raise InvalidInput(field, cidr, "not an IPv4 or IPv6 subnet") from None
    _, value = parse_address(field, cidr.partition("/")[0])
    if value != int(net.network_address):
        why = (
            f"Network has host bits set, for a subnet mask of length {net.prefixlen} "
            f"the network address is {net.network_address}"
        )
        raise InvalidInput(field, cidr, why)
    return net


def _parse_range(given: AddressRange, field: str) -> Range:
    net = _parse_network(f"{field}.subnet", given.subnet)
    family = net.version
    if net.prefixlen > _WIDTH[family] - 2:
        raise InvalidInput(f"{field}.subnet", given.subnet, f"Network {net} too small to allocate from")
    for bad in _UNUSABLE:
        if bad.version == family and net.overlaps(bad):
            raise InvalidInput(f"{field}.subnet", given.subnet, f"overlaps {bad}, which no sandbox can use")
    low = int(net.network_address) + 1
    high = int(net.broadcast_address) - (1 if family == 4 else 0)

    def inside(name: str, address: str | None, default: int) -> int:
        if address is None:
            return default
        where = f"{field}.{name}"
        if parse_address(where, address)[0] != family:
            raise InvalidInput(where, address, f"of another family than {net}")
        value = parse_address(where, address)[1]
        if not int(net.network_address) <= value <= int(net.broadcast_address):
            raise InvalidInput(where, address, f"not in network {net}")
        return value

    first, last = inside("start", given.start, low), inside("end", given.end, high)
    if first > last:
        raise InvalidInput(f"{field}.start", given.start, f"is after the end, {text(family, last)}")
    first, last = max(first, low), min(last, high)
    if first > last:
        raise InvalidInput(f"{field}", given.start, "holds only the network or broadcast address")
    gateway = low
    if given.gateway is not None:
        # Outside the subnet is allowed: an on-link route to it is the sandbox's matter.
        gateway_family, gateway = parse_gateway(f"{field}.gateway", given.gateway)
        if gateway_family != family:
            raise InvalidInput(f"{field}.gateway", given.gateway, f"of another family than {net}")
    return Range(family, str(net), net.prefixlen, first, last, gateway, given.gateway is not None)
