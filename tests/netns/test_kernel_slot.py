"""What a whole slot costs by raw batches. Prints figures (``-s``); asserts only the order of magnitude."""

from __future__ import annotations

import time

import pytest

from portwright.kernel import rtnl
from portwright.kernel.netlink import NetlinkSocket
from tests.fix_netns import NetnsFactory

pytestmark = pytest.mark.netns
GW_MAC, ROUNDS = "ee:ee:ee:ee:ee:ee", 30


def test_a_slot_costs_a_few_milliseconds(netns_factory: NetnsFactory) -> None:
    """Veth, alias and altnames, 2 addresses, 6 routes, 4 neighbours, up; then the delete: medians."""
    host = netns_factory()
    made, deleted = [], []
    with NetlinkSocket(netns_fd=host.fd) as h:
        for number in range(ROUNDS):
            sandbox = netns_factory()
            mac = f"02:00:00:00:00:{number:02x}"
            start = time.perf_counter()
            with NetlinkSocket(netns_fd=sandbox.fd) as s:
                replies = h.execute(
                    [
                        rtnl.veth_create(
                            "pw1",
                            mac=GW_MAC,
                            mtu=1500,
                            peer_name="eth0",
                            peer_mac=mac,
                            peer_mtu=1500,
                            peer_netns_fd=sandbox.fd,
                        ),
                        rtnl.link_set("pw1", addrgenmode="none", alias="port 1"),
                        rtnl.altname_add("pw1", ["port-1", "workload-1"]),
                        rtnl.link_set("pw1", up=True),
                        rtnl.link_get("pw1"),
                    ]
                )
                rep = rtnl.parse_link(replies[-1][0])
                assert rep is not None
                dev = rep.link_index
                s.execute(
                    [
                        rtnl.link_set(dev, addrgenmode="none"),
                        rtnl.link_set(dev, up=True),
                        rtnl.addr_add(dev, "10.0.0.2/32"),
                        rtnl.addr_add(dev, "fd00::2/128"),
                        rtnl.route_add("169.254.1.1/32", oif=dev),
                        rtnl.route_add("0.0.0.0/0", oif=dev, gw="169.254.1.1"),
                        rtnl.route_add("fe80::1/128", oif=dev),
                        rtnl.route_add("::/0", oif=dev, gw="fe80::1"),
                        rtnl.neigh_replace(dev, "169.254.1.1", GW_MAC),
                        rtnl.neigh_replace(dev, "fe80::1", GW_MAC),
                    ]
                )
            h.execute(
                [
                    rtnl.route_add("10.0.0.2/32", oif=rep.index),
                    rtnl.route_add("fd00::2/128", oif=rep.index),
                    rtnl.neigh_replace(rep.index, "10.0.0.2", mac),
                    rtnl.neigh_replace(rep.index, "fd00::2", mac),
                ]
            )
            middle = time.perf_counter()
            h.execute([rtnl.link_del(rep.index)])
            deleted.append(time.perf_counter() - middle)
            made.append(middle - start)
    for what, times in (("slot made", made), ("slot deleted", deleted)):
        times.sort()
        low, median, high = times[0] * 1e3, times[len(times) // 2] * 1e3, times[-1] * 1e3
        print(f"\n{what}: median {median:.2f} ms (min {low:.2f}, max {high:.2f}, {ROUNDS} rounds)", end="")
    assert made[len(made) // 2] < 0.1
