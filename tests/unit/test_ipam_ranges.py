"""What a range set may be, in host-local's words, and what it gives out."""

from __future__ import annotations

import pytest

from portwright.ipam.ranges import (
    MAX_RANGE_SETS,
    MAX_RANGES_PER_SET,
    MAX_RESERVED,
    canonical_pools,
    compile_pools,
    parse_address,
    text,
)
from portwright.model.errors import InvalidInput
from portwright.model.network import AddressRange


def r(
    subnet: str, start: str | None = None, end: str | None = None, gateway: str | None = None
) -> AddressRange:
    """Make a range."""
    return AddressRange(subnet=subnet, start=start, end=end, gateway=gateway)


def pieces(*ranges: AddressRange, reserved: tuple[str, ...] = ()) -> list[str]:
    """Return what one set of these ranges gives out, as text."""
    (only,) = compile_pools("n", [ranges], reserved).sets
    return [f"{text(only.family, lo)}-{text(only.family, hi)}" for lo, hi in only.pieces]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (r("10.1.2.0/24"), ["10.1.2.2-10.1.2.254"]),
        (r("2001:db8::/64"), ["2001:db8::2-2001:db8::ffff:ffff:ffff:ffff"]),
        (r("10.1.2.0/30"), ["10.1.2.2-10.1.2.2"]),
        (r("10.1.2.0/24", "10.1.2.10", "10.1.2.20"), ["10.1.2.10-10.1.2.20"]),
        (r("10.1.2.0/24", "10.1.2.0", "10.1.2.255"), ["10.1.2.2-10.1.2.254"]),
        (r("10.1.2.0/24", gateway="10.1.2.254"), ["10.1.2.1-10.1.2.253"]),
        (r("10.1.2.0/24", gateway="10.1.2.7"), ["10.1.2.1-10.1.2.6", "10.1.2.8-10.1.2.254"]),
        (r("10.1.2.0/24", gateway="192.0.2.1"), ["10.1.2.1-10.1.2.254"]),
        (r("10.1.2.0/24", "10.1.2.5", "10.1.2.5"), ["10.1.2.5-10.1.2.5"]),
        (r("fd00::/126"), ["fd00::2-fd00::3"]),
    ],
)
def test_what_is_given_out(given: AddressRange, expected: list[str]) -> None:
    """Start and end are inclusive; network, broadcast and gateway (.1 unless named) are never given out."""
    assert pieces(given) == expected


def test_reserved_addresses_and_blocks_are_cut_out() -> None:
    """Reserved entries are addresses or CIDR blocks; those of other families or subnets don't matter."""
    reserved = ("10.1.2.5", "10.1.2.16/28", "fd00::5", "192.0.2.0/24")
    assert pieces(r("10.1.2.0/27"), reserved=reserved) == ["10.1.2.2-10.1.2.4", "10.1.2.6-10.1.2.15"]


def test_our_own_router_is_never_given_out() -> None:
    """A link-local subnet is allowed, but 169.254.1.1 is what every sandbox sees as its router."""
    assert pieces(r("169.254.1.0/29")) == ["169.254.1.2-169.254.1.6"]
    assert pieces(r("169.254.0.0/23")) == ["169.254.0.2-169.254.1.0", "169.254.1.2-169.254.1.254"]


def test_a_gateway_is_not_given_out_from_another_range_either() -> None:
    """The gateway of one range lies in another of the same subnet: cut out there too."""
    first = r("10.1.2.0/24", "10.1.2.10", "10.1.2.20", gateway="10.1.2.35")
    second = r("10.1.2.0/24", "10.1.2.30", "10.1.2.40")
    assert pieces(first, second) == ["10.1.2.10-10.1.2.20", "10.1.2.30-10.1.2.34", "10.1.2.36-10.1.2.40"]


def test_gateway_is_reported_only_if_named() -> None:
    """Portwright's router is link-local: a range's gateway is in results only if the config names it."""
    pools = compile_pools("n", [[r("10.1.2.0/24")], [r("fd00::/64", gateway="fd00::9")]])
    assert pools.gateway_of("10.1.2.5") is None
    assert pools.gateway_of("fd00::5") == "fd00::9"
    found = pools.range_of("fd00::5")
    assert found is not None
    assert found.prefix_len == 64
    assert pools.range_of("192.0.2.1") is None


