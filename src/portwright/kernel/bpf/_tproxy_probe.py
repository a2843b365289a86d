"""Try nftables' tproxy where nothing can be left over: in a namespace of a thread's own, as _clsact_probe."""

from __future__ import annotations

import ctypes
import errno
import threading
from typing import Final

from portwright.kernel.nft import Nft
from portwright.model.errors import InvalidInput, KernelFailed

_CLONE_NEWNET: Final = 0x40000000
_SCRIPT: Final = """\
add table inet probe
add chain inet probe steer { type filter hook prerouting priority -301; }
add rule inet probe steer meta l4proto { tcp, udp } th dport 53 notrack tproxy ip to 127.0.0.1:1 accept
add rule inet probe steer meta l4proto { tcp, udp } th dport 53 notrack tproxy ip6 to [::1]:1 accept
"""

_libc = ctypes.CDLL(None, use_errno=True)


def try_tproxy() -> str:
    """Hand packets of both families to a local port; what was done. KernelFailed when the kernel can't."""
    said: list[str | BaseException] = []

    def inside() -> None:
        try:
            said.append(_inside())
        except BaseException as error:  # noqa: BLE001 -- raised again by the caller's thread
            said.append(error)

    thread = threading.Thread(target=inside, name="pw-tproxy-probe")
    thread.start()
    thread.join()
    (outcome,) = said
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _inside() -> str:
    if _libc.unshare(_CLONE_NEWNET) != 0:
        raise KernelFailed(ctypes.get_errno(), "make a network namespace to probe in")
    with Nft() as nft:
        try:
            nft.run(_SCRIPT)
        except InvalidInput as error:  # an nft that does not know it
            raise KernelFailed(errno.EOPNOTSUPP, "nft", str(error)) from error
    return "took rules for both families in a namespace of its own"
