"""Connections that the host translates between two addresses of this switch, told to the data path.

It learns of them by itself when their opener speaks through the host's stack; of those that were open before
both became ports it has to be told, or the other end's next packet would pass untranslated.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Collection

from portwright.dataplane import values
from portwright.dataplane.abi import PwFlow, PwState
from portwright.kernel import conntrack
from portwright.model.errors import KernelFailed, NetlinkFailed
from portwright.node.switch import Switch

_ZERO = bytes(4)


def note(switch: Switch, addresses: Collection[str]) -> int:
    """Has replies of such connections, between any two of the addresses, take the host's stack. How many."""
    try:
        with switch.conntrack() as socket:
            found = [r for r in conntrack.translated(socket) if r.src in addresses and r.dst in addresses]
    except (KernelFailed, NetlinkFailed) as error:
        # No ctnetlink in this kernel: nothing is translated that we could see.
        if error.errno not in (errno.EPROTONOSUPPORT, errno.EINVAL, errno.ENOENT):
            raise
        return 0
    for reply in found:
        key = PwFlow(
            saddr=values.address(reply.src),
            daddr=values.address(reply.dst),
            be_sport=reply.src_port.to_bytes(2, "big"),
            be_dport=reply.dst_port.to_bytes(2, "big"),
            proto=reply.proto,
        )
        switch.maps["pw_slow_flows"].update(key.pack(), (1).to_bytes(4, sys.byteorder))
    raw = switch.maps["pw_state"].lookup(_ZERO)
    if found and raw is not None:
        switch.maps["pw_state"].update(_ZERO, PwState.unpack(raw)._replace(slow_flows=1).pack())
    return len(found)
