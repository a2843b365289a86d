"""The attachment model ``macvtap``: a veth whose end in the sandbox's namespace carries a macvtap.

As ``tcfilter``, but in the tap's place a macvtap in mode passthru: the guest's card is the device, with its
MAC, and what comes for it goes to the hypervisor that has the macvtap open. It goes with the device.
"""

from __future__ import annotations

from portwright.attach import veth
from portwright.attach.tcfilter import behind
from portwright.model.port import Port
from portwright.plan.operations import NameLink, Operation
from portwright.plan.tap_operations import CreateMacvtap

MODEL = "macvtap"


def attach(port: Port) -> tuple[Operation, ...]:
    """As ``veth.attach``; on the device before that is up, so that the namespace's stack hears nothing."""
    made = CreateMacvtap(device=port.ifname, tap=port.tap, mtu=port.mtu, queues=port.queues)
    return behind(NameLink, veth.attach(port), made)


detach = veth.detach
