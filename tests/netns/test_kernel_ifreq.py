"""What netdevice(7)'s ioctls answer, against what rtnetlink says of the same devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from portwright.kernel import ifreq, rtnl
from portwright.kernel.netlink import NetlinkSocket
from tests.fix_netns import TestNetns

pytestmark = pytest.mark.netns


def test_name_and_mtu_are_rtnetlinks(netns_factory: Callable[[], TestNetns]) -> None:
    """Of every device of a namespace, asked for from outside of it; a name of 15 bytes too."""
    ns = netns_factory()
    ns.run(["ip", "link", "add", "abcdefghijklmno", "mtu", "1280", "type", "veth"])
    with ns.entered():
        sock = NetlinkSocket()
    with sock:
        told = {(link.index, link.name, link.mtu) for link in rtnl.links(sock)}
        asked = {(i, name := ifreq.name(sock, i), ifreq.mtu(sock, name or "")) for i, _, _ in told}

    assert asked == told
    assert ("abcdefghijklmno", 1280) in {row[1:] for row in told}


def test_what_is_not_there_is_none(netns_factory: Callable[[], TestNetns]) -> None:
    """A number or name without a device is no error."""
    ns = netns_factory()
    with ns.entered():
        sock = NetlinkSocket()
    with sock:
        assert ifreq.name(sock, 4711) is None
        assert ifreq.mtu(sock, "nobody") is None
