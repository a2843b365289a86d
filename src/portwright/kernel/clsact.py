"""BPF on clsact, for kernels without TCX, beside whoever else uses it.

A device has one clsact qdisc and everybody's filters share it. We join it, and own exactly one
slot on each side: a (preference, handle) whose filter is a bpf one with our name. Nothing else
is ever replaced or deleted (docs/design.md, rule 1 of the representor's).

Messages: include/uapi/linux/rtnetlink.h (tcmsg), pkt_cls.h; net/sched/cls_api.c, cls_bpf.c.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Literal

import msgspec

from portwright.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NetlinkSocket,
    Request,
    RequestFailed,
)
from portwright.kernel.nlattr import attr_nested, attr_str, attr_u32, get_str, get_u32, parse_attrs
from portwright.model.errors import Conflict, NotFound

Direction = Literal["ingress", "egress"]

_RTM_NEWQDISC, _RTM_DELQDISC, _RTM_GETQDISC = 36, 37, 38
_RTM_NEWTFILTER, _RTM_DELTFILTER, _RTM_GETTFILTER = 44, 45, 46
_TCMSG = struct.Struct("=BxxxiIII")  # family, ifindex, handle, parent, info
_TC_H_ROOT = 0xFFFFFFFF
_TC_H_CLSACT = 0xFFFFFFF1  # the parent of clsact and of the older ingress qdisc alike
_HANDLE = 0xFFFF0000  # ffff:, which both of them get
_PARENTS: dict[Direction, int] = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_CLASSID, _TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS, _TCA_BPF_ID = 3, 6, 7, 8, 11
_TCA_BPF_FLAG_ACT_DIRECT = 1
#: Of our filters on any device: a preference and handle that nobody picks by chance.
OUR_PREF, OUR_HANDLE = 28791, 0x7077
_ETH_P_ALL = socket.htons(3)  # tcm_info carries the protocol in network order
_PREF_SHIFT = 16


class QdiscInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One qdisc; ``handle`` and ``parent`` are major << 16 | minor."""

    index: int
    kind: str
    handle: int
    parent: int


class FilterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One filter of one side. ``name`` and ``prog_id`` only of kind ``bpf``.

    ``protocol`` is an ETH_P_* (3 is all).
    """

    kind: str
    pref: int
    protocol: int
    handle: int
    name: str = ""
    prog_id: int = 0


def qdiscs(sock: NetlinkSocket, ifindex: int) -> list[QdiscInfo]:
    """Return a link's qdiscs, the root's and the ingress ones; none if the link is gone."""
    request = Request(_RTM_GETQDISC, 0, _TCMSG.pack(0, ifindex, 0, 0, 0), f"tc qdisc show dev if{ifindex}")
    found = []
    for message in sock.dump(request):
        if len(message.body) < _TCMSG.size:
            continue
        _, index, handle, parent, _ = _TCMSG.unpack_from(message.body)
        if index == ifindex:  # the kernel lists every link's, whatever is asked
            kind = get_str(parse_attrs(message.body, _TCMSG.size), _TCA_KIND)
            found.append(QdiscInfo(index=index, kind=kind, handle=handle, parent=parent))
    return found


def filter_counts(sock: NetlinkSocket, ifindex: int) -> dict[Direction, int]:
    """Return how many filters each side of the link has, whoever's, 0 without a clsact.

    As ``tc filter show`` lists them: u32 counts its hash tables too.
    """
    return {direction: len(list_filters(sock, ifindex, direction)) for direction in _PARENTS}


def list_filters(sock: NetlinkSocket, ifindex: int, direction: Direction) -> list[FilterInfo]:
    """Return the filters of one side, whoever's; none if there is no clsact or no link."""
    body = _TCMSG.pack(0, ifindex, 0, _PARENTS[direction], 0)
    name = f"tc filter show dev if{ifindex} {direction}"
    found = []
    for message in sock.dump(Request(_RTM_GETTFILTER, 0, body, name, (errno.EINVAL, errno.ENODEV))):
        if len(message.body) < _TCMSG.size:
            continue
        _, _, handle, _, info = _TCMSG.unpack_from(message.body)
        attrs = parse_attrs(message.body, _TCMSG.size)
        kind = get_str(attrs, _TCA_KIND)
        options = parse_attrs(attrs.get(_TCA_OPTIONS, b"")) if kind == "bpf" else {}
        # Every chain also lists itself, with handle 0: the slot, not a filter in it.
        if handle:
            found.append(
                FilterInfo(
                    kind=kind,
                    pref=info >> _PREF_SHIFT,
                    protocol=socket.ntohs(info & 0xFFFF),
                    handle=handle,
                    name=get_str(options, _TCA_BPF_NAME),
                    prog_id=get_u32(options, _TCA_BPF_ID),
                )
            )
    return found


