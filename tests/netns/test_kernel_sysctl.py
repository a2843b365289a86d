"""Sysctls in any namespace."""

from __future__ import annotations

import errno

import pytest

from portwright.kernel import rtnl, sysctl
from portwright.kernel.netlink import NetlinkSocket
from portwright.model.errors import InvalidInput, KernelFailed
from tests.fix_netns import NetnsFactory

pytestmark = pytest.mark.netns


def test_a_value_is_written_in_its_namespace_only(netns_factory: NetnsFactory) -> None:
    """One namespace's value changes; the other's and ours do not."""
    one, two = netns_factory(), netns_factory()
    ours = sysctl.read("net/ipv4/ip_forward")
    sysctl.write("net/ipv4/ip_forward", 1, one.fd)
    sysctl.write("net/ipv4/ip_forward", "0", two.fd)
    assert sysctl.read("net/ipv4/ip_forward", one.fd) == "1"
    assert sysctl.read("net/ipv4/ip_forward", two.fd) == "0"
    assert sysctl.read("net/ipv4/ip_forward") == ours


def test_a_device_name_may_hold_dots(netns_factory: NetnsFactory) -> None:
    """``eth0.100`` is one part of the path, as slashes separate."""
    ns = netns_factory()
    with NetlinkSocket(netns_fd=ns.fd) as sock:
        mac = "02:00:00:00:00:01"
        sock.execute(
            [rtnl.veth_create("eth0.100", mac=mac, mtu=1500, peer_name="p", peer_mac=mac, peer_mtu=1500)]
        )
    sysctl.write("net/ipv4/conf/eth0.100/forwarding", 1, ns.fd)
    assert sysctl.read("net/ipv4/conf/eth0.100/forwarding", ns.fd) == "1"


@pytest.mark.parametrize(
    "path", ["net/../../etc/passwd", "/etc/passwd", "net//ipv4", "", ".", "net/ipv4/a\0b", "net/"]
)
def test_a_path_cannot_lead_out(path: str) -> None:
    """Empty parts, ``.`` and ``..`` are refused before anything is opened."""
    with pytest.raises(InvalidInput):
        sysctl.read(path)


def test_the_kernels_refusals_are_named(netns_factory: NetnsFactory) -> None:
    """ENOENT for a device that is not there, EINVAL for a value it won't take, both with the command."""
    ns = netns_factory()
    with pytest.raises(KernelFailed) as missing:
        sysctl.read("net/ipv4/conf/nobody/forwarding", ns.fd)
    assert missing.value.errno == errno.ENOENT
    with pytest.raises(KernelFailed) as refused:
        sysctl.write("net/ipv4/ip_forward", "perhaps", ns.fd)
    assert refused.value.errno == errno.EINVAL
    assert refused.value.what == "sysctl -w net/ipv4/ip_forward=perhaps"
