"""The attachment model ``tcfilter``: a veth whose end in the sandbox's namespace is joined with a tap.

For a hypervisor in a namespace that a container runtime made. The device there keeps its name, MAC and
addresses, as runtimes look at them; what arrives on it goes out on the tap, to the guest, and what the guest
sends leaves by it, to the representor. The namespace's own stack sees none of it. The guest's card has the
device's MAC, so the guard holds the guest to what is recorded of the port.
"""

from __future__ import annotations

from portwright.attach import veth
from portwright.model.port import Port
from portwright.plan.operations import CreateTap, DeleteLink, DeleteTap, JoinLinks, NameLink, Operation

MODEL = "tcfilter"


def attach(port: Port) -> tuple[Operation, ...]:
    """As ``veth.attach``; joined before either end is up, so that the namespace's stack hears nothing."""
    ops: list[Operation] = []
    for operation in veth.attach(port):
        ops.append(operation)
        if isinstance(operation, NameLink):
            ops.append(CreateTap(tap=port.tap, mtu=port.mtu, queues=port.queues, sandbox=port.sandbox))
            ops.append(JoinLinks(device=port.ifname, tap=port.tap))
    return tuple(ops)


def detach(port: Port) -> tuple[Operation, ...]:
    """As ``veth.detach``, and the tap goes."""
    ops: list[Operation] = []
    for operation in veth.detach(port):
        ops.append(operation)
        if isinstance(operation, DeleteLink):
            ops.append(DeleteTap(tap=port.tap, sandbox=port.sandbox))
    return tuple(ops)
