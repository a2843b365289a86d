"""The netlink codec and the request builders, by value; no kernel."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portwright.kernel import clsact, netlink, nlattr, rtnl, rtnl_parse
from portwright.kernel.netlink import Message, Request, parse_messages
from portwright.model.errors import InvalidInput

PARSERS = (
    rtnl_parse.parse_link,
    rtnl_parse.parse_address,
    rtnl_parse.parse_route,
    rtnl_parse.parse_neighbour,
    netlink._answer,
)
TYPES = (2, 3, 16, 17, 20, 24, 28)
attributes = st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=300)), max_size=12)


@given(attributes)
def test_attributes_survive_packing(items: list[tuple[int, bytes]]) -> None:
    """What attr() packs, iter_attrs() gives back in order, and each starts 4-byte aligned."""
    packed = [nlattr.attr(kind, payload) for kind, payload in items]
    assert all(len(part) % 4 == 0 for part in packed)
    assert list(nlattr.iter_attrs(b"".join(packed))) == items
    assert nlattr.parse_attrs(b"".join(packed)) == dict(items)


@given(attributes, st.integers(0, 4000))
def test_truncated_attributes_are_left_out(items: list[tuple[int, bytes]], cut: int) -> None:
    """A cut anywhere yields a prefix of the attributes: none is made up, none shortened."""
    data = b"".join(nlattr.attr(kind, payload) for kind, payload in items)[:cut]
    found = list(nlattr.iter_attrs(data))
    assert found == items[: len(found)]
    assert nlattr.parse_attrs(data) == dict(found)


@given(st.binary(max_size=400))
def test_any_bytes_parse_without_an_error(data: bytes) -> None:
    """No reply, however broken, makes a parser raise."""
    for message in parse_messages(data):
        assert len(message.body) <= len(data)
    list(nlattr.iter_attrs(data))
    for kind in TYPES:
        for flags in (0, 0x100, 0x200, 0x300):
            for parser in PARSERS:
                parser(Message(kind, flags, 1, data))


@given(attributes, st.sampled_from([16, 20, 24, 28]), st.binary(min_size=8, max_size=16))
def test_any_attributes_parse_without_an_error(
    items: list[tuple[int, bytes]], kind: int, header: bytes
) -> None:
    """Well-formed attributes of the wrong size or sense make no parser raise either."""
    small = [(number % 64, payload) for number, payload in items]
    body = header.ljust(16 if kind == 16 else 12, b"\x02")
    body += b"".join(nlattr.attr(number, payload) for number, payload in small)
    for parser in PARSERS:
        parser(Message(kind, 0, 1, body))


@given(st.integers(0, 2**32 - 1))
def test_numbers_survive_packing(value: int) -> None:
    """Every width comes back as it went in; big-endian attributes are in network order."""
    assert nlattr.get_u32(nlattr.parse_attrs(nlattr.attr_u32(5, value)), 5) == value
    assert nlattr.get_u8(nlattr.parse_attrs(nlattr.attr_u8(5, value & 0xFF)), 5) == value & 0xFF
    raw16 = nlattr.parse_attrs(nlattr.attr_u16(5, value & 0xFFFF))[5]
    assert struct.unpack("=H", raw16)[0] == value & 0xFFFF
    assert nlattr.parse_attrs(nlattr.attr_be32(5, value))[5] == value.to_bytes(4, "big")
    assert nlattr.parse_attrs(nlattr.attr_be16(5, value & 0xFFFF))[5] == (value & 0xFFFF).to_bytes(2, "big")


def test_duplicates_stay_available_and_the_last_one_wins() -> None:
    """parse_attrs behaves as the kernel's nla_parse; iter_attrs keeps every altname of a list."""
    data = nlattr.attr_str(53, "one") + nlattr.attr_str(53, "two")
    assert nlattr.parse_attrs(data) == {53: b"two\0"}
    assert [raw for _, raw in nlattr.iter_attrs(data)] == [b"one\0", b"two\0"]


def test_missing_and_short_attributes_give_the_default() -> None:
    """A reader never sees half a number."""
    attrs = {1: b"\1\2", 2: b""}
    assert nlattr.get_u32(attrs, 1, 7) == nlattr.get_u32(attrs, 9, 7) == nlattr.get_u8(attrs, 2, 7) == 7
    assert nlattr.get_str(attrs, 9, "none") == "none"


def test_what_cannot_be_packed_is_refused() -> None:
    """An attribute too long for its u16 length, or a NUL in a string, is InvalidInput, never cut."""
    with pytest.raises(InvalidInput):
        nlattr.attr(1, bytes(65532))
    with pytest.raises(InvalidInput):
        nlattr.attr_str(1, "a\0b")


@pytest.mark.parametrize("capped", [True, False])
def test_the_kernels_own_sentence_is_found(capped: bool) -> None:
    """The extack is read behind a capped copy of the request and behind a whole one."""
    original = struct.pack("=IHHII", 16 + 8, 16, 5, 1, 0)
    body = struct.pack("=i", -errno.EEXIST) + original + (b"" if capped else bytes(8))
    body += nlattr.attr_str(1, "already there")
    flags = 0x200 | (0x100 if capped else 0)
    assert netlink._answer(Message(2, flags, 1, body)) == (errno.EEXIST, "already there")


def test_an_ack_is_success_and_a_broken_error_is_not() -> None:
    """An errno of 0 is an ack; an ERROR too short to hold an errno must not pass as one."""
    assert netlink._answer(Message(2, 0, 1, struct.pack("=i", 0) + bytes(16))) == (0, "")
    assert netlink._answer(Message(2, 0, 1, b"\0"))[0] == errno.EBADMSG


