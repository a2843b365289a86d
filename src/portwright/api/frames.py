"""Frames on a Unix stream socket, with file descriptors.

A frame is::

    u32 big-endian   length of the payload, without these five bytes
    u8               kind
    payload

Kinds from client to server: ``J`` (a JSON request), ``L`` (one that is large, for the few methods that
take it) and ``C`` (a raw CNI invocation, opaque here).
From server to client: ``j`` (the answer to a J), ``e`` (one event of a stream), ``c`` (the answer
to a C, opaque). A request holds at most :data:`MAX_REQUEST` bytes, a large one :data:`MAX_LARGE`, an answer
:data:`MAX_REPLY` (a list of thousands of ports is more than a mebibyte).

Descriptors travel by SCM_RIGHTS with the first byte of the frame they belong to, at most
:data:`MAX_FDS`. A sender gives such a frame a ``sendmsg`` of its own. The kernel may join bytes
sent *before* that message to it in one ``recvmsg``, but never bytes sent after it
(net/unix/af_unix.c, unix_stream_read_generic ends at an skb that carried descriptors): so
descriptors that come with a chunk belong to the last frame that begins in that chunk, and are
nobody's when none begins there.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from portwright.api.errors import ProtocolError

HEADER: Final = struct.Struct(">IB")
JSON_REQUEST: Final = ord("J")
LARGE_REQUEST: Final = ord("L")
JSON_REPLY: Final = ord("j")
EVENT: Final = ord("e")
CNI_REQUEST: Final = ord("C")
CNI_REPLY: Final = ord("c")
#: What a server accepts, and what a client accepts.
REQUEST_KINDS: Final = frozenset({JSON_REQUEST, LARGE_REQUEST, CNI_REQUEST})
REPLY_KINDS: Final = frozenset({JSON_REPLY, EVENT, CNI_REPLY})
#: 1 MiB for what a CNI caller writes to stdin, and 128 KiB for its environment
#: (Linux' MAX_ARG_STRLEN, the most that one variable can be).
MAX_REQUEST: Final = (1 << 20) + (128 << 10)
#: A folder of manifests: a file of the most bytes that one may have, twice over for JSON's escapes.
MAX_LARGE: Final = 16 << 20
MAX_REPLY: Final = 64 << 20
MAX_FDS: Final = 4
#: Bytes asked of one recvmsg.
CHUNK: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. Whoever takes it owns ``fds``."""

    kind: int
    payload: bytes
    fds: tuple[int, ...] = ()


def encode(kind: int, payload: bytes) -> bytes:
    """Return the bytes of one frame."""
    return HEADER.pack(len(payload), kind) + payload


