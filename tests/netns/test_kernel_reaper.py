"""A deleted link is gone for every observer when the answer comes, and the kernel's tidying costs nobody."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from portwright.kernel import rtnl
from portwright.kernel.netlink import NetlinkSocket
from portwright.kernel.netns import entered
from portwright.kernel.reaper import LinkReaper
from tests.fix_netns import NetnsFactory, TestNetns

pytestmark = pytest.mark.netns
MAC1, MAC2 = "02:00:00:00:00:01", "02:00:00:00:00:02"


class Pair:
    """Two namespaces, a socket in each, and a reaper in the first."""

    def __init__(self, host: TestNetns, sandbox: TestNetns) -> None:
        self.host, self.sandbox = host, sandbox
        self.h, self.s = NetlinkSocket(netns_fd=host.fd), NetlinkSocket(netns_fd=sandbox.fd)
        self.reaper = LinkReaper(host.fd)

    def make(self, name: str) -> int:
        """A veth pair that is up on both sides, with an address inside; the host end's ifindex."""
        made = rtnl.veth_create(
            name,
            mac=MAC1,
            mtu=1500,
            peer_name=name,
            peer_mac=MAC2,
            peer_mtu=1500,
            peer_netns_fd=self.sandbox.fd,
        )
        self.h.execute([made])
        link = rtnl.link_by_name(self.h, name)
        assert link is not None
        self.h.execute([rtnl.link_set(link.index, up=True)])
        self.s.execute(
            [rtnl.link_set(link.link_index, up=True), rtnl.addr_add(link.link_index, "10.9.9.9/32")]
        )
        return link.index


@pytest.fixture
def pair(netns_factory: NetnsFactory) -> Iterator[Pair]:
    made = Pair(netns_factory(), netns_factory())
    try:
        yield made
    finally:
        made.reaper.close()
        made.h.close()
        made.s.close()


def test_both_ends_and_what_hung_on_them_are_gone_with_the_answer(pair: Pair) -> None:
    """Netlink, /proc/net/dev, addresses and routes: nobody finds a trace of either end, every time."""
    for _ in range(20):
        pair.reaper.delete(pair.make("pw0"))
        for fd in (pair.host.fd, pair.sandbox.fd):
            with entered(fd):
                assert "pw0" not in Path("/proc/thread-self/net/dev").read_text()
        assert rtnl.link_by_name(pair.s, "pw0") is None
        assert rtnl.link_by_name(pair.h, "pw0") is None
        assert not any(a.address == "10.9.9.9" for a in rtnl.addresses(pair.s))


def test_the_name_is_free_at_once(pair: Pair) -> None:
    """A device of the same name, in the same two namespaces, can be made right after the answer."""
    for _ in range(20):
        pair.reaper.delete(pair.make("pw0"))


def test_one_that_is_gone_already_is_no_error(pair: Pair) -> None:
    """Deleting twice, or what never was, returns."""
    index = pair.make("pw0")
    pair.reaper.delete(index)
    pair.reaper.delete(index)
    pair.reaper.delete(0x7FFF0000)


@pytest.mark.alone
def test_a_burst_is_quicker_than_the_kernel_tidies_up(pair: Pair) -> None:
    """Twelve deletions by the reaper take less than half the time of twelve that wait for the kernel."""

    def burst(reap: bool) -> float:
        indexes = [pair.make(f"pw{n}") for n in range(12)]
        begun = time.perf_counter()
        for index in indexes:
            if reap:
                pair.reaper.delete(index)
            else:
                pair.h.execute([rtnl.link_del(index)])
        return time.perf_counter() - begun

    tries = [burst(True) / burst(False) for _ in range(3)]
    assert min(tries) < 0.5, tries


def test_close_leaves_no_deletion_behind(pair: Pair) -> None:
    """close() returns when the last deletion has ended in the kernel too, and frees its descriptors."""
    other = LinkReaper(pair.host.fd)
    other.delete(pair.make("pw1"))
    other.close()
    assert rtnl.link_by_name(pair.h, "pw1") is None
