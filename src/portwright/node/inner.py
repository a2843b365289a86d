"""Carries out plan.inner_operations: on a bridge inside a sandbox, which is found by its record."""

from __future__ import annotations

from portwright.kernel import clsact, rtnl, rtnl_bridge
from portwright.model.errors import Conflict
from portwright.model.port import InnerBridge
from portwright.node import taps
from portwright.node.sandbox import Sandbox, inside
from portwright.plan.inner_operations import BypassBridge, DropBridge, MakeBridge, UseBridge
from portwright.plan.tap_operations import JoinLinks


def bypass(operation: BypassBridge, joiner: taps.Joiner) -> None:
    """Raises Conflict where the two are not what they were, or another's qdisc or filter is in the way."""
    inner = operation.inner
    with inside(operation.sandbox) as sandbox:
        if sandbox is None or not _whole(sandbox, inner):
            why = f"{inner.device} and {inner.tap} are not joined by it any more; nothing was moved"
            raise Conflict("bridge", inner.bridge, why)
        taps.join(sandbox, JoinLinks(device=inner.device, tap=inner.tap), joiner)


def use(operation: UseBridge) -> None:
    """Takes off what :func:`bypass` put on, and a clsact that came with it."""
    inner = operation.inner
    with inside(operation.sandbox) as sandbox:
        if sandbox is None:
            return
        for index, theirs in ((inner.device_index, inner.device_clsact), (inner.tap_index, inner.tap_clsact)):
            clsact.leave(sandbox.rtnl, index, "ingress", name=taps.PROGRAM)
            if not theirs:
                clsact.drop_clsact(sandbox.rtnl, index)


def drop(operation: DropBridge) -> None:
    """Nothing where it is gone; another device of the name stays."""
    with inside(operation.sandbox) as sandbox:
        link = rtnl.link_by_name(sandbox.rtnl, operation.inner.bridge) if sandbox is not None else None
        if sandbox is not None and link is not None and link.kind == "bridge":
            sandbox.rtnl.execute([rtnl.link_del(link.index)])


def make(operation: MakeBridge) -> None:
    """Nothing where it is there, or the sandbox or one of the two is gone."""
    inner = operation.inner
    with inside(operation.sandbox) as sandbox:
        if sandbox is None or rtnl.link_by_name(sandbox.rtnl, inner.bridge) is not None:
            return
        links = [rtnl.link_by_index(sandbox.rtnl, n) for n in (inner.device_index, inner.tap_index)]
        if None in links:
            return
        sandbox.rtnl.execute([rtnl_bridge.bridge_create(inner.bridge, inner.bridge_mac)])
        made = rtnl.link_by_name(sandbox.rtnl, inner.bridge)
        if made is not None:
            ports = [rtnl.link_set(link.index, master=made.index) for link in links if link is not None]
            sandbox.rtnl.execute([*ports, rtnl.link_set(made.index, up=True)])


def _whole(sandbox: Sandbox, inner: InnerBridge) -> bool:
    bridge = rtnl.link_by_name(sandbox.rtnl, inner.bridge)
    links = [rtnl.link_by_index(sandbox.rtnl, n) for n in (inner.device_index, inner.tap_index)]
    names = [(link.name, link.master) for link in links if link is not None]
    return bridge is not None and names == [(inner.device, bridge.index), (inner.tap, bridge.index)]
