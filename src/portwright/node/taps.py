"""Taps of ports: made, joined with the device, told an MTU, deleted; in a sandbox's namespace."""

from __future__ import annotations

import errno
from pathlib import Path

from portwright.attach import tcfilter
from portwright.kernel import clsact, macvtap, rtnl, sysctl, tap, u32
from portwright.kernel.bpf import Collection, CollectionSpec, Program
from portwright.kernel.netlink import NetlinkSocket
from portwright.model.errors import KernelFailed, NotFound, NotSupported
from portwright.node import clones
from portwright.node.sandbox import Sandbox, inside
from portwright.plan.tap_operations import (
    AdoptLink,
    CreateHostTap,
    CreateMacvtap,
    CreateTap,
    DeleteTap,
    JoinLinks,
    PartLinks,
)

OBJECT = Path(__file__).parent.parent / "dataplane" / "join.bpf.o"
#: Both filters' name, the program of the device's, and of the tap's but for "peer"; then that one's.
PROGRAM, PEER_PROGRAM = "pw_join", "pw_join_peer"
#: What tc_classid holds (include/net/sch_generic.h, struct qdisc_skb_cb).
_MOST = 0xFFFF


def create(sandbox: Sandbox, operation: CreateTap) -> None:
    """Raises Conflict where the name is taken; then nothing is made."""
    tap.create(
        sandbox.fd,
        operation.tap,
        multi_queue=operation.queues > 1,
        uid=operation.uid,
        gid=operation.gid,
    )
    sandbox.rtnl.execute(
        [
            # It has a queue of its own, which the guest empties: what waits before that one only costs.
            clsact.without_queue(_index(sandbox, operation.tap)),
            rtnl.link_set(operation.tap, mac=operation.mac or None, mtu=operation.mtu),
            rtnl.link_set(operation.tap, addrgenmode="none").tolerating(errno.EAFNOSUPPORT),
            rtnl.link_set(operation.tap, up=True),
        ]
    )


def create_host(switch_fd: int, operation: CreateHostTap) -> None:
    """As :func:`create`, in the host's namespace. It is known as ours from its first moment."""
    tap.create(switch_fd, operation.rep, multi_queue=operation.queues > 1, mac=operation.gateway_mac)


def create_macvtap(sandbox: Sandbox, operation: CreateMacvtap) -> None:
    """Raises NetlinkFailed where the name is taken, or another macvlan is on the device."""
    lower = rtnl.link_by_name(sandbox.rtnl, operation.device)
    if lower is None:
        raise NotFound("device", operation.device)
    sandbox.rtnl.execute(
        [macvtap.create(operation.tap, lower=lower.index, mtu=operation.mtu, queues=operation.queues)]
    )
    # What comes while nobody has it open goes on to the namespace's stack (drivers/net/tap.c,
    # tap_handle_frame), which has the addresses: IPv6 is off on it, and for IPv4 the way back is by the
    # device and not by it.
    try:
        sysctl.write(f"net/ipv6/conf/{operation.tap}/disable_ipv6", "1", netns_fd=sandbox.fd)
    except KernelFailed as error:
        if error.errno != errno.ENOENT:  # a kernel without IPv6
            raise
    sysctl.write(f"net/ipv4/conf/{operation.tap}/rp_filter", "1", netns_fd=sandbox.fd)
    sandbox.rtnl.execute([rtnl.link_set(operation.tap, up=True)])


class Joiner:
    """The programs of :func:`join`, for all ports."""

    def __init__(self) -> None:
        self._collection = Collection.load(CollectionSpec.load(OBJECT))

    def of_tap(self, join: str) -> Program:
        """What a tap's filter runs."""
        return self._collection.programs[PEER_PROGRAM if join == tcfilter.PEER else PROGRAM]

    @property
    def of_device(self) -> Program:
        """What a device's filter runs."""
        return self._collection.programs[PROGRAM]

    def close(self) -> None:
        """Filters keep their programs."""
        self._collection.close()


def join(sandbox: Sandbox, operation: JoinLinks, joiner: Joiner) -> None:
    """Raises Conflict where another's qdisc or filter is in the way, and leaves that alone."""
    device, tap = (_index(sandbox, name) for name in (operation.device, operation.tap))
    ways = ((device, tap, joiner.of_device), (tap, device, joiner.of_tap(operation.join)))
    for one, other, program in ways:
        clsact.join(sandbox.rtnl, one, program.fd, name=PROGRAM, class_id=other)


