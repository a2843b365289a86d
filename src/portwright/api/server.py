"""The daemon's Unix socket: makes it, accepts, and hands each connection to its own object.

Knows nothing of the daemon: ``dispatch`` does. The socket's mode is 0600 from the moment that it
exists, and its path only ever names a socket that is listened on.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from portwright.api import frames
from portwright.api.connection import Connection, Dispatch
from portwright.api.request import Peer, Slots
from portwright.model.errors import Conflict, InvalidInput

#: Connections waiting to be accepted; the kernel takes the least of it and net.core.somaxconn.
BACKLOG: Final = 4096
#: systemd passes listening sockets from this descriptor on (sd_listen_fds(3)).
LISTEN_FDS_START: Final = 3
#: At once, over all connections: each may take a few times frames.MAX_LARGE of memory.
MAX_LARGE_REQUESTS: Final = 2
_ACCEPT_PAUSE: Final = 0.5  # seconds without accepting once descriptors have run out

_log = logging.getLogger(__name__)
_UCRED = struct.Struct("3i")  # pid, uid, gid


def root_or_self(peer: Peer) -> bool:
    """Allow root and the user that this process runs as."""
    return peer.uid in (0, os.geteuid())


class Server:
    """Serves ``dispatch`` on the socket at ``path``, or on ``listener`` (then nothing is made or removed).

    ``dispatch`` is given each request, and returns what JSON can hold (structs of msgspec included),
    an async iterator for a stream, or bytes for a CNI request; what it raises becomes the answer.
    Peers that ``authorize`` refuses are told and closed. Over ``max_connections`` at once, the next
    ones wait in the backlog, in order; a quarter of them may be streams. See
    :mod:`portwright.api.connection` for what bounds one connection.
    """

    def __init__(
        self,
        path: str | Path,
        dispatch: Dispatch,
        *,
        authorize: Callable[[Peer], bool] = root_or_self,
        max_connections: int = 256,
        idle_timeout: float = 30.0,
        listener: socket.socket | None = None,
    ) -> None:
        self._path = Path(path)
        self._dispatch = dispatch
        self._authorize = authorize
        self._max = max_connections
        self._idle_timeout = idle_timeout
        self._listener = listener
        self._streams = Slots("streams", max(1, max_connections // 4))
        self.large_slots = Slots("large requests", MAX_LARGE_REQUESTS)
        self._connections: set[Connection] = set()
        self._lock = -1
        self._identity: tuple[int, int] | None = None
        self._accepting = False
        self._closing = False
        self._empty = asyncio.Event()

    @property
    def connections(self) -> int:
        """How many connections are served now."""
        return len(self._connections)

    async def start(self) -> None:
        """Listen and accept.

        The path's directory has to exist. Raises Conflict if another process listens at the path or
        something else is there, InvalidInput if the path can't hold a socket. A
        socket that nobody listens on is replaced.
        """
        if self._listener is None:
            self._listener = self._bind()
        self._listener.setblocking(False)
        self._resume()

    async def close(self, grace: float = 10.0) -> None:
        """Remove the socket, finish running requests for at most ``grace`` seconds, close everything.

        Streams end at once. Requests that still run after ``grace`` are cancelled.
        """
        self._closing = True
        self._pause()
        if self._listener is not None:
            self._unlink()
            self._listener.close()
            self._listener = None
        for connection in list(self._connections):
            connection.end()
        if not await self._wait_empty(grace):
            for connection in list(self._connections):
                connection.cancel()
            await self._wait_empty(grace)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    async def __aenter__(self) -> Self:
        """Start."""
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.close()

    async def _wait_empty(self, seconds: float) -> bool:
        if self._connections:
            self._empty.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._empty.wait()
            except TimeoutError:
                return False
        return True

    # --- the path ---------------------------------------------------------------------------------

    def _bind(self) -> socket.socket:
        """Make the listening socket under a name of its own, then rename it to the path."""
        lock = self._path.with_name(self._path.name + ".lock")
        fresh = self._path.with_name(f".{os.getpid()}.sock")
        self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            try:
                # Two daemons that start together must not each take the other's socket for stale.
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Conflict("socket", str(self._path), "another daemon serves it") from None
            self._check_stale()
            # bind() gives the file the socket inode's mode, less the umask: never wider, at no moment.
            os.fchmod(sock.fileno(), 0o600)
            fresh.unlink(missing_ok=True)
            try:
                sock.bind(str(fresh))
            except OSError as error:
                if error.errno is None or error.errno == errno.ENAMETOOLONG:
                    why = "too long for a Unix socket (107 bytes); choose a shorter --run-dir"
                    raise InvalidInput("run_dir", str(self._path), why) from None
                raise
            try:
                sock.listen(BACKLOG)
                found = fresh.stat()
                self._identity = (found.st_dev, found.st_ino)
                fresh.replace(self._path)
            except BaseException:
                fresh.unlink(missing_ok=True)
                raise
        except BaseException:
            sock.close()
            os.close(self._lock)
            self._lock = -1
            raise
        return sock

    def _check_stale(self) -> None:
        """Return if the path is free or a socket that nobody listens on. Raises Conflict."""
        try:
            mode = self._path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise Conflict("socket", str(self._path), "the path exists and is not a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(self._path))
            except (ConnectionRefusedError, FileNotFoundError):
                return
            except BlockingIOError:
                pass  # listened on, with a full backlog
        raise Conflict("socket", str(self._path), "another daemon listens on it")

    def _unlink(self) -> None:
        """Remove the path if it still is the socket that we made."""
        if self._identity is None:
            return
        try:
            found = self._path.lstat()
        except FileNotFoundError:
            return
        if (found.st_dev, found.st_ino) == self._identity:
            self._path.unlink(missing_ok=True)

    # --- accepting --------------------------------------------------------------------------------

    def _resume(self) -> None:
        if self._accepting or self._listener is None or self._closing:
            return
        if len(self._connections) < self._max:
            self._accepting = True
            asyncio.get_running_loop().add_reader(self._listener, self._on_connection)

    def _pause(self) -> None:
        if self._accepting and self._listener is not None:
            self._accepting = False
            asyncio.get_running_loop().remove_reader(self._listener)

    def _on_connection(self) -> None:
        """Accept one; the loop calls again while more wait, so that requests get their turn between."""
        assert self._listener is not None  # noqa: S101 - the reader is removed before it is
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors or memory: the socket stays readable, so don't spin on it.
            _log.error("accept: %s; trying again in %g s", error, _ACCEPT_PAUSE)
            self._pause()
            asyncio.get_running_loop().call_later(_ACCEPT_PAUSE, self._resume)
            return
        sock.setblocking(False)
        peer = Peer(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))
        if not self._authorize(peer):
            _log.warning("refused pid %d of uid %d", peer.pid, peer.uid)
            _refuse(sock, peer)
            return
        self._connections.add(
            Connection(
                sock,
                peer,
                self._dispatch,
                idle_timeout=self._idle_timeout,
                streams=self._streams,
                large=self.large_slots,
                on_close=self._forget,
            )
        )
        if len(self._connections) >= self._max:
            self._pause()

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()
        self._resume()


def _refuse(sock: socket.socket, peer: Peer) -> None:
    """Tell the peer that it may not, and close."""
    message = f"uid {peer.uid} may not use this socket; run as root"
    answer = {"id": None, "error": {"code": "not-authorized", "message": message, "facts": {"uid": peer.uid}}}
    with sock:
        try:
            sock.send(frames.encode(frames.JSON_REPLY, msgspec.json.encode(answer)), socket.MSG_NOSIGNAL)
        except OSError:
            return  # gone already


def passed_listener(environ: Mapping[str, str]) -> socket.socket | None:
    """Return the listening socket that systemd passed (socket activation), or None if it passed none.

    Raises InvalidInput if it is not one listening Unix stream socket. The caller owns it, and
    should drop LISTEN_PID and LISTEN_FDS from what it passes to its children.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = environ.get("LISTEN_FDS", "")
    if count != "1":
        raise InvalidInput("LISTEN_FDS", count, "the socket unit has to pass exactly one socket")
    os.set_inheritable(LISTEN_FDS_START, False)
    sock = socket.socket(fileno=LISTEN_FDS_START)
    listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not listening:
        sock.detach()
        raise InvalidInput("LISTEN_FDS", count, "descriptor 3 is not a listening Unix stream socket")
    return sock
