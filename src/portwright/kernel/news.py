"""A word to whoever follows a sandbox's ports: that there is news of them. What it is the record says.

``<run dir>/vm/<cookie>.news`` is the follower's datagram socket, with the cookie of the sandbox's namespace.
Telling waits for nobody and holds no connection, so a daemon may have thousands of followers, and each of
them costs nothing while nothing changes. A word may be lost with the daemon: its next start tells everybody.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from portwright.model.errors import KernelFailed

_SUFFIX: Final = ".news"

log = logging.getLogger(__name__)


def _path(run_dir: Path, cookie: int) -> Path:
    return run_dir / "vm" / f"{cookie}{_SUFFIX}"


@contextlib.contextmanager
def heard(run_dir: Path, cookie: int) -> Iterator[socket.socket]:
    """A socket that is readable from each word on, until that is read; at the end socket and path are gone.

    Its folder has to be there. Raises KernelFailed.
    """
    where = _path(run_dir, cookie)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        try:
            where.unlink(missing_ok=True)  # of an earlier boot: within one no cookie comes twice
            # bind() gives the file the mode of the socket's inode, less the umask: never wider.
            os.fchmod(sock.fileno(), 0o600)
            sock.bind(str(where))
        except OSError as error:
            raise KernelFailed(error.errno or 0, f"bind {where}", str(error)) from None
        try:
            yield sock
        finally:
            sweep(run_dir, cookie)


def sweep(run_dir: Path, cookie: int) -> None:
    """Remove the path of a follower that is gone."""
    _path(run_dir, cookie).unlink(missing_ok=True)


def tell(run_dir: Path, cookie: int) -> None:
    """There is news of the ports in that sandbox. Where nobody follows them nothing happens."""
    _tell(_path(run_dir, cookie))


def tell_all(run_dir: Path) -> None:
    """The same to everybody; what followers that were killed have left is removed."""
    for where in (run_dir / "vm").glob(f"*{_SUFFIX}"):
        if not _tell(where):
            where.unlink(missing_ok=True)


def _tell(where: Path) -> bool:
    """Whether somebody is there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        try:
            sock.sendto(b"\n", str(where))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except BlockingIOError:
            pass  # it has not read the last ones, and what it reads then is what is true by then
        except OSError as error:
            log.warning("%s: is not told of a change: %s", where, error)
    return True
