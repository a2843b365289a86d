"""Carries out operations on devices that are somebody else's (plan.adopt_operations).

What is not ours is left: another's route, filter, qdisc or name is named in an error, and never replaced.
What takes away does nothing where the device is gone.
"""

from __future__ import annotations

import errno
import socket

from portwright.attach.veth import host_prefix
from portwright.kernel import clsact, rtnl, rtnl_bridge
from portwright.kernel.bpf import Direction
from portwright.kernel.netlink import Request
from portwright.model.errors import Conflict, NetlinkFailed, NotFound
from portwright.node.switch import PROGRAMS, Switch
from portwright.plan.adopt_operations import (
    AddWay,
    AnswerFor,
    AnswerNoMore,
    BorrowLink,
    CloseLink,
    DropWay,
    EnterBridge,
    LeaveBridge,
    ReturnLink,
)

#: Of the IPv4 route that stands behind the one with a source.
_BEHIND = 4096
_SCOPE_LINK = 253


def borrow(switch: Switch, operation: BorrowLink) -> int:
    """The device's ifindex. Raises Conflict where it is not what it was when the plan was made."""
    link = rtnl.link_by_index(switch.rtnl, operation.ifindex)
    bridge = rtnl.link_by_name(switch.rtnl, operation.bridge)
    if link is None or bridge is None or (link.name, link.master) != (operation.link, bridge.index):
        why = f"is not on bridge {operation.bridge} any more; nothing was moved, look again"
        raise Conflict("device", operation.link, why)
    names = (operation.rep, *operation.altnames)
    switch.rtnl.execute(
        [rtnl.link_set(bridge.index, mac=operation.bridge_mac), rtnl.altname_add(link.index, names)]
    )
    return link.index


def give_back(switch: Switch, operation: ReturnLink) -> None:
    """The name by which we find it goes last."""
    link = _link(switch, operation.rep)
    if link is None:
        return
    if not operation.clsact:
        clsact.drop_clsact(switch.rtnl, link.index)
    for name in (*operation.altnames, operation.rep):
        gone = (errno.ENOENT, errno.EINVAL, errno.ENODEV)
        switch.rtnl.execute([rtnl.altname_del(link.index, [name]).tolerating(*gone)])


def add_way(switch: Switch, operation: AddWay) -> None:
    """Raises Conflict where somebody else's route leads to the address."""
    link = _link(switch, operation.rep)
    if link is None:
        raise NotFound("representor", operation.rep)
    v4 = ":" not in operation.address
    dst, scope = host_prefix(operation.address), _SCOPE_LINK if v4 else None
    plain = rtnl.route_add(dst, oif=link.index, scope=scope)
    if operation.source:
        ours = rtnl.route_add(dst, oif=link.index, scope=scope, src=operation.source)
        try:
            _add_route(switch, link.index, dst, ours)
        except NetlinkFailed as error:
            if error.errno != errno.EINVAL:
                raise
            _add_route(switch, link.index, dst, plain)  # the host has no such address any more
        if v4:
            behind = rtnl.route_add(dst, oif=link.index, scope=scope, priority=_BEHIND)
            _add_route(switch, link.index, dst, behind)
    else:
        _add_route(switch, link.index, dst, plain)
    switch.rtnl.execute([rtnl.neigh_replace(link.index, operation.address, operation.mac, permanent=True)])


def drop_way(switch: Switch, operation: DropWay) -> None:
    """Routes and neighbour of this device alone."""
    link = _link(switch, operation.rep)
    if link is None:
        return
    dst = host_prefix(operation.address)
    for _ in range(2):
        switch.rtnl.execute([rtnl.route_del(dst, oif=link.index).tolerating(errno.ESRCH)])
    switch.rtnl.execute([rtnl.neigh_del(link.index, operation.address).tolerating(errno.ENOENT)])


def leave(switch: Switch, operation: LeaveBridge) -> None:
    """Raises NotFound where the device is gone."""
    link = _link(switch, operation.rep)
    if link is None:
        raise NotFound("representor", operation.rep)
    switch.rtnl.execute([rtnl.link_set(link.index, master=0)])


def enter(switch: Switch, operation: EnterBridge) -> None:
    """Nothing is done where it is on a bridge, or the bridge is gone."""
    link, bridge = _link(switch, operation.rep), rtnl.link_by_name(switch.rtnl, operation.bridge)
    if link is None or bridge is None or link.master or bridge.kind != "bridge":
        return
    switch.rtnl.execute([rtnl.link_set(link.index, master=bridge.index)])
    switch.rtnl.execute([rtnl_bridge.port_set(link.index, operation.settings)])


def answer_for(switch: Switch, operation: AnswerFor) -> None:
    """Nothing is done where the bridge is gone: then nobody asks there."""
    bridge = _bridge(switch, operation.bridge)
    if bridge is not None:
        switch.rtnl.execute([rtnl_bridge.answer_add(bridge, address) for address in operation.addresses])


def answer_no_more(switch: Switch, operation: AnswerNoMore) -> None:
    """Of these addresses on that bridge alone."""
    bridge = _bridge(switch, operation.bridge)
    if bridge is not None:
        ends = [rtnl_bridge.answer_del(bridge, address) for address in operation.addresses]
        switch.rtnl.execute([end.tolerating(errno.ENOENT) for end in ends])


def close(switch: Switch, operation: CloseLink) -> None:
    """Its sandbox has no carrier then."""
    link = _link(switch, operation.rep)
    if link is not None:
        switch.rtnl.execute([rtnl.link_set(link.index, up=False).tolerating(errno.ENODEV)])


def detach(switch: Switch, rep: str, direction: Direction) -> None:
    """Takes our filter off; a link by TCX goes with its pin."""
    link = _link(switch, rep)
    if link is not None:
        clsact.leave(switch.rtnl, link.index, direction, name=PROGRAMS[direction])


def _bridge(switch: Switch, name: str) -> int | None:
    link = rtnl.link_by_name(switch.rtnl, name)
    return link.index if link is not None and link.kind == "bridge" else None


def _link(switch: Switch, rep: str) -> rtnl.LinkInfo | None:
    """The device that carries the representor's name beside its own."""
    link = rtnl.link_by_name(switch.rtnl, rep)
    return link if link is not None and link.name != rep else None


def _add_route(switch: Switch, index: int, dst: str, request: Request) -> None:
    try:
        switch.rtnl.execute([request])
    except NetlinkFailed as error:
        if error.errno != errno.EEXIST:
            raise
        family = socket.AF_INET6 if ":" in dst else socket.AF_INET
        if not any(route.dst == dst for route in rtnl.routes(switch.rtnl, oif=index, family=family)):
            raise Conflict("route", dst, "somebody else's leads elsewhere; delete it first") from error
