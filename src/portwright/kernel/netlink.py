"""A small netlink socket: batches in one system call, each answer accounted for.

Why our own: making a slot through pyroute2 took 27 ms against 1.4 ms for raw batches, and
its import 118 ms and 20 MB (docs/design.md); a whole CNI ADD has to fit into 4 ms.

Wire format: include/uapi/linux/netlink.h (attributes: nlattr.py). What comes back is known
to come from the kernel (the sender is checked) but not to be well formed: a length that does
not fit ends the parsing, it never raises or reads past the end.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import NamedTuple

from portwright.kernel.netns import cookie_of, entered
from portwright.kernel.nlattr import get_str, parse_attrs
from portwright.model.errors import KernelFailed, NetlinkFailed

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

NLM_F_REQUEST, NLM_F_MULTI, NLM_F_ACK, NLM_F_DUMP_INTR = 0x01, 0x02, 0x04, 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER_LEN = 16
_NLM_F_CAPPED, _NLM_F_ACK_TLVS = 0x100, 0x200
_NLMSGERR_ATTR_MSG = 1

_SOL_NETLINK = 270
_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 10, 11, 12
_SO_RCVBUFFORCE = 33
_MSG_TRUNC = int(socket.MSG_TRUNC)  # the enum's own & costs 3 µs, with every message

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: len, type, flags, seq, pid
_ERROR = struct.Struct("=i")
_TIMEVAL = struct.Struct("@ll")
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")

#: One answer never waits longer; the kernel answers while we send, so this means it is stuck.
REPLY_TIMEOUT = 10.0
#: Requests in one sendmsg. Acks queue up in our receive buffer while the kernel works through
#: a batch, and it drops an ack that does not fit; 64 of about 1 KiB fit into the smallest default.
BATCH_MAX = 64
_BATCH_BYTES = 64 * 1024
_BUFFER = 64 * 1024
_DUMP_TRIES = 5
_SEQ_MAX = 1 << 31


class Message(NamedTuple):
    """One message from the kernel; ``body`` is what follows the netlink header."""

    type: int
    flags: int
    seq: int
    body: bytes


class Request(NamedTuple):
    """One message to the kernel.

    ``name`` is the command that a person would have typed for it, used in errors and
    transcripts. Answers whose errno is in ``tolerate`` count as success (a delete of what is gone).
    """

    type: int
    flags: int
    body: bytes
    name: str
    tolerate: tuple[int, ...] = ()

    def tolerating(self, *errnos: int) -> Request:
        """Return this request with more errnos that count as success."""
        return self._replace(tolerate=self.tolerate + errnos)


class RequestFailed(NetlinkFailed):
    """The first refused request of a batch.

    ``index`` is its place in the batch and ``failed`` the places of all that were refused:
    every other request of the batch *was* executed.
    """

    def __init__(self, errno: int, request: str, extack: str, index: int, failed: tuple[int, ...]) -> None:
        """Facts as in NetlinkFailed, with the places in the batch."""
        super().__init__(errno, request, extack)
        self.index = index
        self.failed = failed


def parse_messages(data: bytes) -> list[Message]:
    """Split what one recv returned; a message whose length does not fit ends the list."""
    found: list[Message] = []
    offset, end = 0, len(data)
    while offset + _HEADER_LEN <= end:
        length, kind, flags, seq, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER_LEN or offset + length > end:
            break
        found.append(Message(kind, flags, seq, data[offset + _HEADER_LEN : offset + length]))
        offset += (length + 3) & ~3
    return found


def _answer(message: Message) -> tuple[int, str]:
    """Return (errno, the kernel's own sentence) of an ERROR or DONE message; errno 0 is success."""
    body = message.body
    if len(body) < _ERROR.size:
        return (errno.EBADMSG, "") if message.type == _NLMSG_ERROR else (0, "")
    code = -_ERROR.unpack_from(body)[0]
    if not code or not message.flags & _NLM_F_ACK_TLVS:
        return code, ""
    offset = _ERROR.size
    if message.type == _NLMSG_ERROR:  # DONE carries no copy of the request
        if len(body) < offset + _HEADER_LEN:
            return code, ""
        copied = _HEADER.unpack_from(body, offset)[0]
        offset += _HEADER_LEN if message.flags & _NLM_F_CAPPED else (copied + 3) & ~3
    return code, get_str(parse_attrs(body, offset), _NLMSGERR_ATTR_MSG)


# --- the socket ------------------------------------------------------------------------------


def open_socket(
    protocol: int, netns_fd: int | None = None, *, groups: int = 0, receive_buffer: int = 0
) -> socket.socket:
    """Open a bound netlink socket that belongs to a namespace, for good, wherever it is used.

    ``groups`` is a multicast bit mask; ``receive_buffer`` in bytes asks for a larger buffer
    (beyond rmem_max where we may). Raises KernelFailed; leaves nothing open then.
    """
    try:
        with nullcontext() if netns_fd is None else entered(netns_fd):
            sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    except OSError as exc:
        raise KernelFailed(exc.errno or errno.EIO, "socket(AF_NETLINK)", f"protocol {protocol}") from exc
    try:
        sock.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        sock.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        if protocol == NETLINK_ROUTE:
            # Dumps then obey the filters in the request and refuse what they don't understand.
            sock.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        if receive_buffer:
            try:
                sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_buffer)
            except OSError:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.bind((0, groups))
    except OSError as exc:
        sock.close()
        raise KernelFailed(exc.errno or errno.EIO, "netlink socket", f"protocol {protocol}") from exc
    return sock