def test_batches_keep_every_request_in_order_within_the_limits() -> None:
    """No batch exceeds BATCH_MAX requests or 64 KiB, and together they are the whole list."""
    small = [Request(1, 0, b"", str(i)) for i in range(150)]
    large = [Request(1, 0, bytes(30_000), str(i)) for i in range(150, 155)]
    cut = list(netlink._batches(small + large))
    assert [r.name for _, batch in cut for r in batch] == [str(i) for i in range(155)]
    assert [start for start, _ in cut] == [0, 64, 128, 152, 154]
    assert all(sum(16 + len(r.body) for r in batch) <= 64 * 1024 for _, batch in cut)
    assert list(netlink._batches([])) == []


MAC = "02:00:00:00:00:01"


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (rtnl.link_set(7, up=True, mtu=1400), "ip link set dev if7 mtu 1400 up"),
        (rtnl.link_set("pw1", up=False, master=0), "ip link set dev pw1 nomaster down"),
        (
            rtnl.link_set("pw1", master=3, addrgenmode="none"),
            "ip link set dev pw1 master if3 addrgenmode none",
        ),
        (rtnl.link_set(7, name="eth0", alias="a b"), "ip link set dev if7 name eth0 alias 'a b'"),
        (rtnl.link_del("pw1"), "ip link del dev pw1"),
        (rtnl.altname_add("pw1", ["a", "b"]), "ip link property add dev pw1 altname a altname b"),
        (rtnl.addr_add(7, "10.0.0.2/32"), "ip addr add 10.0.0.2/32 dev if7"),
        (
            rtnl.addr_add(7, "fd00::2/128", noprefixroute=True),
            "ip addr add fd00::2/128 dev if7 nodad noprefixroute",
        ),
        (rtnl.addr_del(7, "10.0.0.2/32"), "ip addr del 10.0.0.2/32 dev if7"),
        (
            rtnl.route_add("0.0.0.0/0", oif=7, gw="169.254.1.1", onlink=True, mtu=1300),
            "ip route add 0.0.0.0/0 via 169.254.1.1 dev if7 mtu 1300 onlink",
        ),
        (
            rtnl.route_replace("10.0.0.0/8", oif=7, gw="fe80::1", table=1000, priority=5),
            "ip route replace 10.0.0.0/8 via inet6 fe80::1 dev if7 table 1000 metric 5",
        ),
        (
            rtnl.route_add("fd00::/8", type="unreachable", advmss=1200),
            "ip -6 route add unreachable fd00::/8 advmss 1200",
        ),
        (rtnl.route_del("10.0.0.0/8", oif=7), "ip route del 10.0.0.0/8 dev if7"),
        (
            rtnl.neigh_replace(7, "fe80::1", MAC),
            f"ip neigh replace fe80::1 lladdr {MAC} dev if7 nud permanent",
        ),
        (rtnl.neigh_del(7, "fe80::1"), "ip neigh del fe80::1 dev if7"),
    ],
)
def test_a_request_is_named_as_a_person_would_type_it(request_: Request, name: str) -> None:
    """The name is iproute2's syntax, so that a plan and an error can be replayed by hand."""
    assert request_.name == name
    assert len(request_.body) % 4 == 0


def test_builders_refuse_what_the_kernel_could_not_even_read() -> None:
    """Addresses, prefixes, MACs and types that are none are InvalidInput before any I/O."""
    for bad in ("10.0.0.2", "10.0.0.2/33", "10.0.0/24", "fd00::/129", "x/8", "10.0.0.0/-1", ""):
        with pytest.raises(InvalidInput):
            rtnl.addr_add(7, bad)
    for bad in ("", "02:00", "zz:00:00:00:00:00"):
        with pytest.raises(InvalidInput):
            rtnl.neigh_replace(7, "10.0.0.1", bad)
    with pytest.raises(InvalidInput):
        rtnl.route_add("10.0.0.0/8", type="nonsense")
    with pytest.raises(InvalidInput, match="ifindex"):
        rtnl.link_set("eth0", name="eth1")


def test_a_long_name_is_looked_up_as_an_altname() -> None:
    """Over 15 bytes only an altname can be meant; IFLA_IFNAME would be refused by the kernel."""
    assert rtnl_parse.IFLA_IFNAME in nlattr.parse_attrs(rtnl.link_get("a" * 15).body, 16)
    assert rtnl_parse.IFLA_ALT_IFNAME in nlattr.parse_attrs(rtnl.link_get("a" * 16).body, 16)


def test_a_bridge_ports_farewell_is_not_a_deleted_link() -> None:
    """RTM_DELLINK of family AF_BRIDGE says that a port left its bridge; the link lives on."""
    body = rtnl_parse.IFINFOMSG.pack(7, 0, 3, 0, 0) + nlattr.attr_str(3, "pw1")
    assert rtnl_parse.parse_link(Message(17, 0, 0, body)) is None


def test_the_filter_slot_names_its_protocol_in_network_order() -> None:
    """tcm_info holds pref << 16 and the protocol as on the wire (ETH_P_ALL)."""
    info = struct.unpack_from("=I", clsact._slot(3, "ingress", 0xC000, 1), 16)[0]
    assert info >> 16 == 0xC000
    assert struct.pack("=H", info & 0xFFFF) == b"\x00\x03"
