"""Try nftables' tproxy where nothing can be left over."""

from __future__ import annotations

import errno
from typing import Final

from portwright.kernel.bpf._apart import apart
from portwright.kernel.nft import Nft
from portwright.model.errors import InvalidInput, KernelFailed

_SCRIPT: Final = """\
add table inet probe
add chain inet probe steer { type filter hook prerouting priority -301; }
add rule inet probe steer meta l4proto { tcp, udp } th dport 53 notrack tproxy ip to 127.0.0.1:1 accept
add rule inet probe steer meta l4proto { tcp, udp } th dport 53 notrack tproxy ip6 to [::1]:1 accept
"""


def try_tproxy() -> str:
    """Hand packets of both families to a local port; what was done. KernelFailed when the kernel can't."""
    return apart(_inside, "pw-tproxy-probe")


def _inside() -> str:
    with Nft() as nft:
        try:
            nft.run(_SCRIPT)
        except InvalidInput as error:  # an nft that does not know it
            raise KernelFailed(errno.EOPNOTSUPP, "nft", str(error)) from error
    return "took rules for both families in a namespace of its own"
