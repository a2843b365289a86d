"""Deleting a link without waiting for the kernel to tidy up after it.

``RTM_DELLINK`` answers late. First the kernel takes the device off every list and announces it
(``unregister_netdevice_many_notify``, net/core/dev.c): from here on nobody can see it, look it up or
send on it, and its name is free. Then, with the lock released, ``netdev_run_todo`` waits in the
caller's system call for RCU callbacks (``rcu_barrier``) before it frees memory: some ten
milliseconds that concern nobody. So the request is sent from a thread, and ``delete`` returns with
the announcement.
"""

from __future__ import annotations

import errno
import select
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from portwright.kernel.netlink import NETLINK_ROUTE, NetlinkSocket, open_socket, receive
from portwright.kernel.rtnl import link_del
from portwright.kernel.rtnl_parse import RTM_DELLINK, parse_link
from portwright.model.errors import KernelFailed, NetlinkFailed

_RTMGRP_LINK = 1
_BUFFER = 64 * 1024
#: Seconds until the kernel must have announced it; it takes one to three milliseconds.
_TIMEOUT = 10.0


class LinkReaper:
    """Deletes links of one namespace. One caller at a time; close it."""

    def __init__(self, netns_fd: int | None = None) -> None:
        """Open its sockets in the namespace (the descriptor stays the caller's), or the thread's own."""
        self._sock = NetlinkSocket(netns_fd=netns_fd)
        self._news = open_socket(NETLINK_ROUTE, netns_fd, groups=_RTMGRP_LINK)
        self._news.setblocking(False)
        self._buffer = bytearray(_BUFFER)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reaper")

    def delete(self, index: int) -> None:
        """Return once the device is gone for every observer; one that is gone already is no error.

        Raises NetlinkFailed if the kernel refuses, KernelFailed(ETIMEDOUT) if it says nothing.
        """
        self._drain()
        answer = self._thread.submit(self._sock.execute, [link_del(index)])
        deadline = time.monotonic() + _TIMEOUT
        try:
            while not answer.done():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise KernelFailed(errno.ETIMEDOUT, f"ip link del if{index}")
                # An early answer (a refusal) makes no news: look at it every 10 ms as well.
                if select.select([self._news], [], [], min(left, 0.01))[0] and self._announced(index):
                    answer.add_done_callback(_retrieve)
                    return
            answer.result()
        except NetlinkFailed as error:
            if error.errno != errno.ENODEV:
                raise

    def close(self) -> None:
        """Wait for the last deletion to end and close the sockets."""
        self._thread.shutdown(wait=True)
        self._sock.close()
        self._news.close()

    def _drain(self) -> None:
        while True:
            try:
                receive(self._news, self._buffer)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.ENOBUFS, errno.EMSGSIZE):
                    raise KernelFailed(error.errno or errno.EIO, "netlink link events") from error

    def _announced(self, index: int) -> bool:
        try:
            messages = receive(self._news, self._buffer)
        except OSError:
            return False  # nothing yet, or an overflow: the answer itself will come
        return any(
            m.type == RTM_DELLINK and (link := parse_link(m)) is not None and link.index == index
            for m in messages
        )


def _retrieve(answer: Future[Any]) -> None:
    """Take the late answer, so that nobody is told of an exception that was not retrieved."""
    answer.exception()
