"""A redirect by the kernel's own filter and action, u32 and mirred, on a clsact that we joined.

In our slot as clsact.py has it: our preference, and of our handle what u32 leaves free, its low 12 bits (a
node's number in the hash table of the preference).

Messages: include/uapi/linux/pkt_cls.h (tc_u32_sel), tc_act/tc_mirred.h; net/sched/cls_u32.c, act_mirred.c.
"""

from __future__ import annotations

import errno
import socket
import struct

from portwright.kernel.clsact import list_filters
from portwright.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL, NetlinkSocket, Request, RequestFailed
from portwright.kernel.nlattr import attr, attr_nested, attr_str, get_str, parse_attrs
from portwright.model.errors import Conflict, NotSupported

_RTM_NEWTFILTER, _RTM_GETTFILTER = 44, 46
_TCMSG = struct.Struct("=BxxxiIII")  # family, ifindex, handle, parent, info
_INGRESS = 0xFFFFFFF2
_ETH_P_ALL = socket.htons(3)
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_U32_SEL, _TCA_U32_ACT = 5, 7
_TCA_ACT_KIND, _TCA_ACT_OPTIONS, _TCA_MIRRED_PARMS = 1, 2, 2
_NODE = 0xFFF  # TC_U32_NODE of a handle
#: struct tc_u32_sel without keys, so that every packet matches; of its fields only the flag TERMINAL.
_MATCH_ALL = struct.pack("=BBBxHHhhI", 1, 0, 0, 0, 0, 0, 0, 0)
_MIRRED = struct.Struct("=IIiiiiI")  # struct tc_mirred: index, capab, action, two counts, eaction, ifindex
_TC_ACT_STOLEN, _TCA_EGRESS_REDIR = 4, 1


def attach_redirect(sock: NetlinkSocket, ifindex: int, to: int, *, pref: int, handle: int) -> None:
    """What comes in on the link goes out on another of its namespace. Needs ensure_clsact().

    Raises Conflict, with nothing changed, if the preference is used already: a number is never taken from
    a filter. Raises NotSupported where the kernel lacks u32 or mirred.
    """
    slot = f"ingress pref {pref} handle {handle & _NODE:#x} on if{ifindex}"
    if there := [f for f in list_filters(sock, ifindex, "ingress") if f.pref == pref]:
        why = f"the preference is used by someone's {there[0].kind} filter"
        raise Conflict("filter slot", slot, why)
    mirred = _MIRRED.pack(0, 0, _TC_ACT_STOLEN, 0, 0, _TCA_EGRESS_REDIR, to)
    action = attr_nested(
        1,  # the first of the filter's actions
        attr_str(_TCA_ACT_KIND, "mirred"),
        attr_nested(_TCA_ACT_OPTIONS, attr(_TCA_MIRRED_PARMS, mirred)),
    )
    options = attr_nested(_TCA_OPTIONS, attr(_TCA_U32_SEL, _MATCH_ALL), attr_nested(_TCA_U32_ACT, action))
    body = _TCMSG.pack(0, ifindex, handle & _NODE, _INGRESS, pref << 16 | _ETH_P_ALL)
    words = (
        f"tc filter add dev if{ifindex} ingress pref {pref} u32 … action mirred egress redirect dev if{to}"
    )
    request = Request(
        _RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, body + attr_str(_TCA_KIND, "u32") + options, words
    )
    try:
        sock.execute([request])
    except RequestFailed as error:
        if error.errno in (errno.EEXIST, errno.ENOSPC):  # the second is u32's own for a number that is taken
            raise Conflict("filter slot", slot, "someone took it at this very moment") from error
        if error.errno == errno.ENOENT:
            way_out = f"the kernel has no cls_u32 or no act_mirred ({error}); load both, or join by bpf"
            raise NotSupported("tcfilter", "join mirred", way_out) from error
        raise


def redirect(sock: NetlinkSocket, ifindex: int, *, pref: int, handle: int) -> int:
    """Where our filter takes what comes in on the link, an ifindex; 0 if it is not there, or does not."""
    body = _TCMSG.pack(0, ifindex, 0, _INGRESS, 0)
    request = Request(
        _RTM_GETTFILTER, 0, body, f"tc filter show dev if{ifindex} ingress", (errno.EINVAL, errno.ENODEV)
    )
    for message in sock.dump(request):
        if len(message.body) < _TCMSG.size:
            continue
        _, _, found, _, info = _TCMSG.unpack_from(message.body)
        attrs = parse_attrs(message.body, _TCMSG.size)
        if (get_str(attrs, _TCA_KIND), info >> 16, found & _NODE) != ("u32", pref, handle & _NODE):
            continue
        options = parse_attrs(attrs.get(_TCA_OPTIONS, b""))
        action = parse_attrs(parse_attrs(options.get(_TCA_U32_ACT, b"")).get(1, b""))
        parms = parse_attrs(action.get(_TCA_ACT_OPTIONS, b"")).get(_TCA_MIRRED_PARMS, b"")
        if get_str(action, _TCA_ACT_KIND) == "mirred" and len(parms) >= _MIRRED.size:
            *_, eaction, to = _MIRRED.unpack_from(parms)
            return to if eaction == _TCA_EGRESS_REDIR else 0
    return 0