@pytest.mark.parametrize(
    ("pools", "field", "why"),
    [
        ([], "ipam.ranges", "no IP ranges specified"),
        ([[]], "ipam.ranges[0]", "no IP ranges specified"),
        (
            [[r("10.1.2.5/24")]],
            "ipam.ranges[0][0].subnet",
            "Network has host bits set, for a subnet mask of length 24 the network address is 10.1.2.0",
        ),
        (
            [[r("2001:db8::1/64")]],
            "ipam.ranges[0][0].subnet",
            "Network has host bits set, for a subnet mask of length 64 the network address is 2001:db8::",
        ),
        ([[r("10.1.2.0/31")]], "ipam.ranges[0][0].subnet", "Network 10.1.2.0/31 too small to allocate from"),
        ([[r("10.1.2.0/32")]], "ipam.ranges[0][0].subnet", "Network 10.1.2.0/32 too small to allocate from"),
        ([[r("fd00::/127")]], "ipam.ranges[0][0].subnet", "Network fd00::/127 too small to allocate from"),
        ([[r("fd00::/128")]], "ipam.ranges[0][0].subnet", "Network fd00::/128 too small to allocate from"),
        ([[r("10.1.2.0/24", start="10.1.3.1")]], "ipam.ranges[0][0].start", "not in network 10.1.2.0/24"),
        ([[r("10.1.2.0/24", end="10.1.3.1")]], "ipam.ranges[0][0].end", "not in network 10.1.2.0/24"),
        ([[r("10.1.2.0/24", start="fd00::1")]], "ipam.ranges[0][0].start", "of another family"),
        ([[r("10.1.2.0/24", "10.1.2.9", "10.1.2.8")]], "ipam.ranges[0][0].start", "is after the end"),
        (
            [[r("10.1.2.0/24", "10.1.2.255", "10.1.2.255")]],
            "ipam.ranges[0][0]",
            "only the network or broadcast address",
        ),
        ([[r("10.1.2.0/24", gateway="fd00::1")]], "ipam.ranges[0][0].gateway", "of another family"),
        ([[r("10.1.2.0/24", gateway="x")]], "ipam.ranges[0][0].gateway", "not an IPv4 or IPv6 address"),
        ([[r("10.1.2.0/30", end="10.1.2.1")]], "ipam.ranges[0]", "no address to give out"),
        ([[r("10.1.2.0/24"), r("fd00::/64")]], "ipam.ranges[0][1].subnet", "mixed address families"),
        (
            [[r("10.1.2.0/24"), r("10.1.2.0/28")]],
            "ipam.ranges[0][1]",
            "subnets 10.1.2.0/24 and 10.1.2.0/28 overlap",
        ),
        ([[r("10.1.2.0/24")], [r("10.1.0.0/16")]], "ipam.ranges[1]", "range set 0 overlaps with 1"),
        ([[r("10.1.2.0")]], "ipam.ranges[0][0].subnet", "not a subnet"),
        ([[r("10.1.2.0/255.255.255.0")]], "ipam.ranges[0][0].subnet", "not a subnet"),
        ([[r("10.1.2.0/33")]], "ipam.ranges[0][0].subnet", "not an IPv4 or IPv6 subnet"),
        ([[r("010.1.2.0/24")]], "ipam.ranges[0][0].subnet", "not an IPv4 or IPv6 subnet"),
        ([[r("")]], "ipam.ranges[0][0].subnet", "not a subnet"),
        ([[r("::ffff:10.1.2.0/120")]], "ipam.ranges[0][0].subnet", "IPv4-mapped"),
        ([[r("127.0.0.0/24")]], "ipam.ranges[0][0].subnet", "overlaps 127.0.0.0/8"),
        ([[r("0.0.0.0/0")]], "ipam.ranges[0][0].subnet", "overlaps 0.0.0.0/8"),
        ([[r("224.1.0.0/16")]], "ipam.ranges[0][0].subnet", "overlaps 224.0.0.0/4"),
        ([[r("ff02::/64")]], "ipam.ranges[0][0].subnet", "overlaps ff00::/8"),
        ([[r("::/0")]], "ipam.ranges[0][0].subnet", "overlaps ::1/128"),
        ([[r(f"10.{i}.0.0/24")] for i in range(MAX_RANGE_SETS + 1)], "ipam.ranges", "at most 16 range sets"),
        (
            [[r(f"10.{i}.0.0/24") for i in range(MAX_RANGES_PER_SET + 1)]],
            "ipam.ranges[0]",
            "at most 64 ranges",
        ),
    ],
)
def test_refusals_name_the_field_and_the_reason(
    pools: list[list[AddressRange]], field: str, why: str
) -> None:
    """Each wrong configuration is refused with host-local's phrase and the path to the field."""
    with pytest.raises(InvalidInput) as caught:
        compile_pools("n", pools)
    assert caught.value.field == field
    assert why in caught.value.why


@pytest.mark.parametrize(
    ("reserved", "field"),
    [
        (("10.0.0.1", "x"), "reserved[1]"),
        (("10.0.0.1/24",), "reserved[0]"),
        (("10.0.0.1",) * (MAX_RESERVED + 1), "reserved"),
    ],
)
def test_wrong_reserved_entries(reserved: tuple[str, ...], field: str) -> None:
    """Reserved entries are checked as strictly as ranges, and bounded."""
    with pytest.raises(InvalidInput) as caught:
        compile_pools("n", [[r("10.1.2.0/24")]], reserved)
    assert caught.value.field == field


def test_disjoint_ranges_of_one_subnet_are_fine() -> None:
    """Overlap is judged by ranges, not subnets: host-local's 'several ranges in a subnet'."""
    compile_pools("n", [[r("10.1.2.0/24", end="10.1.2.9")], [r("10.1.2.0/24", "10.1.2.10")]])


def test_canonical_text() -> None:
    """Every spelling of the same address is stored as one."""
    given = [[r("2001:DB8:0::/64", start="2001:db8:0:0::A", gateway="2001:0db8::1")], [r("10.1.2.0/24")]]
    assert canonical_pools(given) == (
        (r("2001:db8::/64", start="2001:db8::a", gateway="2001:db8::1"),),
        (r("10.1.2.0/24"),),
    )


@pytest.mark.parametrize(
    "wrong", ["", "10.1.2", "fe80::1%eth0", "::ffff:10.0.0.1", "10.1.2.3/24", "010.1.2.3", "1"]
)
def test_what_is_no_address(wrong: str) -> None:
    """Zones, IPv4-mapped forms, prefixes and leading zeros are refused, not guessed at."""
    with pytest.raises(InvalidInput, match=r"^ips: "):
        parse_address("ips", wrong)
