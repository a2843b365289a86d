"""Taps of ports: made, joined with the device, told an MTU, deleted; in a sandbox's namespace."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from portwright.kernel import clsact, netns, rtnl, tap
from portwright.kernel.bpf import Collection, CollectionSpec, Program
from portwright.kernel.netlink import NetlinkSocket
from portwright.model.errors import NotFound, NotSupported
from portwright.node.sandbox import Sandbox, find
from portwright.plan.tap_operations import CreateTap, DeleteTap, JoinLinks

OBJECT = Path(__file__).parent.parent / "dataplane" / "join.bpf.o"
PROGRAM = "pw_join"
#: What tc_classid holds (include/net/sch_generic.h, struct qdisc_skb_cb).
_MOST = 0xFFFF


def create(sandbox: Sandbox, operation: CreateTap) -> None:
    """Raises Conflict where the name is taken; then nothing is made."""
    tap.create(sandbox.fd, operation.tap, multi_queue=operation.queues > 1)
    sandbox.rtnl.execute(
        [
            rtnl.link_set(operation.tap, mtu=operation.mtu),
            rtnl.link_set(operation.tap, addrgenmode="none").tolerating(errno.EAFNOSUPPORT),
            rtnl.link_set(operation.tap, up=True),
        ]
    )


def load() -> Program:
    """The program of :func:`join`; the caller closes it."""
    with contextlib.closing(Collection.load(CollectionSpec.load(OBJECT))) as collection:
        return Program(os.dup(collection.programs[PROGRAM].fd), PROGRAM)


def join(sandbox: Sandbox, operation: JoinLinks, program: Program) -> None:
    """Raises Conflict where another's qdisc or filter is in the way, and leaves that alone."""
    indexes = [_index(sandbox, name) for name in (operation.device, operation.tap)]
    for index, other in zip(indexes, reversed(indexes), strict=True):
        clsact.ensure_clsact(sandbox.rtnl, index)
        clsact.attach_bpf(
            sandbox.rtnl,
            index,
            "ingress",
            program.fd,
            name=PROGRAM,
            pref=clsact.OUR_PREF,
            handle=clsact.OUR_HANDLE,
            class_id=other,
        )


def delete(operation: DeleteTap) -> None:
    """Nothing is done where the namespace, or the tap in it, is gone."""
    fd = find(operation.sandbox, netns.boot_id())
    if fd is None:
        return
    try:
        with NetlinkSocket(netns_fd=fd) as sock:
            link = rtnl.link_by_name(sock, operation.tap)
            if link is not None and (link.name, link.kind) == (operation.tap, "tun"):
                sock.execute([rtnl.link_del(link.index).tolerating(errno.ENODEV)])
    finally:
        os.close(fd)


def lacks(sock: NetlinkSocket, device: rtnl.LinkInfo, name: str) -> list[str]:
    """What a tap and its way to the device and back lack, as sentences; [] is well."""
    link = rtnl.link_by_name(sock, name)
    if link is None:
        return [f"tap {name} is gone from the sandbox"]
    problems = [] if link.up else [f"tap {name} is down in the sandbox"]
    if link.mtu != device.mtu:
        problems.append(f"tap {name} has MTU {link.mtu}, and {device.name} {device.mtu}")
    for one in (device, link):
        filters = clsact.list_filters(sock, one.index, "ingress")
        if not any(
            (f.pref, f.handle, f.name) == (clsact.OUR_PREF, clsact.OUR_HANDLE, PROGRAM) for f in filters
        ):
            problems.append(f"{one.name} is not joined: its filter is gone")
    return problems


def _index(sandbox: Sandbox, name: str) -> int:
    link = rtnl.link_by_name(sandbox.rtnl, name)
    if link is None:
        raise NotFound("device", name)
    if link.index > _MOST:
        raise NotSupported("tcfilter", "join", f"{name} has the number {link.index}, over {_MOST}")
    return link.index
