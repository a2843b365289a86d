"""Try clsact and a BPF filter where nothing can be left over.

The four messages are written out here because a probe should not need the netlink
library whose kernel it is about to judge.
"""

from __future__ import annotations

import os
import socket
import struct
from functools import partial
from typing import Final

from portwright.kernel.bpf._apart import apart
from portwright.model.errors import KernelFailed

_RTM_NEWQDISC, _RTM_NEWTFILTER = 36, 44  # linux/rtnetlink.h
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_EXCL, _NLM_F_CREATE = 0x1, 0x4, 0x200, 0x400  # linux/netlink.h
_TCA_KIND, _TCA_OPTIONS, _TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS = 1, 2, 6, 7, 8
_TC_H_CLSACT, _TC_H_MIN_INGRESS = 0xFFFFFFF1, 0xFFFFFFF2  # linux/pkt_sched.h
_LOOPBACK: Final = 1
_ETH_P_ALL: Final = 3


def try_clsact(program_fd: int) -> str:
    """Attach a classifier through clsact; what was done. KernelFailed when the kernel can't."""
    return apart(partial(_inside, program_fd), "pw-clsact-probe")


def _inside(program_fd: int) -> str:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as sock:
        sock.settimeout(5)
        kind = _attr(_TCA_KIND, b"clsact\0")
        tcmsg = struct.pack("=BxxxiIII", 0, _LOOPBACK, 0xFFFF0000, _TC_H_CLSACT, 0)
        _ask(sock, _RTM_NEWQDISC, tcmsg + kind, "add a clsact qdisc")
        options = (
            _attr(_TCA_BPF_FD, struct.pack("=I", program_fd))
            + _attr(_TCA_BPF_NAME, b"pw_probe\0")
            + _attr(_TCA_BPF_FLAGS, struct.pack("=I", 1))  # direct action
        )
        rule = _attr(_TCA_KIND, b"bpf\0") + _attr(_TCA_OPTIONS, options)
        info = 1 << 16 | socket.htons(_ETH_P_ALL)  # preference, protocol
        tcmsg = struct.pack("=BxxxiIII", 0, _LOOPBACK, 1, _TC_H_MIN_INGRESS, info)
        _ask(sock, _RTM_NEWTFILTER, tcmsg + rule, "add a bpf filter to clsact")
    return "attached a classifier in a namespace of its own"


def _attr(kind: int, value: bytes) -> bytes:
    """One netlink attribute, padded to 4 bytes."""
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def _ask(sock: socket.socket, kind: int, body: bytes, what: str) -> None:
    """Send one request (``struct tcmsg`` and attributes) and read its acknowledgement."""
    flags = _NLM_F_REQUEST | _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_EXCL
    sock.send(struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body)
    answer = sock.recv(65536)
    (error,) = struct.unpack_from("=i", answer, 16)
    if error < 0:
        raise KernelFailed(-error, what, os.strerror(-error))
