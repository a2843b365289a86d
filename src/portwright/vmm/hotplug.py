"""The cards of a running guest at its hypervisor: they come and go by QMP, and have their devices' links.

A card is known by its number, that of the root port that it is in (spec.py). Its descriptors travel with
QMP's ``getfd``, one at a time, and have names until ``netdev_add`` takes them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from portwright.kernel.monitor import LinkEvent, LinkMonitor
from portwright.kernel.netlink import NetlinkSocket
from portwright.kernel.rtnl import link_by_name
from portwright.vmm.cards import Card
from portwright.vmm.contract import CardFailed
from portwright.vmm.links import Links
from portwright.vmm.spec import GuestSpec, Nic, nic_device

if TYPE_CHECKING:
    from qemu.qmp import Message, QMPClient

#: Seconds that QEMU has for a card, and for each step of taking one back.
_WITHIN, _UNDO_WITHIN = 30.0, 5.0


class Cards:
    """Of one guest; for one event loop. Its QMP, its monitor and the namespace stay the caller's."""

    def __init__(self, spec: GuestSpec, qmp: QMPClient, monitor: LinkMonitor, namespace: int) -> None:
        self._name = spec.name
        self._qmp = qmp
        self._monitor = monitor
        self._namespace = namespace
        self._links = Links(spec.nics)
        self._news: asyncio.Queue[LinkEvent] = asyncio.Queue()
        #: A descriptor, and the command that names it, come one behind the other.
        self._passing = asyncio.Lock()
        #: Called with the number of a card that the guest has let go of, whoever wanted that.
        self.deleted: Callable[[int], None] = _nobody
        self._tasks: list[asyncio.Task[None]] = []

    def heard(self, event: Message) -> bool:
        """For a listener to DEVICE_DELETED, as its filter: it keeps none of what it heard."""
        data: Any = event.get("data", {})
        device = str(data.get("device", ""))  # none: a part of one
        if device.startswith("nic"):
            self.deleted(int(device.removeprefix("nic")))
        return False

    def follow(self) -> None:
        """From now on QEMU hears of links."""
        asyncio.get_running_loop().add_reader(self._monitor.fileno(), self._hear)
        self._tasks.append(asyncio.create_task(self._obey(), name="guest links"))

    async def close(self) -> None:
        """End that; before the monitor is closed."""
        asyncio.get_running_loop().remove_reader(self._monitor.fileno())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def plug(self, number: int, nic: Nic, card: Card, ifname: str) -> None:
        """Put a card into a root port that is free. Raises CardFailed; then QEMU has nothing of it."""
        from qemu.qmp import QMPError  # noqa: PLC0415 - of the extra: see qemu.py

        async with contextlib.AsyncExitStack() as undo:
            try:
                async with asyncio.timeout(_WITHIN):
                    fds = [await self._given(fd, f"card{number}-{i}", undo) for i, fd in enumerate(card.fds)]
                    vhost = [
                        await self._given(fd, f"vhost{number}-{i}", undo)
                        for i, fd in enumerate(card.vhost_fds)
                    ]
                    await self._qmp.execute("netdev_add", _netdev(number, fds, vhost))
                    undo.push_async_callback(self._try, "netdev_del", id=f"net{number}")
                    await self._qmp.execute("device_add", nic_device(number, nic))
            except TimeoutError:
                raise CardFailed(self._name, ifname, f"QEMU has not taken it in {_WITHIN:g} s") from None
            except (QMPError, OSError) as error:
                raise CardFailed(self._name, ifname, f"QEMU did not take it: {error}") from None
            undo.pop_all()
        self._links.add(number, nic)
        if nic.device:  # its news of before were nobody's
            with NetlinkSocket(netns_fd=self._namespace) as ask:
                link = link_by_name(ask, nic.device)
            if link is not None:
                self._news.put_nowait(LinkEvent(kind="new", link=link))

    async def ask_back(self, number: int, ifname: str) -> None:
        """Ask the guest to let go of a card; ``deleted`` says when it has. Raises CardFailed."""
        from qemu.qmp import ExecuteError, QMPError  # noqa: PLC0415 - of the extra: see qemu.py

        try:
            async with asyncio.timeout(_WITHIN):
                await self._qmp.execute("device_del", {"id": f"nic{number}"})
        except ExecuteError as error:
            # Asked already, or gone a moment ago: both come to an end by the event.
            if error.error_class != "DeviceNotFound" and "in the process of unplug" not in str(error):
                raise CardFailed(self._name, ifname, f"QEMU does not take it out: {error}") from None
        except (QMPError, TimeoutError) as error:
            raise CardFailed(self._name, ifname, f"QEMU does not answer: {error}") from None

    async def drop(self, number: int) -> None:
        """Make QEMU close what it has of a card that the guest let go of."""
        self._links.forget(number)
        await self._try("netdev_del", id=f"net{number}")

    # -- inside ----------------------------------------------------------------------------------

    async def _given(self, fd: int, name: str, undo: contextlib.AsyncExitStack) -> str:
        """Give QEMU the descriptor under that name."""
        async with self._passing:
            self._qmp.send_fd_scm(fd)
            undo.push_async_callback(self._try, "closefd", fdname=name)
            await self._qmp.execute("getfd", {"fdname": name})
        return name

    async def _try(self, command: str, **arguments: object) -> None:
        """What can fail only where it is not needed: QEMU has it not, or is gone."""
        from qemu.qmp import QMPError  # noqa: PLC0415 - of the extra: see qemu.py

        with contextlib.suppress(QMPError, TimeoutError):
            async with asyncio.timeout(_UNDO_WITHIN):
                await self._qmp.execute(command, arguments)

    def _hear(self) -> None:
        for event in self._monitor.read():
            self._news.put_nowait(event)

    async def _obey(self) -> None:
        while True:
            for order in self._links.orders(await self._news.get()):
                await self._try(order.command, **order.arguments)


def _netdev(number: int, fds: list[str], vhost: list[str]) -> dict[str, object]:
    several = "s" if len(fds) > 1 else ""
    netdev: dict[str, object] = {"type": "tap", "id": f"net{number}", f"fd{several}": ":".join(fds)}
    if vhost:
        netdev |= {"vhost": True, f"vhostfd{several}": ":".join(vhost)}
    return netdev


def _nobody(_number: int) -> None:
    return
