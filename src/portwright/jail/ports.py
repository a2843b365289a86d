"""Ports of a jail: made in its namespace, handed over, and deleted when the namespace's owner is gone.

A port is durable: somebody has to delete it, after SIGKILL too. A jail's are known by their namespace's
cookie, which nobody else's have: there is no moment at which one of them is not known yet, and nobody else's
port is touched whatever its name.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from portwright.api.client import Client
from portwright.jail.guard import Guard
from portwright.kernel import netns, tap
from portwright.model.errors import InvalidInput, NotFound
from portwright.model.port import Port

MODEL: Final = "tcfilter"
_FACT: Final = re.compile(r"\{(fd|tap|mac|mtu):([^{}]*)\}")


def delete_ports(socket: Path, cookie: int) -> None:
    """Delete every port whose sandbox is the namespace with that cookie. Raises as the client does."""
    boot = netns.boot_id()
    with Client(socket) as client:
        for port in client.port_list():
            if port.sandbox.cookie == cookie and port.sandbox.boot_id == boot:
                with contextlib.suppress(NotFound):
                    client.port_delete(port.port_id)


@contextlib.contextmanager
def created(
    client: Client, namespace: int, networks: Sequence[str], *, name: str, labels: Mapping[str, str]
) -> Iterator[list[Port]]:
    """A port on each network, eth0, eth1, …; deleted at the end, also if this process is killed before.

    ``namespace``: a descriptor of one that is nobody else's. For a process with one thread. Raises what the
    daemon does.
    """
    with Guard(
        partial(delete_ports, client.socket, netns.cookie(namespace)),
        "the jail's ports are left (portwright port list)",
    ):
        yield [
            client.port_create(
                network,
                # Others find it by this path as long as we live.
                f"/proc/{os.getpid()}/fd/{namespace}",
                ifname=f"eth{index}",
                name=name if index == 0 else f"{name}-{index}",
                labels=labels,
                model=MODEL,
            )
            for index, network in enumerate(networks)
        ]


class Handed:
    """What goes into a command's words: ``{fd:NAME}`` is a descriptor's number.

    Of a port ``{fd:eth0}`` is its tap, opened; ``{tap:eth0}`` the tap's name, for a hypervisor that opens it
    itself; ``{mac:eth0}`` and ``{mtu:eth0}`` what its guest has to have. Close it when the jail is started.
    """

    def __init__(
        self, namespace: int, ports: Sequence[Port], fds: Mapping[str, int], *, uid: int, gid: int
    ) -> None:
        self._namespace = namespace
        self._ports = {port.ifname: port for port in ports}
        self._names = dict(fds)
        self._opened: list[int] = []
        self._owner = uid, gid
        self._given: set[str] = set()

    def words(self, command: Sequence[str]) -> tuple[str, ...]:
        """The command with all of these replaced. Raises InvalidInput for a name that there isn't."""
        return tuple(_FACT.sub(self._fact, word) for word in command)

    @property
    def fds(self) -> tuple[int, ...]:
        """The descriptors to hand over."""
        return tuple(self._names.values())

    def close(self) -> None:
        """Close the taps that were opened here."""
        for fd in self._opened:
            os.close(fd)
        self._opened.clear()

    def _fact(self, found: re.Match[str]) -> str:
        kind, name = found[1], found[2]
        port = self._ports.get(name)
        if kind == "fd":
            if port is not None and name not in self._names:
                fd = tap.open_queue(self._namespace, port.tap)
                self._opened.append(fd)
                self._names[name] = fd
            if name in self._names:
                return str(self._names[name])
            raise InvalidInput("command", found[0], f"there are {self._known(self._names, self._ports)}")
        if port is None:
            raise InvalidInput("command", found[0], f"there are the ports {self._known(self._ports)}")
        if kind == "tap" and name not in self._given:
            tap.give(self._namespace, port.tap, *self._owner)
            self._given.add(name)
        return {"tap": port.tap, "mac": port.mac, "mtu": str(port.mtu)}[kind]

    @staticmethod
    def _known(*names: Mapping[str, object]) -> str:
        return ", ".join(dict.fromkeys(name for each in names for name in each)) or "none (--fd, --port)"
