"""Deleting a link without waiting for the kernel to tidy up after it.

``RTM_DELLINK`` answers late. First, under the lock (RTNL), the kernel takes the device and its peer off
every list and announces it (``unregister_netdevice_many_notify``, net/core/dev.c). When the lock is
released nobody can see, find or use either of them, and their names are free. Then, without the lock,
``netdev_run_todo`` waits in the caller's system call for RCU callbacks (``rcu_barrier``) before it frees
memory: some ten to twenty milliseconds that concern nobody. So the request is sent from a thread, and
``delete`` returns once the announcement is heard and the lock was free.
"""

from __future__ import annotations

import errno
import os
import select
import time
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any

from portwright.kernel.netlink import NETLINK_ROUTE, NetlinkSocket, open_socket, receive
from portwright.kernel.netns import self_fd
from portwright.kernel.rtnl import link_by_index, link_del
from portwright.kernel.rtnl_parse import RTM_DELLINK, parse_link
from portwright.model.errors import KernelFailed, NetlinkFailed

_RTMGRP_LINK = 1
_BUFFER = 64 * 1024
#: Seconds until the kernel must have announced it; it takes one to three milliseconds.
_TIMEOUT = 10.0
#: Deletions that may still be tidied up after; the next one waits for the oldest of them. Barriers that
#: overlap are one to the kernel, so eight make a burst of deletions several times as fast.
_IN_FLIGHT = 8


class LinkReaper:
    """Deletes links of one namespace. One caller at a time; close it."""

    def __init__(self, netns_fd: int | None = None) -> None:
        """Open its sockets in the namespace (the descriptor stays the caller's), or the thread's own."""
        self._netns_fd = os.dup(netns_fd) if netns_fd is not None else self_fd()
        self._ask = NetlinkSocket(netns_fd=netns_fd)
        self._idle: SimpleQueue[NetlinkSocket] = SimpleQueue()
        self._news = open_socket(NETLINK_ROUTE, netns_fd, groups=_RTMGRP_LINK)
        self._news.setblocking(False)
        self._buffer = bytearray(_BUFFER)
        self._threads = ThreadPoolExecutor(max_workers=_IN_FLIGHT, thread_name_prefix="reaper")

    def delete(self, index: int) -> None:
        """Return once the device is gone for every observer; one that is gone already is no error.

        Raises NetlinkFailed if the kernel refuses, KernelFailed(ETIMEDOUT) if it says nothing.
        """
        self._drain()
        answer = self._threads.submit(self._send, index)
        deadline = time.monotonic() + _TIMEOUT
        try:
            while not answer.done():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise KernelFailed(errno.ETIMEDOUT, f"ip link del if{index}")
                # An early answer (a refusal) makes no news: look at it every 10 ms as well.
                if select.select([self._news], [], [], min(left, 0.01))[0] and self._announced(index):
                    answer.add_done_callback(_retrieve)
                    # Answered under the lock: so the deletion has let go of it, and is complete to the eye.
                    link_by_index(self._ask, index)
                    return
            answer.result()
        except NetlinkFailed as error:
            if error.errno != errno.ENODEV:
                raise

    def close(self) -> None:
        """Wait for the last deletions to end and close the sockets."""
        self._threads.shutdown(wait=True)
        while not self._idle.empty():
            self._idle.get().close()
        self._ask.close()
        self._news.close()
        os.close(self._netns_fd)

    def _send(self, index: int) -> None:
        try:
            sock = self._idle.get_nowait()
        except Empty:
            sock = NetlinkSocket(netns_fd=self._netns_fd)
        try:
            sock.execute([link_del(index)])
        except KernelFailed:  # an answer may still come to this socket
            sock.close()
            raise
        except NetlinkFailed:
            self._idle.put(sock)
            raise
        self._idle.put(sock)

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
