"""What the ends of a microVM's port have: guest's card, tap, device and representor, as the kernel says."""

from __future__ import annotations

import os

from portwright.attach import tap
from portwright.kernel import ethtool, rtnl
from portwright.kernel.netlink import NetlinkSocket
from portwright.model.port import End, Port, PortState
from portwright.node.core import Core


def of(core: Core, port: Port) -> tuple[End, ...]:
    """From the guest outwards; none of a port without a tap or a device. An end that is gone is left out."""
    if not port.tap or port.state is not PortState.ATTACHED:
        return ()
    found = [End(end="guest", mac=port.mac, mtu=port.mtu, queues=port.queues, vnet_hdr=True)]
    fd = core.sandbox_fd(port) if port.model != tap.MODEL else None
    if fd is not None:
        try:
            with NetlinkSocket(netns_fd=fd) as sock:
                found += _read(sock, "tap", port.tap) + _read(sock, "device", port.ifname)
        finally:
            os.close(fd)
    switch = core.switch_of(port)
    if switch is not None:
        found += _read(switch.rtnl, "representor", port.rep_name)
    return tuple(found)


def _read(sock: NetlinkSocket, end: str, name: str) -> list[End]:
    link = rtnl.link_by_name(sock, name)
    queues = ethtool.queues(sock, link.name) if link is not None else None
    if link is None or queues is None:
        return []
    return [
        End(
            end=end,
            name=link.name,
            mac=link.mac,
            mtu=link.mtu,
            queues=queues.number,
            vnet_hdr=queues.vnet_hdr,
            offloads=ethtool.offloads(sock, link.name),
        )
    ]
