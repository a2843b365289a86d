"""Try nftables' ``log group`` where nothing can be left over."""

from __future__ import annotations

from typing import Final

from portwright.kernel.bpf._apart import apart
from portwright.kernel.nflog import PacketLog
from portwright.kernel.nft import Nft

_GROUP: Final = 1
_SCRIPT: Final = f"""\
add table inet probe
add chain inet probe denied
add rule inet probe denied limit rate 1/second log prefix "probe" group {_GROUP} snaplen 1
"""


def try_nflog() -> str:
    """Hand packets to a listener; what was done. KernelFailed when the kernel can't."""
    return apart(_inside, "pw-nflog-probe")


def _inside() -> str:
    with Nft() as nft:
        nft.run(_SCRIPT)
    PacketLog(_GROUP).close()
    return "took a rule and a listener in a namespace of its own"
