"""A host endpoint's interface on the private host, and a namespace behind it for all that is outside.

There is one at a time: what several endpoints call outside is the same addresses.
"""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

from portwright.kernel import netns, private, rtnl
from portwright.kernel.netlink import NetlinkSocket
from portwright.live.ears import HOST, OUTSIDE, Place, ProbeFailed
from portwright.policy.host.stages import EVERY
from portwright.policy.manifests.calico_hosts import HOST_INTERFACE
from portwright.policy.rules import Endpoint

#: Of an endpoint that names none.
_NAME: Final = "live0"
_FAR: Final = "w0"
_MACS: Final = ("02:70:77:00:00:01", "02:70:77:00:00:02")
_MTU: Final = 1500
#: By which outside reaches all else: nobody's addresses, of which the MAC is known.
_GATEWAYS: Final = {"0.0.0.0/0": "169.254.112.119", "::/0": "fe80::7077"}
#: Seconds for the kernel's link watch to see the carrier, until which the interface loses what it is given.
_UP_WITHIN: Final = 10.0


class Uplink:
    """Made in the namespace of this thread, the private host's. ``places``: where each address is."""

    def __init__(self, endpoint: Endpoint, own: Iterable[str], outside: Iterable[str]) -> None:
        """``own``: the host's addresses there. Raises KernelFailed, and ProbeFailed where it stays down."""
        named = endpoint.labels.get(HOST_INTERFACE, EVERY)
        self._name = _NAME if named == EVERY else named
        self._host, self._far = netns.self_fd(), -1
        self._sock = NetlinkSocket()
        try:
            self._far = private.new_netns()
            self._build(tuple(own), tuple(outside))
        except BaseException:
            self.close()
            raise
        self.places = {address: Place(self._host, HOST) for address in own}
        self.places |= {address: Place(self._far, OUTSIDE) for address in outside}

    def _build(self, own: tuple[str, ...], outside: tuple[str, ...]) -> None:
        near_mac, far_mac = _MACS
        pair = rtnl.veth_create(
            self._name,
            mac=near_mac,
            mtu=_MTU,
            peer_name=_FAR,
            peer_mac=far_mac,
            peer_mtu=_MTU,
            peer_netns_fd=self._far,
        )
        self._sock.execute([pair])
        with NetlinkSocket(netns_fd=self._far) as there:
            for sock, name, mine, theirs, mac in (
                (there, _FAR, outside, own, near_mac),
                (self._sock, self._name, own, outside, far_mac),
            ):
                link = rtnl.link_by_name(sock, name)
                if link is None:
                    raise ProbeFailed(name, "the link is gone as soon as it was made")
                sock.execute([rtnl.link_set(link.index, addrgenmode="none", up=True)])
                sock.execute([rtnl.addr_add(link.index, _alone(address)) for address in mine])
                # No question who has an address: nothing is lost while it is asked.
                gateways = _GATEWAYS if sock is there else {}
                known = (*theirs, *gateways.values())
                sock.execute([rtnl.neigh_replace(link.index, address, mac) for address in known])
                sock.execute([rtnl.route_replace(_alone(address), oif=link.index) for address in theirs])
                for net, gateway in gateways.items():
                    sock.execute([rtnl.route_replace(net, oif=link.index, gw=gateway, onlink=True)])
        self._await_carrier()

    def _await_carrier(self) -> None:
        deadline = time.monotonic() + _UP_WITHIN
        with NetlinkSocket(netns_fd=self._far) as there:
            while time.monotonic() < deadline:
                ends = (rtnl.link_by_name(there, _FAR), rtnl.link_by_name(self._sock, self._name))
                if all(end is not None and end.operstate == "up" for end in ends):
                    return
        raise ProbeFailed(self._name, f"is not up after {_UP_WITHIN:g} s")

    def close(self) -> None:
        """Nothing of it is left."""
        try:
            link = rtnl.link_by_name(self._sock, self._name)
            if link is not None and self._far >= 0:
                self._sock.execute([rtnl.link_del(link.index)])
        finally:
            self._release()

    def _release(self) -> None:
        self._sock.close()
        for fd in (self._far, self._host):
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> Self:
        """Return self; closed on exit."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def _alone(address: str) -> str:
    return str(ipaddress.ip_network(address))
