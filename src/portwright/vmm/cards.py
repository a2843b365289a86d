"""A NIC as a hypervisor is given it: descriptors of its queues, and if that is on of a vhost-net for each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from portwright.kernel import macvtap, netns, tap
from portwright.model.errors import NotFound
from portwright.model.port import Port
from portwright.vmm import vhost
from portwright.vmm.spec import Nic


@dataclass(frozen=True)
class Card:
    """What is open of a NIC; a context manager. A hypervisor that was given them has copies of its own."""

    fds: tuple[int, ...]
    vhost_fds: tuple[int, ...] = ()

    def close(self) -> None:
        """Let go of all of them."""
        for fd in (*self.fds, *self.vhost_fds):
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def nic_of(port: Port, *, vhost: bool = False) -> Nic:
    """The NIC on a port, whatever model: of one with a tap."""
    if port.model == "tap":  # the representor itself, in the host's namespace, and its own link
        return Nic(
            tap=port.tap,
            mac=port.mac,
            mtu=port.mtu,
            queues=port.queues,
            device=port.tap,
            home=port.host.cookie,
            vhost=vhost,
        )
    return Nic(
        tap=port.tap,
        mac=port.mac,
        mtu=port.mtu,
        queues=port.queues,
        device=port.ifname,
        kind="macvtap" if port.model == "macvtap" else "tap",
        vhost=vhost,
    )


def open_card(nic: Nic, namespace_fd: int) -> Card:
    """Open every queue of a NIC; ``namespace_fd`` is the sandbox's.

    Raises Conflict for a tap that is in use, NotFound for one, or a namespace of a NIC's own, that is not
    there, KernelFailed. Then nothing is open.
    """
    opened: list[int] = []
    home = home_of(nic, namespace_fd)
    try:
        if nic.kind == "macvtap":
            opened += macvtap.open_queues(home, nic.tap, nic.queues)
        else:
            for _ in range(nic.queues):
                opened.append(tap.open_queue(home, nic.tap, multi_queue=nic.queues > 1))
        for _ in range(nic.queues if nic.vhost else 0):
            opened.append(vhost.open_device())
    except BaseException:
        Card(tuple(opened)).close()
        raise
    finally:
        os.close(home)
    return Card(tuple(opened[: nic.queues]), tuple(opened[nic.queues :]))


def home_of(nic: Nic, namespace_fd: int) -> int:
    """A descriptor, the caller's to close, of the namespace that the NIC's tap and device are in.

    ``namespace_fd`` is the sandbox's. Raises NotFound.
    """
    if not nic.home:
        return os.dup(namespace_fd)
    found = netns.find_by_cookie(nic.home)
    if found is None:
        raise NotFound("namespace", f"of {nic.tap}")
    return found