def receive(sock: socket.socket, buffer: bytearray) -> list[Message]:
    """Receive one datagram and split it.

    Empty if a process and not the kernel sent it. OSError as recvmsg(2) gives it (ENOBUFS:
    the kernel had to drop messages to us); EMSGSIZE if the datagram did not fit the buffer.
    """
    count, _, flags, sender = sock.recvmsg_into([buffer])
    if flags & _MSG_TRUNC:
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    if sender[0] != 0:  # the kernel's port id is 0; any process may send to ours
        return []
    return parse_messages(bytes(memoryview(buffer)[:count]))


class NetlinkSocket:
    """A request socket in one namespace. Not for two threads at a time; a context manager.

    Every request is answered within REPLY_TIMEOUT seconds, or KernelFailed is raised: then,
    and after any other KernelFailed, answers may still be on their way: close the socket.
    After NetlinkFailed it is as good as before.
    """

    def __init__(self, protocol: int = NETLINK_ROUTE, netns_fd: int | None = None) -> None:
        """Open it in the namespace of ``netns_fd`` (not taken over) or the thread's own."""
        self._sock = open_socket(protocol, netns_fd, receive_buffer=1 << 20)
        # The kernel's own timeout, as Python's costs a poll(2) before each receive.
        whole = int(REPLY_TIMEOUT)
        timeout = _TIMEVAL.pack(whole, int((REPLY_TIMEOUT - whole) * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        self._buffer = bytearray(_BUFFER)
        self._seq = 0

    def __enter__(self) -> NetlinkSocket:
        """Return the socket itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close the socket; a second time does nothing."""
        self._sock.close()

    def fileno(self) -> int:
        """Return the descriptor, -1 once closed."""
        return self._sock.fileno()

    def netns_cookie(self) -> int:
        """Return the cookie of the namespace that the socket belongs to (see netns.cookie)."""
        return cookie_of(self._sock)

    def execute(self, requests: Sequence[Request]) -> list[list[Message]]:
        """Send all requests in one system call (per BATCH_MAX) and return each one's replies.

        The kernel works through the whole batch in order and *goes on after a refusal*. So if
        RequestFailed is raised (for the first refused one, once every answer is in), all
        requests but those in its ``failed`` have been executed. When a later request must not
        run after an earlier one failed, use execute_until_failure(). Dumps go to dump().
        """
        replies: list[list[Message]] = []
        refused: list[tuple[int, int, str]] = []  # place, errno, extack
        for start, batch in _batches(requests):
            got, answers = self._round(batch)
            replies += got
            for place, (code, text) in enumerate(answers):
                if code and code not in batch[place].tolerate:
                    refused.append((start + place, code, text))
        if refused:
            place, code, text = refused[0]
            raise RequestFailed(code, requests[place].name, text, place, tuple(r[0] for r in refused))
        return replies

    def execute_until_failure(self, requests: Sequence[Request]) -> list[list[Message]]:
        """Send one at a time and stop at the first refusal.

        RequestFailed.index then says which: all before it were executed, none after it.
        """
        replies: list[list[Message]] = []
        for place, request in enumerate(requests):
            got, answers = self._round([request])
            code, text = answers[0]
            if code and code not in request.tolerate:
                raise RequestFailed(code, request.name, text, place, (place,))
            replies += got
        return replies

    def dump(self, request: Request) -> list[Message]:
        """Return every message of a dump, of one consistent pass.

        When something changed while the kernel was walking (NLM_F_DUMP_INTR), entries may be
        missing: the dump is then started again, a few times, and if that never gives a
        consistent list KernelFailed(EAGAIN) is raised rather than an incomplete list returned.
        """
        for _ in range(_DUMP_TRIES):
            found, consistent = self._dump_once(request)
            if consistent:
                return found
        raise KernelFailed(errno.EAGAIN, request.name, f"the list changed during {_DUMP_TRIES} readings")

    def _dump_once(self, request: Request) -> tuple[list[Message], bool]:
        seq = self._send([request._replace(flags=request.flags | NLM_F_DUMP)], ack=0)
        found: list[Message] = []
        consistent = True
        while True:
            for message in self._receive(request.name):
                if message.seq != seq:
                    continue
                if message.flags & NLM_F_DUMP_INTR and message.type != _NLMSG_ERROR:
                    consistent = False
                if message.type in (_NLMSG_ERROR, _NLMSG_DONE):
                    code, text = _answer(message)
                    if code and code not in request.tolerate:
                        raise RequestFailed(code, request.name, text, 0, (0,))
                    return found, consistent
                found.append(message)

    def _round(self, batch: Sequence[Request]) -> tuple[list[list[Message]], list[tuple[int, str]]]:
        """Send a batch; return each one's replies and each one's (errno, extack)."""
        first = self._send(batch, ack=NLM_F_ACK)
        count = len(batch)
        replies: list[list[Message]] = [[] for _ in batch]
        answers: list[tuple[int, str] | None] = [None] * count
        waiting = count
        while waiting:
            for message in self._receive(batch[answers.index(None)].name):
                place = message.seq - first
                if not 0 <= place < count:
                    continue  # of an earlier round that was given up
                if message.type != _NLMSG_ERROR:
                    replies[place].append(message)
                elif answers[place] is None:
                    answers[place] = _answer(message)
                    waiting -= 1
        return replies, [answer for answer in answers if answer is not None]

    def _send(self, batch: Sequence[Request], *, ack: int) -> int:
        """Send requests with consecutive sequence numbers and return the first."""
        first = seq = self._seq + 1
        parts: list[bytes] = []
        for request in batch:
            body = request.body
            length = _HEADER_LEN + len(body)
            parts += (
                _HEADER.pack(length, request.type, request.flags | NLM_F_REQUEST | ack, seq, 0),
                body,
                _PADDING[length & 3],
            )
            seq += 1
        self._seq = seq - 1 if seq < _SEQ_MAX else 0
        try:
            self._sock.send(b"".join(parts))
        except OSError as exc:
            raise KernelFailed(exc.errno or errno.EIO, "netlink send", batch[0].name) from exc
        return first

    def _receive(self, waiting_for: str) -> list[Message]:
        try:
            return receive(self._sock, self._buffer)
        except BlockingIOError as exc:
            why = f"no answer within {REPLY_TIMEOUT:g} s"
            raise KernelFailed(errno.ETIMEDOUT, waiting_for, why) from exc
        except OSError as exc:
            raise KernelFailed(exc.errno or errno.EIO, waiting_for, "receiving the answer") from exc


def _batches(requests: Sequence[Request]) -> Iterator[tuple[int, Sequence[Request]]]:
    """Cut into (place of the first, batch) within BATCH_MAX requests and _BATCH_BYTES bytes."""
    start = size = 0
    for place, request in enumerate(requests):
        length = _HEADER_LEN + len(request.body)
        if place > start and (place - start == BATCH_MAX or size + length > _BATCH_BYTES):
            yield start, requests[start:place]
            start, size = place, 0
        size += length
    if start < len(requests):
        yield start, requests[start:]
