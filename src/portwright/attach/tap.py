"""The attachment model ``tap``: the tap is the device, and its host end the representor.

For a hypervisor that opens its tap in the host's namespace, whatever namespace it runs in: that one is the
sandbox by its identity alone, and nothing is put there. A tap has a carrier while somebody holds it open, so
there is nothing to wait for. The guard's programs sit on the tap itself. It has no other side to redirect to,
so what other ports send goes by the host's stack (``PW_SLOW_TAP``).
"""

from __future__ import annotations

from portwright.attach import veth
from portwright.model.network import GATEWAY_MAC
from portwright.model.port import Port
from portwright.plan.operations import AwaitLink, Operation
from portwright.plan.tap_operations import CreateHostTap

MODEL = veth.DIRECT


def attach(port: Port) -> tuple[Operation, ...]:
    """As ``veth.attach``, without anything in the sandbox: the guest's card is the hypervisor's to set."""
    made = CreateHostTap(
        rep=port.rep_name,
        gateway_mac=GATEWAY_MAC,
        mtu=port.mtu,
        queues=port.queues,
        alias=veth.alias(port),
    )
    return tuple(o for o in veth.around(port, made, ()) if not isinstance(o, AwaitLink))


detach = veth.detach
