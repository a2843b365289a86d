"""Links as they come, change and go, pushed by the kernel (RTNLGRP_LINK); and that tables of nftables go."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Literal

import msgspec

from portwright.kernel.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, Message, open_socket, receive
from portwright.kernel.rtnl_parse import RTM_DELLINK, LinkInfo, parse_link
from portwright.model.errors import KernelFailed

_RTMGRP_LINK = 1
_RTMGRP_IPV4_IFADDR, _RTMGRP_IPV6_IFADDR = 0x10, 0x100
#: Datagrams that one read() takes at most, so that a storm can't hold an event loop.
READ_MAX = 256
#: linux/netfilter/nfnetlink.h, nf_tables.h: the group's bit, and NFT_MSG_DELTABLE of its subsystem.
_NFNLGRP_NFTABLES, _DELTABLE = 1 << (7 - 1), 10 << 8 | 2
_RECEIVE_BUFFER = 4 << 20  # about 2,000 unread link messages
_DATAGRAM = 64 * 1024
_SOL_NETLINK, _NETLINK_LISTEN_ALL_NSID = 270, 8  # linux/socket.h, netlink.h


class LinkEvent(msgspec.Struct, frozen=True, kw_only=True):
    """``new`` (made, or anything about it changed), ``del``, or ``overflow``: some were lost.

    ``link`` is its state at that moment (of ``del``: its last), None for ``overflow``. A link
    that moves to another namespace is a ``del`` here.
    """

    kind: Literal["new", "del", "overflow"]
    link: LinkInfo | None = None


class _Subscription:
    """Messages of a netlink group, from the moment it is made."""

    #: What a failure calls it.
    _words = "netlink monitor"

    def __init__(self, protocol: int, groups: int, netns_fd: int | None) -> None:
        self._sock = open_socket(protocol, netns_fd, groups=groups, receive_buffer=_RECEIVE_BUFFER)
        self._sock.setblocking(False)
        self._buffer = bytearray(_DATAGRAM)

    def close(self) -> None:
        """End the subscription; a second time does nothing."""
        self._sock.close()

    def fileno(self) -> int:
        """Return the descriptor to wait on, -1 once closed."""
        return self._sock.fileno()

    def _datagrams(self) -> Iterator[Sequence[Message] | None]:
        """Each that has come, at most READ_MAX, without waiting; None where some were lost."""
        for _ in range(READ_MAX):
            try:
                messages = receive(self._sock, self._buffer)
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno not in (errno.ENOBUFS, errno.EMSGSIZE):
                    raise KernelFailed(exc.errno or errno.EIO, self._words) from exc
                # Reported once by the kernel; what had fitted into the buffer still follows.
                yield None
            else:
                yield messages


class LinkMonitor(_Subscription):
    """A subscription to one namespace's links.

    For an event loop: wait until fileno() is readable, then read(). To miss nothing, subscribe
    first and list the links second; do the same again after an ``overflow``.
    """

    _words = "ip monitor link"

    def __init__(self, netns_fd: int | None = None) -> None:
        """Subscribe in the namespace of ``netns_fd`` (not taken over), or the thread's own."""
        super().__init__(NETLINK_ROUTE, _RTMGRP_LINK, netns_fd)

    def __enter__(self) -> LinkMonitor:
        """Return the monitor itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def read(self) -> list[LinkEvent]:
        """Return what has happened since, in order, without waiting; may be empty.

        After READ_MAX datagrams the rest stays for the next call (the descriptor stays readable).
        """
        events: list[LinkEvent] = []
        for messages in self._datagrams():
            if messages is None:
                events.append(LinkEvent(kind="overflow"))
            for message in messages or ():
                link = parse_link(message)
                if link is not None:
                    events.append(LinkEvent(kind="del" if message.type == RTM_DELLINK else "new", link=link))
        return events


class SandboxMonitor(LinkMonitor):
    """A subscription to the links of a namespace, and of every other that it has a number for (nsid).

    Whose link an event is of it does not say: a number or a name in it may be that of several.
    """

    def __init__(self, netns_fd: int | None = None) -> None:
        """Subscribe by the namespace of ``netns_fd`` (not taken over), or the thread's own."""
        super().__init__(netns_fd)
        try:
            self._sock.setsockopt(_SOL_NETLINK, _NETLINK_LISTEN_ALL_NSID, 1)
        except OSError as exc:
            self.close()
            raise KernelFailed(exc.errno or errno.EIO, self._words, "of all namespaces") from exc


class _Signal(_Subscription):
    """Says that something happened, not what: ask for what is then.

    For an event loop: wait until fileno() is readable, drain(), and look.
    """

    #: Messages of other types say nothing; None: all of them do.
    _type: int | None = None

    def drain(self) -> bool:
        """Take what has come, at most READ_MAX datagrams; whether it says something, be it by a loss."""
        some = False
        for messages in self._datagrams():
            some = some or messages is None or any(self._type in {None, m.type} for m in messages)
        return some


class AddressMonitor(_Signal):
    """Something changed about a namespace's links or addresses."""

    def __init__(self, netns_fd: int | None = None) -> None:
        """Subscribe in the namespace of ``netns_fd`` (not taken over), or the thread's own."""
        super().__init__(NETLINK_ROUTE, _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR, netns_fd)


class TableMonitor(_Signal):
    """An nftables table of a namespace was removed: anybody's."""

    _type = _DELTABLE

    def __init__(self, netns_fd: int | None = None) -> None:
        """Subscribe in the namespace of ``netns_fd`` (not taken over), or the thread's own."""
        super().__init__(NETLINK_NETFILTER, _NFNLGRP_NFTABLES, netns_fd)