def ensure_clsact(sock: NetlinkSocket, ifindex: int) -> bool:
    """Make sure that the link has a clsact qdisc; return True if it is we who made it.

    One that is there is joined untouched. Raises NotFound without the link, and Conflict if
    someone's ``ingress`` qdisc holds the place: it has no egress side, and taking it away would
    take its filters with it.
    """
    try:
        sock.execute([_clsact(ifindex)])
    except RequestFailed as exc:
        if exc.errno == errno.ENODEV:
            raise NotFound("link", f"if{ifindex}") from exc
        if exc.errno != errno.EEXIST:
            raise
    else:
        return True
    there = {q.kind for q in qdiscs(sock, ifindex) if q.parent == _TC_H_CLSACT}
    if there != {"clsact"}:
        held = ", ".join(sorted(there)) or "another"
        raise Conflict("clsact", f"if{ifindex}", f"its place is held by an {held} qdisc that is not ours")
    return False


def drop_clsact(sock: NetlinkSocket, ifindex: int) -> bool:
    """Delete the clsact qdisc if no filter is left in it; return whether it was deleted.

    For a qdisc that ensure_clsact() made, and only for that. Someone who adds a filter between
    our look and the delete loses it; the kernel offers nothing better, so when the link itself
    goes away anyway, leave it.
    """
    if any(filter_counts(sock, ifindex).values()):
        return False
    if not any(q.kind == "clsact" for q in qdiscs(sock, ifindex)):
        return False
    body = _TCMSG.pack(0, ifindex, _HANDLE, _TC_H_CLSACT, 0) + attr_str(_TCA_KIND, "clsact")
    gone = (errno.ENOENT, errno.ENODEV, errno.EINVAL)
    sock.execute([Request(_RTM_DELQDISC, 0, body, f"tc qdisc del dev if{ifindex} clsact", gone)])
    return True


def attach_bpf(
    sock: NetlinkSocket,
    ifindex: int,
    direction: Direction,
    prog_fd: int,
    *,
    name: str,
    pref: int,
    handle: int,
    class_id: int = 0,
) -> None:
    """Put a program (direct action) into our slot, or replace ours there in one step.

    Needs ensure_clsact(). Raises Conflict, with nothing changed, if the slot's preference is
    used by another kind of filter or for one protocol only, or if the very slot holds a filter
    that does not have our name. The program finds the low 16 bits of ``class_id`` in ``tc_classid``.
    """
    slot = f"{direction} pref {pref} handle {handle:#x} on if{ifindex}"
    ours = False
    for found in list_filters(sock, ifindex, direction):
        if found.pref != pref:
            continue
        if found.kind != "bpf" or socket.htons(found.protocol) != _ETH_P_ALL:
            raise Conflict("filter slot", slot, f"the preference is used by someone's {found.kind} filter")
        if found.handle == handle:
            if found.name != name:
                raise Conflict("filter slot", slot, f"it holds someone's filter {found.name!r}")
            ours = True
    # Exclusive when the slot looked free: if someone took it since, that is a refusal, not a theft.
    flags = NLM_F_CREATE if ours else NLM_F_CREATE | NLM_F_EXCL
    try:
        request = _filter(
            ifindex,
            direction,
            prog_fd,
            name=name,
            pref=pref,
            handle=handle,
            flags=flags,
            class_id=class_id,
        )
        sock.execute([request])
    except RequestFailed as exc:
        if exc.errno == errno.EEXIST:
            raise Conflict("filter slot", slot, "someone took it at this very moment") from exc
        raise


