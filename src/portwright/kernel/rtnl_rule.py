"""rtnetlink requests for routing policy rules: ``ip rule``, by firewall mark.

Source: include/uapi/linux/fib_rules.h (struct fib_rule_hdr, FRA_*).
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Required, TypedDict, Unpack

from portwright.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL, Request
from portwright.kernel.nlattr import attr_str, attr_u32

_RTM_NEWRULE, _RTM_DELRULE = 32, 33
_FRA_IIFNAME, _FRA_PRIORITY, _FRA_FWMARK, _FRA_TABLE, _FRA_FWMASK = 3, 6, 10, 15, 16
_FR_ACT_TO_TBL = 1
_RT_TABLE_COMPAT = 252
#: family, dst_len, src_len, tos, table, res1, res2, action, flags
_HEADER = struct.Struct("=8BI")


class RuleFields(TypedDict, total=False):
    """What a rule matches beside its family: packets with exactly this mark that came in by ``iif``.

    ``iif``: a device's name; ``lo`` stands for this host's own packets and for a look at a packet's
    way back. What matches is routed by ``table``.
    """

    mark: Required[int]
    table: Required[int]
    priority: Required[int]
    iif: str


def rule_add(family: int, **fields: Unpack[RuleFields]) -> Request:
    """Add a rule; one that is there is no error."""
    words = f"ip {_word(family)}rule add {_words(fields)}"
    return Request(_RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, _body(family, fields), words, (errno.EEXIST,))


def rule_del(family: int, **fields: Unpack[RuleFields]) -> Request:
    """Remove that rule; none is no error."""
    words = f"ip {_word(family)}rule del {_words(fields)}"
    return Request(_RTM_DELRULE, 0, _body(family, fields), words, (errno.ENOENT,))


def _body(family: int, fields: RuleFields) -> bytes:
    iif = fields.get("iif")
    head = _HEADER.pack(family, 0, 0, 0, _RT_TABLE_COMPAT, 0, 0, _FR_ACT_TO_TBL, 0)
    return (
        head
        + attr_u32(_FRA_PRIORITY, fields["priority"])
        + attr_u32(_FRA_FWMARK, fields["mark"])
        + attr_u32(_FRA_FWMASK, 0xFFFFFFFF)
        + attr_u32(_FRA_TABLE, fields["table"])
        + (attr_str(_FRA_IIFNAME, iif) if iif is not None else b"")
    )


def _words(fields: RuleFields) -> str:
    iif = f"iif {fields['iif']} " if "iif" in fields else ""
    return f"{iif}fwmark {fields['mark']:#x} lookup {fields['table']} priority {fields['priority']}"


def _word(family: int) -> str:
    return "-6 " if family == socket.AF_INET6 else ""
