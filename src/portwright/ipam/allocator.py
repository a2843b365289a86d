"""Which addresses a new port gets: a pure choice over ranges and the state.

Round robin, as host-local does it: after the last address given out of the set,
wrapping at its end, so that an address comes back as late as possible. On top of it
a released address *rests* before it is chosen again: neighbours, connection tables
and caches of the peers must forget who had it. A full pool is a full pool: a resting
address is not given out early, and the error says how many rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from portwright.ipam.ranges import Pools, RangeSet, parse_address, text
from portwright.ipam.state import AddressState, Allocation, Usage
from portwright.model.errors import Conflict, InvalidInput, PoolExhausted

#: How long a released address rests, in seconds.
REST_SECONDS: Final = 60.0


def allocate(
    pools: Pools,
    state: AddressState,
    *,
    requested: Sequence[str] = (),
    now: float,
    rest_seconds: float = REST_SECONDS,
) -> list[Allocation]:
    """Choose one address from each range set, in the order of the sets.

    ``state`` is left as it was, but for rests that are over at ``now``. ``requested``
    names addresses (a prefix length is allowed and must be the range's): each must lie
    in a set of its own; sets that nobody named an address of are served round robin.

    A requested address that rests is given at once, whoever had it: the rest is there
    to guide this function's own choice, and whoever names an address (a static address,
    ``podman restart --ip``, a migration) has chosen. A port id can't tell 'the same
    owner' anyway, as a re-created sandbox is a new port.

    Raises InvalidInput (outside all ranges; gateway; reserved), Conflict (taken) and
    PoolExhausted. host-local's phrases begin the errors' ``why``.
    """
    state.expire(now, rest_seconds)
    wanted = _sort_requests(pools, requested)
    chosen = []
    for range_set in pools.sets:
        value = wanted.get(range_set.index)
        if value is None:
            value = _next(range_set, state, pools.network)
        else:
            _check_request(pools, range_set, state, value)
        chosen.append(Allocation(range_set.index, text(range_set.family, value)))
    return chosen


def usage(pools: Pools, state: AddressState, *, now: float, rest_seconds: float) -> tuple[Usage, ...]:
    """Return how full each range set is, counting addresses that any network holds in it.

    Like :func:`allocate`, it drops rests that are over. A set without a free address
    makes the network unable to serve (CNI STATUS 50).
    """
    state.expire(now, rest_seconds)
    return tuple(Usage(*state.count(s.family, s.pieces), s.total) for s in pools.sets)


def _sort_requests(pools: Pools, requested: Sequence[str]) -> dict[int, int]:
    """Return the requested address per set index; all of them have a place or it raises."""
    wanted: dict[int, int] = {}
    homeless = []
    for i, given in enumerate(requested):
        address, slash, prefix = given.partition("/")
        family, value = parse_address(f"ips[{i}]", address)
        found = pools.find(family, value)
        if found is None or found[0].index in wanted:
            homeless.append(text(family, value))
            continue
        if slash and prefix != str(found[1].prefix_len):
            why = f"the prefix length of its range is {found[1].prefix_len}"
            raise InvalidInput(f"ips[{i}]", given, why)
        wanted[found[0].index] = value
    if homeless:
        why = f"failed to allocate all requested IPs: {' '.join(homeless)}"
        raise InvalidInput("ips", ",".join(requested), why)
    return wanted


def _check_request(pools: Pools, range_set: RangeSet, state: AddressState, value: int) -> None:
    address = text(range_set.family, value)
    if (range_set.family, value) in pools.gateways:
        raise InvalidInput("ips", address, f"requested ip {address} is subnet's gateway")
    if not any(lo <= value <= hi for lo, hi in range_set.pieces):
        raise InvalidInput("ips", address, f"requested ip {address} is reserved in {pools.network!r}")
    holder = state.holder(range_set.family, value)
    if holder is not None:
        raise Conflict(
            "address",
            address,
            f"requested IP address {address} is not available in range set {range_set}: "
            f"port {holder.port_id} of network {holder.network!r} has it",
        )


def _next(range_set: RangeSet, state: AddressState, network: str) -> int:
    for lo, hi in _walk(range_set, state.cursors.get((network, range_set.index))):
        value = state.next_free(range_set.family, lo)
        if value <= hi:
            return value
    used, resting = state.count(range_set.family, range_set.pieces)
    raise PoolExhausted(network, f"range set {range_set.index} ({range_set})", used, resting)


def _walk(range_set: RangeSet, cursor: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
    """Yield the pieces from the address after the cursor all the way round to it.

    A cursor outside of all pieces (the ranges were changed) means the beginning.
    """
    pieces = range_set.pieces
    if cursor is not None and cursor[0] == range_set.family:
        last = cursor[1]
        for i, (lo, hi) in enumerate(pieces):
            if lo <= last <= hi:
                if last < hi:
                    yield last + 1, hi
                yield from pieces[i + 1 :]
                yield from pieces[:i]
                yield lo, last
                return
    yield from pieces