def attach_fresh(
    sock: NetlinkSocket,
    ifindex: int,
    direction: Direction,
    prog_fd: int,
    *,
    name: str,
    pref: int,
    handle: int,
) -> bool:
    """As ensure_clsact() and attach_bpf(), in one round trip, where nobody can have been before us.

    ``ingress`` makes the clsact too, so it goes first. False if anything was refused, whatever of it
    was done then: somebody was here after all, and the two careful ones are to be called.
    """
    exclusive = NLM_F_CREATE | NLM_F_EXCL
    requests = [_filter(ifindex, direction, prog_fd, name=name, pref=pref, handle=handle, flags=exclusive)]
    if direction == "ingress":
        requests.insert(0, _clsact(ifindex))
    try:
        sock.execute(requests)
    except RequestFailed:
        return False
    return True


def join(sock: NetlinkSocket, ifindex: int, prog_fd: int, *, name: str, class_id: int) -> None:
    """Put a program into our own slot of a link's ingress, on a clsact that is there or made.

    Raises as ensure_clsact() and attach_bpf().
    """
    ensure_clsact(sock, ifindex)
    attach_bpf(
        sock, ifindex, "ingress", prog_fd, name=name, pref=OUR_PREF, handle=OUR_HANDLE, class_id=class_id
    )


def leave(sock: NetlinkSocket, ifindex: int, direction: Direction, *, name: str) -> bool:
    """As detach_bpf(), of our own slot."""
    return detach_bpf(sock, ifindex, direction, name=name, pref=OUR_PREF, handle=OUR_HANDLE)


def detach_bpf(
    sock: NetlinkSocket, ifindex: int, direction: Direction, *, name: str, pref: int, handle: int
) -> bool:
    """Take our program out of our slot; False, with nothing changed, if the slot is not ours.

    That is: it is empty, or holds a filter that is not bpf or does not have our name.
    """
    mine = (
        f.kind == "bpf" and f.name == name and (f.pref, f.handle) == (pref, handle)
        for f in list_filters(sock, ifindex, direction)
    )
    if not any(mine):
        return False
    words = f"tc filter del dev if{ifindex} {direction} pref {pref} handle {handle:#x} bpf"
    gone = (errno.ENOENT, errno.ENODEV, errno.EINVAL)
    sock.execute([Request(_RTM_DELTFILTER, 0, _slot(ifindex, direction, pref, handle), words, gone)])
    return True


def _slot(ifindex: int, direction: Direction, pref: int, handle: int) -> bytes:
    info = pref << _PREF_SHIFT | _ETH_P_ALL
    return _TCMSG.pack(0, ifindex, handle, _PARENTS[direction], info) + attr_str(_TCA_KIND, "bpf")


def without_queue(ifindex: int) -> Request:
    """What the link transmits waits in no qdisc. Before it is up: later it takes grace periods."""
    body = _TCMSG.pack(0, ifindex, 0, _TC_H_ROOT, 0) + attr_str(_TCA_KIND, "noqueue")
    flags = NLM_F_CREATE | NLM_F_REPLACE
    return Request(_RTM_NEWQDISC, flags, body, f"tc qdisc replace dev if{ifindex} root noqueue")


def _clsact(ifindex: int) -> Request:
    body = _TCMSG.pack(0, ifindex, _HANDLE, _TC_H_CLSACT, 0) + attr_str(_TCA_KIND, "clsact")
    return Request(_RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, body, f"tc qdisc add dev if{ifindex} clsact")


def _filter(
    ifindex: int,
    direction: Direction,
    prog_fd: int,
    *,
    name: str,
    pref: int,
    handle: int,
    flags: int,
    class_id: int = 0,
) -> Request:
    options = attr_nested(
        _TCA_OPTIONS,
        *([attr_u32(_TCA_BPF_CLASSID, class_id)] if class_id else []),
        attr_u32(_TCA_BPF_FD, prog_fd),
        attr_str(_TCA_BPF_NAME, name),
        attr_u32(_TCA_BPF_FLAGS, _TCA_BPF_FLAG_ACT_DIRECT),
    )
    words = (
        f"tc filter replace dev if{ifindex} {direction} pref {pref} handle {handle:#x} bpf da object {name}"
    )
    return Request(_RTM_NEWTFILTER, flags, _slot(ifindex, direction, pref, handle) + options, words)
