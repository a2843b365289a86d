"""BPF on clsact beside other owners: theirs survives whatever we do, ours is replaced in place."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator

import pytest

from portwright.kernel import clsact, rtnl
from portwright.kernel.netlink import NetlinkSocket
from portwright.model.errors import Conflict, NotFound
from tests.fix_netns import NetnsFactory, TestNetns

pytestmark = pytest.mark.netns
NAME, PREF, HANDLE = "pw_from_sandbox", 0xC000, 0x70770001
MAC = "02:00:00:00:00:01"
SIDES: tuple[clsact.Direction, ...] = ("ingress", "egress")


class Link:
    """A veth in its own namespace, with a socket there, its ifindex and two loaded programs."""

    def __init__(self, ns: TestNetns, sock: NetlinkSocket, progs: list[int]) -> None:
        self.ns, self.sock, self.progs = ns, sock, progs
        made = rtnl.veth_create("pw1", mac=MAC, mtu=1500, peer_name="p", peer_mac=MAC, peer_mtu=1500)
        sock.execute([made])
        found = rtnl.link_by_name(sock, "pw1")
        assert found is not None
        self.index = found.index

    def tc(self, *arguments: str) -> str:
        return self.ns.run(["tc", *arguments]).stdout

    def attach(self, side: clsact.Direction, prog: int = 0, name: str = NAME) -> None:
        clsact.attach_bpf(self.sock, self.index, side, self.progs[prog], name=name, pref=PREF, handle=HANDLE)

    def detach(self, side: clsact.Direction, name: str = NAME) -> bool:
        return clsact.detach_bpf(self.sock, self.index, side, name=name, pref=PREF, handle=HANDLE)

    def state(self) -> list[str]:
        """Everything tc shows, less the counters that change by themselves."""
        text = self.tc("qdisc", "show", "dev", "pw1")
        for side in SIDES:
            text += f"{side}\n" + self.tc("filter", "show", "dev", "pw1", side)
        return text.splitlines()


@pytest.fixture
def link(netns_factory: NetnsFactory) -> Iterator[Link]:
    ns = netns_factory()
    progs = [load_pass(), load_pass()]
    try:
        with NetlinkSocket(netns_fd=ns.fd) as sock:
            yield Link(ns, sock, progs)
    finally:
        for fd in progs:
            os.close(fd)


def load_pass() -> int:
    """Load ``return TC_ACT_UNSPEC`` by bpf(2) itself, so that this test needs no compiler."""
    code = bytes.fromhex("b7000000ffffffff") + bytes.fromhex("9500000000000000")
    insns, licence = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    attr = (ctypes.c_uint64 * 16)()
    attr[0] = 3 | len(code) // 8 << 32  # BPF_PROG_TYPE_SCHED_CLS, insn_cnt
    attr[1], attr[2] = ctypes.addressof(insns), ctypes.addressof(licence)
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 321, "aarch64": 280}[platform.machine()]
    fd: int = libc.syscall(number, 5, ctypes.byref(attr), ctypes.sizeof(attr))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "BPF_PROG_LOAD")
    return fd


def test_clsact_is_made_once_and_joined_after(link: Link) -> None:
    """True for the first, False for the next, and someone's own is joined unchanged."""
    assert clsact.ensure_clsact(link.sock, link.index)
    before = link.state()
    assert not clsact.ensure_clsact(link.sock, link.index)
    assert link.state() == before
    assert "clsact" in before[1] + before[0]


def test_an_ingress_qdisc_is_not_taken_away(link: Link) -> None:
    """Someone's older ingress qdisc holds the place: Conflict, and it is still there."""
    link.tc("qdisc", "add", "dev", "pw1", "ingress")
    before = link.state()
    with pytest.raises(Conflict, match="ingress qdisc"):
        clsact.ensure_clsact(link.sock, link.index)
    assert link.state() == before


def test_a_missing_link_is_not_found(link: Link) -> None:
    """NotFound for the link; listing shows nothing."""
    with pytest.raises(NotFound):
        clsact.ensure_clsact(link.sock, 999_999)
    assert clsact.list_filters(link.sock, 999_999, "ingress") == []
    assert clsact.qdiscs(link.sock, 999_999) == []


@pytest.mark.parametrize("side", SIDES)
def test_attach_replace_and_detach_ours(link: Link, side: clsact.Direction) -> None:
    """The program sits in its slot under its name, is replaced in place, and leaves nothing behind."""
    clsact.ensure_clsact(link.sock, link.index)
    empty = link.state()
    link.attach(side)
    (first,) = clsact.list_filters(link.sock, link.index, side)
    assert (first.kind, first.pref, first.handle, first.name) == ("bpf", PREF, HANDLE, NAME)
    assert first.protocol == 3
    assert "direct-action" in link.tc("filter", "show", "dev", "pw1", side)
    link.attach(side, prog=1)
    (second,) = clsact.list_filters(link.sock, link.index, side)
    assert second.prog_id != first.prog_id > 0
    assert clsact.filter_counts(link.sock, link.index) == {s: int(s == side) for s in SIDES}
    assert link.detach(side)
    assert not link.detach(side)
    assert link.state() == empty


