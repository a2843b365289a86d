"""The attachment model ``adopt``: the device is somebody else's, moved off its bridge while its sandbox ran.

Its host end, a veth's end or a tap, is the representor. It is guarded, entered and reachable while it still
is a port of the bridge: our programs see a packet before the bridge does. So leaving it is the last step, and
there is no step at which packets have no way. Where the port ends, the device is left without a carrier.
"""

from __future__ import annotations

from portwright.attach import veth
from portwright.model.errors import InternalError
from portwright.model.port import Adopted, InnerBridge, Port
from portwright.plan.adopt_operations import (
    AnswerFor,
    AnswerNoMore,
    BorrowLink,
    CloseLink,
    LeaveBridge,
    ReturnLink,
)
from portwright.plan.inner_operations import BypassBridge, DropBridge, UseBridge
from portwright.plan.operations import Operation, undo
from portwright.plan.path_operations import DetachProgram, RemovePort, RemoveTargets

MODEL = "adopt"


def take_over(port: Port) -> tuple[Operation, ...]:
    """The plan that makes the port of a sandbox that is on a bridge, and leaves it on the bridge."""
    adopted = of(port)
    return (
        BorrowLink(
            link=adopted.link,
            ifindex=port.rep_ifindex,
            bridge=adopted.bridge,
            bridge_mac=adopted.bridge_mac,
            rep=port.rep_name,
            altnames=veth.altnames(port),
            clsact=adopted.clsact,
        ),
        *veth.guarded(port),
        *veth.reach(port),
        *(BypassBridge(inner=one, sandbox=port.sandbox) for one in _inner(port)),
        veth.targets(port),
    )


def leave(port: Port) -> tuple[Operation, ...]:
    """What follows once every sandbox of the bridge was taken over."""
    adopted = of(port)
    return (
        LeaveBridge(rep=port.rep_name, bridge=adopted.bridge, settings=adopted.settings),
        *(DropBridge(inner=one, sandbox=port.sandbox) for one in _inner(port)),
        AnswerFor(bridge=adopted.bridge, addresses=_addresses(port)),
    )


def give_back(port: Port) -> tuple[Operation, ...]:
    """The plan that takes both back, whatever part of them was applied."""
    return undo((*take_over(port), *leave(port)))


def detach(port: Port) -> tuple[Operation, ...]:
    """The plan that ends the port on its device: closed first, so that nothing passes unguarded."""
    sides = ("ingress", "egress")
    return (
        RemoveTargets(port_id=port.port_id, addresses=_addresses(port)),
        AnswerNoMore(bridge=of(port).bridge, addresses=_addresses(port)),
        CloseLink(rep=port.rep_name),
        *(DetachProgram(port_id=port.port_id, direction=side, rep=port.rep_name) for side in sides),
        RemovePort(rep=port.rep_name, port_id=port.port_id, ifindex=port.rep_ifindex),
        ReturnLink(rep=port.rep_name, altnames=veth.altnames(port), clsact=of(port).clsact),
        *(UseBridge(inner=one, sandbox=port.sandbox) for one in _inner(port)),
    )


def _addresses(port: Port) -> tuple[str, ...]:
    return tuple(a.address for a in port.addresses)


def _inner(port: Port) -> tuple[InnerBridge, ...]:
    inner = of(port).inner
    return () if inner is None else (inner,)


def of(port: Port) -> Adopted:
    """What its device was before; InternalError for a port of another model."""
    if port.adopted is None:
        raise InternalError(f"port {port.port_id} has no adopted device")
    return port.adopted