class FrameDecoder:
    """Turns chunks of a stream into frames, as they become whole. Pure: it closes nothing.

    ``kinds`` are the kinds accepted, ``limit`` the most bytes of one payload, ``large`` of a large
    request's. Memory held is bounded by that plus one chunk. How the stream was cut into chunks makes
    no difference to the frames (descriptors go by the rule in the module's docstring).
    """

    def __init__(
        self, kinds: frozenset[int] = REQUEST_KINDS, limit: int = MAX_REQUEST, large: int = MAX_LARGE
    ) -> None:
        self._kinds = kinds
        self._limit = limit
        self._large = large
        self._buffer = bytearray()
        self._fds: tuple[int, ...] = ()
        self._orphans: list[int] = []
        self._broken: ProtocolError | None = None

    @property
    def partial(self) -> bool:
        """Whether a frame has begun and is not whole yet."""
        return bool(self._buffer)

    @property
    def large(self) -> bool:
        """Whether that frame is a large request, as far as is known: one chunk of it is held by then."""
        return len(self._buffer) >= HEADER.size and HEADER.unpack_from(self._buffer)[1] == LARGE_REQUEST

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> list[Frame]:
        """Return the frames that ``data`` completes, in order.

        Raises ProtocolError at a header whose length or kind is not allowed, before its payload
        is buffered, and at too many descriptors. From then on every call raises the same, nothing
        of the failing chunk is delivered, and all descriptors held are orphans.
        """
        if self._broken is not None:
            self._orphans.extend(fds)
            raise self._broken
        frames: list[Frame] = []
        try:
            self._decode(data, tuple(fds), frames)
        except ProtocolError as error:
            self._broken = error
            self._buffer.clear()
            for frame in frames:
                self._orphans.extend(frame.fds)
            self._orphans.extend(self._fds)
            self._fds = ()
            raise
        return frames

    def _decode(self, data: bytes, fds: tuple[int, ...], frames: list[Frame]) -> None:
        """Append the whole frames to ``frames``; keep the rest.

        Also when this raises, ``fds`` end in ``frames``, ``self._fds`` or ``self._orphans``.
        """
        held = len(self._buffer)  # bytes of a frame that began in an earlier chunk
        self._buffer += data
        buffer, at, newest = self._buffer, 0, -1  # newest: the last whole frame that began in this chunk
        if len(fds) > MAX_FDS:
            self._orphans.extend(fds)
            raise ProtocolError(f"{len(fds)} file descriptors with one message; the most is {MAX_FDS}")
        try:
            while len(buffer) - at >= HEADER.size:
                length, kind = self._header(at)
                end = at + HEADER.size + length
                if len(buffer) < end:
                    break
                if at >= held:
                    newest = len(frames)
                frames.append(Frame(kind, bytes(buffer[at + HEADER.size : end]), self._fds))
                self._fds = ()
                at = end
        except ProtocolError:
            self._orphans.extend(fds)
            raise
        if fds and held <= at < len(buffer):
            self._fds = fds
        elif fds and newest >= 0:
            frames[newest] = Frame(frames[newest].kind, frames[newest].payload, fds)
        else:
            self._orphans.extend(fds)
        del buffer[:at]

    def _header(self, at: int) -> tuple[int, int]:
        length, kind = HEADER.unpack_from(self._buffer, at)
        if kind not in self._kinds:
            raise ProtocolError(f"a frame of kind 0x{kind:02x} is not expected here")
        limit = self._large if kind == LARGE_REQUEST else self._limit
        if length > limit:
            raise ProtocolError(f"a frame of {length} bytes is over the limit of {limit}")
        return length, kind

    def take_orphans(self) -> list[int]:
        """Return descriptors that belong to no frame, for the caller to close."""
        orphans, self._orphans = self._orphans, []
        return orphans

    def abandon(self) -> list[int]:
        """End of the stream: return every descriptor still held, and forget what is buffered."""
        held = [*self.take_orphans(), *self._fds]
        self._fds = ()
        self._buffer.clear()
        return held


def peek(sock: socket.socket) -> bytes | None:
    """Next byte of a non-blocking socket, which stays there; b"" at its end or failure, None: none yet."""
    try:
        return sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def close_all(fds: Iterable[int]) -> None:
    """Close each descriptor; one that is closed already is our bug, and raises."""
    for fd in fds:
        os.close(fd)


def receive(sock: socket.socket, size: int = CHUNK) -> tuple[bytes, list[int]]:
    """One ``recvmsg``: bytes (b"" at the end of the stream) and descriptors, close-on-exec.

    Raises what ``recvmsg`` raises, and ProtocolError if more than :data:`MAX_FDS` came; the
    kernel and we have closed all of them then.
    """
    room = socket.CMSG_SPACE(MAX_FDS * 4)
    data, ancillary, flags, _ = sock.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, raw in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
    if flags & socket.MSG_CTRUNC:
        close_all(fds)
        raise ProtocolError(f"more than {MAX_FDS} file descriptors with one message")
    return data, fds.tolist()


def send_start(sock: socket.socket, data: bytes, fds: Sequence[int]) -> int:
    """One ``sendmsg`` of a frame's beginning with its descriptors: returns how many bytes went.

    The caller sends the rest without them. The descriptors stay the caller's.
    """
    if not fds:
        return sock.send(data, socket.MSG_NOSIGNAL)
    rights = array.array("i", fds).tobytes()
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_NOSIGNAL)