@pytest.mark.parametrize("side", SIDES)
def test_other_owners_survive(link: Link, side: clsact.Direction) -> None:
    """Filters of another kind, another preference and the same preference outlive attach, replace, detach."""
    link.tc("qdisc", "add", "dev", "pw1", "clsact")
    link.tc(
        "qdisc",
        "replace",
        "dev",
        "pw1",
        "root",
        "handle",
        "1:",
        "tbf",
        "rate",
        "1gbit",
        "burst",
        "1mb",
        "latency",
        "50ms",
    )
    link.tc(
        *("filter", "add", "dev", "pw1", side, "pref", "10", "protocol", "ip", "u32"),
        *("match", "ip", "dst", "10.0.0.0/8", "flowid", "1:1"),
    )
    clsact.attach_bpf(link.sock, link.index, side, link.progs[1], name="cilium", pref=1, handle=1)
    clsact.attach_bpf(link.sock, link.index, side, link.progs[1], name="neighbour", pref=PREF, handle=5)
    before = link.state()
    assert not clsact.ensure_clsact(link.sock, link.index)
    link.attach(side)
    link.attach(side, prog=1)
    during = link.state()
    assert set(before) <= set(during)
    assert len(during) == len(before) + 1
    assert not clsact.drop_clsact(link.sock, link.index)
    assert link.detach(side)
    assert link.state() == before


@pytest.mark.parametrize("side", SIDES)
def test_a_slot_that_is_held_is_neither_taken_nor_emptied(link: Link, side: clsact.Direction) -> None:
    """Another name in our slot: attach is a Conflict, detach does nothing, the filter stays."""
    clsact.ensure_clsact(link.sock, link.index)
    link.attach(side, name="somebody")
    before = link.state()
    with pytest.raises(Conflict, match="somebody"):
        link.attach(side)
    assert not link.detach(side)
    assert link.state() == before


def test_a_preference_of_another_kind_is_a_conflict(link: Link) -> None:
    """A preference holds one kind and protocol of filter only; who was first keeps it."""
    clsact.ensure_clsact(link.sock, link.index)
    link.tc(
        *("filter", "add", "dev", "pw1", "ingress", "pref", str(PREF), "protocol", "ip", "u32"),
        *("match", "ip", "dst", "10.0.0.0/8", "flowid", "1:1"),
    )
    before = link.state()
    with pytest.raises(Conflict, match="u32"):
        link.attach("ingress")
    assert not link.detach("ingress")
    assert link.state() == before


def test_an_empty_clsact_can_be_dropped(link: Link) -> None:
    """Dropped when nothing is in it, kept while anything is, and nothing happens where there is none."""
    assert not clsact.drop_clsact(link.sock, link.index)
    bare = link.state()
    clsact.ensure_clsact(link.sock, link.index)
    link.attach("egress", name="somebody")
    assert not clsact.drop_clsact(link.sock, link.index)
    link.detach("egress", name="somebody")
    assert clsact.drop_clsact(link.sock, link.index)
    assert link.state() == bare


def test_a_fresh_device_gets_both_programs_in_one_round_trip_each(link: Link) -> None:
    """On a device that nobody touched the short way does what the careful one does, and says so."""
    for side in SIDES:
        assert clsact.attach_fresh(
            link.sock, link.index, side, link.progs[0], name=NAME, pref=PREF, handle=HANDLE
        )
    short = link.state()
    link.tc("qdisc", "del", "dev", "pw1", "clsact")
    clsact.ensure_clsact(link.sock, link.index)
    for side in SIDES:
        link.attach(side)
    assert [line.split(" id ")[0] for line in short] == [line.split(" id ")[0] for line in link.state()]


@pytest.mark.parametrize("theirs", ["clsact", "ingress", "slot"])
def test_the_short_way_gives_way_to_whoever_was_first(link: Link, theirs: str) -> None:
    """A qdisc or a filter that is there already: False, and the careful way still does what it always did."""
    if theirs == "ingress":
        link.tc("qdisc", "add", "dev", "pw1", "ingress")
    else:
        link.tc("qdisc", "add", "dev", "pw1", "clsact")
    if theirs == "slot":
        link.attach("ingress", prog=1, name="somebody")
    short = clsact.attach_fresh(
        link.sock, link.index, "ingress", link.progs[0], name=NAME, pref=PREF, handle=HANDLE
    )
    assert short is False
    if theirs == "ingress":
        with pytest.raises(Conflict):
            clsact.ensure_clsact(link.sock, link.index)
        return
    assert clsact.ensure_clsact(link.sock, link.index) is False
    if theirs == "slot":
        with pytest.raises(Conflict):
            link.attach("ingress")
    else:
        link.attach("ingress")
