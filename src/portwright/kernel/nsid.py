"""Network namespaces by the number under which another one knows them (``ip netns list-id``).

The kernel names a namespace to another by such an id: where a veth's peer is (IFLA_LINK_NETNSID), or
where a link went (IFLA_NEW_NETNSID). Source: net/core/net_namespace.c, include/uapi/linux/net_namespace.h.
"""

from __future__ import annotations

import os

from portwright.kernel import netns
from portwright.kernel.netlink import NetlinkSocket, Request
from portwright.kernel.nlattr import attr_u32, get_u32, parse_attrs
from portwright.model.errors import PortwrightError

_RTM_GETNSID = 90
_NETNSA_NSID, _NETNSA_FD = 1, 3
_RTGENMSG = bytes(4)  # family unspecified, padded
_NONE = 0xFFFFFFFF  # NETNSA_NSID_NOT_ASSIGNED, -1


def id_of(sock: NetlinkSocket, fd: int) -> int | None:
    """Return the id that the socket's namespace has for the one behind ``fd``, None if it has none."""
    request = Request(
        _RTM_GETNSID, 0, _RTGENMSG + attr_u32(_NETNSA_FD, fd), f"ip netns list-id nsid-of fd {fd}"
    )
    (replies,) = sock.execute([request])
    for message in replies:
        found = get_u32(parse_attrs(message.body, len(_RTGENMSG)), _NETNSA_NSID, _NONE)
        return None if found == _NONE else found
    return None


def find(sock: NetlinkSocket, nsid: int) -> int | None:
    """Return a descriptor (the caller closes it) of the namespace with that id, None if it can't be found.

    Searches like ``netns.find_by_cookie``, a request for each namespace.
    """
    for fd in netns.living():
        try:
            if id_of(sock, fd) == nsid:
                return os.dup(fd)
        except PortwrightError:
            continue  # ended meanwhile
    return None
