"""What a running guest answers on its control socket if its NICs stay as they were when it started."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from socket import socket
from typing import NoReturn

from portwright.api.request import Request
from portwright.model.port import Port
from portwright.vmm import matrix
from portwright.vmm.contract import FreezeParams, PlugParams, ShowParams, Started, UnplugParams, facts_of
from portwright.vmm.firecracker import capabilities
from portwright.vmm.firecracker.guest import FirecrackerGuest
from portwright.vmm.service import Sandbox, answering


class FixedService:
    """The methods of a Firecracker guest with these ``ports``, eth0 first."""

    def __init__(self, guest: FirecrackerGuest, sandbox: Sandbox, ports: Sequence[Port]) -> None:
        self._guest = guest
        self._sandbox = sandbox
        self._ports = ports

    @contextlib.asynccontextmanager
    async def serving(self, listener: socket) -> AsyncIterator[None]:
        """Answer on the socket until the end."""
        async with answering(self, listener):
            yield

    def facts(self) -> Started:
        """What the guest is, and its NICs."""
        return Started(
            name=self._guest.spec.name,
            pid=self._guest.pid,
            accel=self._guest.spec.accel,
            nics=tuple(map(facts_of, self._ports)),
            model=self._sandbox.model,
            vmm="firecracker",
        )

    async def vm_show(self, _params: ShowParams, _request: Request) -> Started:
        """As :meth:`facts`."""
        return self.facts()

    async def vm_plug(self, _params: PlugParams, _request: Request) -> NoReturn:
        """Raises NotSupported, with the version that could."""
        self._refuse("hotplug")

    async def vm_unplug(self, _params: UnplugParams, _request: Request) -> NoReturn:
        """Raises NotSupported, with the version that could."""
        self._refuse("unplug")

    async def vm_freeze(self, _params: FreezeParams, _request: Request) -> NoReturn:
        """Raises NotSupported."""
        matrix.require("freeze", "firecracker", self._sandbox.model)
        raise AssertionError("the matrix has no such row")

    def _refuse(self, feature: str) -> NoReturn:
        # Whatever its version: `vm run` starts it without --enable-pci, a developers' preview.
        capabilities.require(feature, self._guest.driver.version, pci=False)
        raise AssertionError(feature)
