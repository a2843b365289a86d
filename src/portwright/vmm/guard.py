"""What a guest leaves behind that does not end by itself: its namespace's ports, and its sockets.

Its hypervisor and its namespace end with whoever holds them, whatever ends that.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from portwright.jail import guard
from portwright.jail.ports import delete_ports
from portwright.kernel import news
from portwright.vmm import control
from portwright.vmm.firecracker import home


class Guard(guard.Guard):
    """Removes them when it is left, or when this process ends before that: see portwright.jail.guard.

    ``socket`` is the daemon's, ``cookie`` the namespace's, ``name`` the guest's.
    """

    def __init__(self, socket: Path, cookie: int, name: str) -> None:
        left = "the guest's ports are left (portwright port list)"
        super().__init__(partial(_clean, socket, cookie, name), left)


def _clean(socket: Path, cookie: int, name: str) -> None:
    control.sweep(socket.parent, name)
    home.sweep(control.folder(socket.parent), name, cookie)
    news.sweep(socket.parent, cookie)
    delete_ports(socket, cookie)
