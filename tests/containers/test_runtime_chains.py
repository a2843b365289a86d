"""Portwright first in a chain of reference plugins, and with a reference IPAM plugin, in containerd."""

from __future__ import annotations

import pytest

from tests.fix_containerd import PAGE, Runtimes, addresses, own
from tests.fix_daemon import HOST4, WORLD4, WORLD6
from tests.fix_netns import TestNetns

pytestmark = pytest.mark.containers


def test_tuning_after_portwright(containerd: Runtimes) -> None:
    """The reference tuning plugin sets a sysctl and the MTU of our device; traffic and DEL still work."""
    tuning = {"type": "tuning", "sysctl": {"net.ipv4.conf.IFNAME.arp_filter": "1"}, "mtu": 1400}
    containerd.conflist("n1", own(), tuning)
    containerd.ctr_run("one", "sleep", "600")
    assert containerd.ctr_read("one", "cat", "/proc/sys/net/ipv4/conf/eth0/arp_filter").strip() == "1"
    assert "mtu 1400" in containerd.ctr_read("one", "ip", "link", "show", "eth0")
    for address in (WORLD4, WORLD6):
        containerd.ctr_exec("one", "ping", "-c", "1", "-W", "2", address)
    containerd.ctr_stop("one")
    containerd.nothing_left()


def test_portmap_after_portwright(containerd: Runtimes, world: TestNetns) -> None:
    """The reference portmap plugin publishes a port of ours: its iptables rules and our guard agree."""
    mapping = {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}
    portmap = {"type": "portmap", "runtimeConfig": {"portMappings": [mapping]}, "snat": True}
    containerd.conflist("n1", own(), portmap)
    containerd.ctr_serve("web")
    fetch = ["curl", "-s", "--max-time", "3", f"http://{HOST4}:8080/"]

    assert world.run(fetch).stdout == PAGE
    assert containerd.http(f"http://{HOST4}:8080/") == PAGE
    containerd.ctr_stop("web")
    assert world.run(fetch, check=False).returncode != 0
    assert "8080" not in containerd.run("iptables-save", "-t", "nat")


def test_bandwidth_after_portwright(containerd: Runtimes) -> None:
    """The reference bandwidth plugin puts its qdisc on our representor, and what the host sends is shaped.

    Between ports of this host packets don't pass the representor's qdisc: docs/limitations.md.
    """
    shaping = {"type": "bandwidth", "ingressRate": 8_000_000, "ingressBurst": 800_000}
    containerd.conflist("n1", own(), shaping)
    port = containerd.ctr_run("one", "sleep", "600")
    assert "tbf" in containerd.run("tc", "qdisc", "show", "dev", port.rep_name)
    for address in addresses(port):
        containerd.run("ping", "-c", "1", "-W", "2", address)
    containerd.ctr_stop("one")
    containerd.nothing_left()


def test_host_local_as_ipam(containerd: Runtimes) -> None:
    """Addresses of the reference host-local plugin are used, guarded, and given back to it at DEL."""
    data = str(containerd.work / "networks")  # the daemon runs the delegate, outside of the box
    ipam = {
        "type": "host-local",
        "dataDir": data,
        "ranges": [[{"subnet": "10.68.0.0/24"}], [{"subnet": "fd68::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    }
    containerd.conflist("foreign", own(ipam=ipam, ipMasq=True))
    web = containerd.ctr_serve("web")
    containerd.ctr_run("client", "sleep", "600")
    four, six = addresses(web)
    assert four.startswith("10.68.0.")
    assert six.startswith("fd68::")
    held = containerd.work / "networks/foreign"
    assert {four, six} <= {entry.name for entry in held.iterdir()}
    for url in (f"http://{four}/", f"http://[{six}]/"):
        assert containerd.ctr_read("client", "timeout", "5", "wget", "-q", "-O", "-", url) == PAGE
    for restart in (False, True):
        if restart:
            containerd.daemon.kill()
            containerd.daemon.start()
        for address in (WORLD4, WORLD6):  # they have no route back: ipMasq holds for foreign addresses
            containerd.ctr_exec("client", "ping", "-c", "1", "-W", "2", address)
    containerd.ctr_stop("web")
    assert four not in {entry.name for entry in held.iterdir()}
    containerd.ctr_stop("client")
    containerd.nothing_left()
    assert "10.68.0." not in containerd.run("nft", "list", "ruleset")


def test_ranges_of_the_runtime_are_masqueraded_too(containerd: Runtimes) -> None:
    """An address from runtimeConfig.ipRanges, outside of the network's own ranges, reaches the world."""
    wish = {"ipRanges": [[{"subnet": "10.69.0.0/24"}]]}
    containerd.conflist("n1", own(runtimeConfig=wish))
    port = containerd.ctr_run("one", "sleep", "600")
    assert "10.69.0.2" in {a.address for a in port.addresses}
    containerd.ctr_exec("one", "ping", "-c", "1", "-W", "2", WORLD4)
    containerd.ctr_stop("one")
    containerd.nothing_left()
    assert "10.69.0." not in containerd.run("nft", "list", "ruleset")