def redirect(sandbox: Sandbox, operation: JoinLinks) -> None:
    """As :func:`join`, by u32 and mirred. Raises NotSupported where the kernel has not both."""
    indexes = [_index(sandbox, name) for name in (operation.device, operation.tap)]
    for index, other in zip(indexes, reversed(indexes), strict=True):
        clsact.ensure_clsact(sandbox.rtnl, index)
        u32.attach_redirect(sandbox.rtnl, index, other, pref=clsact.OUR_PREF, handle=clsact.OUR_HANDLE)


def adopt(sandbox: Sandbox, operation: AdoptLink, joiner: Joiner) -> None:
    """As :func:`join`. Raises NotFound where another device has the name by now."""
    link = rtnl.link_by_name(sandbox.rtnl, operation.device)
    if link is None or link.index != operation.index:
        raise NotFound("device", operation.device)
    join(sandbox, JoinLinks(device=operation.device, tap=operation.tap), joiner)


def part(operation: PartLinks) -> None:
    """Nothing is done where the namespace, or that very device in it, is gone; it may have another name."""
    with inside(operation.sandbox) as sandbox:
        link = rtnl.link_by_index(sandbox.rtnl, operation.index) if sandbox is not None else None
        if sandbox is None or link is None:
            return
        clsact.leave(sandbox.rtnl, link.index, "ingress", name=PROGRAM)
        if operation.clsact:
            clsact.drop_clsact(sandbox.rtnl, link.index)


def delete(operation: DeleteTap) -> None:
    """Nothing is done where the namespace, or the tap in it, is gone."""
    with inside(operation.sandbox) as sandbox:
        link = rtnl.link_by_name(sandbox.rtnl, operation.tap) if sandbox is not None else None
        if sandbox is not None and link is not None and (link.name, link.kind) == (operation.tap, "tun"):
            sandbox.rtnl.execute([rtnl.link_del(link.index).tolerating(errno.ENODEV)])


def lacks(sock: NetlinkSocket, device: rtnl.LinkInfo, name: str) -> list[str]:
    """What a tap and its way to the device and back lack, as sentences; [] is well."""
    link = rtnl.link_by_name(sock, name)
    if link is None:
        return [f"tap {name} is gone from the sandbox"]
    problems = [] if link.up else [f"tap {name} is down in the sandbox"]
    if link.mtu != device.mtu:
        problems.append(f"tap {name} has MTU {link.mtu}, and {device.name} {device.mtu}")
    for one, other in ((device, link), (link, device)):
        filters = clsact.list_filters(sock, one.index, "ingress")
        slot = (clsact.OUR_PREF, clsact.OUR_HANDLE)
        joined = any((f.pref, f.handle) == slot and f.name in (PROGRAM, clones.PROGRAM) for f in filters)
        if not joined and u32.redirect(sock, one.index, pref=slot[0], handle=slot[1]) != other.index:
            problems.append(f"{one.name} is not joined: its filter is gone")
    return problems


def lacks_macvtap(sock: NetlinkSocket, device: rtnl.LinkInfo, name: str) -> list[str]:
    """What a macvtap on the device lacks, as sentences; [] is well."""
    link = rtnl.link_by_name(sock, name)
    if link is None or (link.kind, link.link_index) != (macvtap.KIND, device.index):
        return [f"macvtap {name} is gone from {device.name}"]
    problems = [] if link.up else [f"macvtap {name} is down in the sandbox"]
    if link.mtu != device.mtu:
        problems.append(f"macvtap {name} has MTU {link.mtu}, and {device.name} {device.mtu}")
    if link.mac != device.mac:
        problems.append(f"macvtap {name} has MAC {link.mac}, and {device.name} {device.mac}")
    return problems


def _index(sandbox: Sandbox, name: str) -> int:
    link = rtnl.link_by_name(sandbox.rtnl, name)
    if link is None:
        raise NotFound("device", name)
    if link.index > _MOST:
        raise NotSupported("tcfilter", "join", f"{name} has the number {link.index}, over {_MOST}")
    return link.index
