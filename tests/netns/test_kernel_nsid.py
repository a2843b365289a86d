"""kernel.nsid: a namespace by the number that another one knows it under."""

from __future__ import annotations

import os

import pytest

from portwright.kernel import netns, nsid, rtnl
from portwright.kernel.monitor import LinkMonitor
from portwright.kernel.netlink import NetlinkSocket
from tests.deadline import wait_readable
from tests.fix_netns import NetnsFactory, open_fds

pytestmark = pytest.mark.netns


def test_an_id_leads_to_its_namespace_and_back(netns_factory: NetnsFactory) -> None:
    """A namespace without an id has none; a pair across gives it one, by which it is found; no fd is left."""
    here, there = netns_factory(), netns_factory()
    with NetlinkSocket(netns_fd=here.fd) as sock:
        before = open_fds()
        assert nsid.id_of(sock, there.fd) is None
        here.run(["ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", there.name])
        link = rtnl.link_by_name(sock, "v0")
        assert link is not None
        number = nsid.id_of(sock, there.fd)
        assert number is not None
        assert number == link.link_netnsid
        found = nsid.find(sock, number)
        assert found is not None
        assert netns.same(found, there.fd)
        os.close(found)
        assert nsid.find(sock, number + 1000) is None
        assert open_fds() == before


def test_news_of_a_link_that_moved_say_where_it_is(netns_factory: NetnsFactory) -> None:
    """A link's ``del`` carries its new namespace's id and its number there; one that ended carries none."""
    here, there = netns_factory(), netns_factory()
    here.run(["ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"])
    with NetlinkSocket(netns_fd=here.fd) as sock, LinkMonitor(here.fd) as monitor:

        def gone(name: str) -> rtnl.LinkInfo:
            while True:
                wait_readable(monitor.fileno(), why=f"the end of {name}")
                for event in monitor.read():
                    if event.kind == "del" and event.link is not None and event.link.name == name:
                        return event.link

        here.run(["ip", "link", "set", "v0", "netns", there.name])
        moved = gone("v0")
        assert moved.new_netnsid == nsid.id_of(sock, there.fd)
        with NetlinkSocket(netns_fd=there.fd) as other:
            link = rtnl.link_by_index(other, moved.new_index)
        assert link is not None
        assert link.name == "v0"
        there.run(["ip", "link", "del", "v0"])
        ended = gone("v1")
        assert (ended.new_netnsid, ended.new_index) == (None, 0)
