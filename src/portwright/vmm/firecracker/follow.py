"""A running guest's token buckets follow the limits of its ports.

A word of the daemon's (kernel/news.py) is only the reason to look: what the ports have now is read, and sent
where it differs from what was sent last, since a bucket that is sent again is full again. So a change that
came while the daemon was gone, or before the guest ran, needs no case of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from portwright.api.aio import AsyncClient
from portwright.api.errors import ConnectionLost
from portwright.model.errors import DaemonUnavailable, InvalidInput, NotFound, PortwrightError
from portwright.model.port import Limits, Port
from portwright.vmm.firecracker.guest import FirecrackerGuest
from portwright.vmm.firecracker.limits import fitted

#: What ports have now, by their ids; those that are gone are left out. Raises PortwrightError.
Ask = Callable[[Sequence[str]], Awaitable[Mapping[str, Limits]]]
#: How often Firecracker is asked for the same.
TRIES: Final = 3
#: Seconds before it, or a silent daemon, is asked again; they double each time, up to the longest.
_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
#: Seconds in which a process that failed us turns out to have ended, which is no fault to tell of.
_END_WITHIN: Final = 0.2
_STAYS: Final = "its buckets may stay as they were until those change again"


class LimitsFollower:
    """Of one guest with these ports, whose limits were sent as they were in ``ports``.

    Nothing here ends the guest: what can't be done is said on stderr, and is done with the next word.
    """

    def __init__(
        self, guest: FirecrackerGuest, ports: Sequence[Port], ask: Ask, *, pause: float = _PAUSE
    ) -> None:
        self._guest = guest
        self._ask = ask
        self._pause = pause
        self._ports = {port.ifname: port.port_id for port in ports}
        #: By NIC; None where nobody knows what it has now.
        self._sent: dict[str, Limits | None] = {port.ifname: _wanted(port.limits) for port in ports}
        self._news = asyncio.Event()
        self._news.set()  # what changed before anybody listened

    @contextlib.asynccontextmanager
    async def following(self, word: socket.socket) -> AsyncIterator[None]:
        """Follow until the end, by the words that come on that socket."""
        loop = asyncio.get_running_loop()
        loop.add_reader(word, self._heard, word)
        task = loop.create_task(self._follow(), name="limits")
        try:
            yield
        finally:
            loop.remove_reader(word)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _heard(self, word: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            word.recv(1)
        self._news.set()

    async def _follow(self) -> None:
        silent = refused = 0  # looks in a row to which the daemon, or Firecracker, did not agree
        pause: float | None = None
        while True:
            if await self._word_within(pause):
                silent = refused = 0
            found = await self._asked(first=not silent)
            silent = 0 if found is not None else silent + 1
            if found is not None:
                last = refused + 1 >= TRIES
                refused = refused + 1 if await self._send(found, last=last) else 0
            again = silent or (refused if refused < TRIES else 0)
            pause = min(self._pause * 2.0 ** min(again - 1, 10), _LONGEST_PAUSE) if again else None

    async def _word_within(self, seconds: float | None) -> bool:
        """Wait for a word; whether one came."""
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return False
        self._news.clear()
        return True

    async def _asked(self, *, first: bool) -> Mapping[str, Limits] | None:
        """What the ports have; None where the daemon does not say."""
        try:
            return await self._ask(tuple(self._ports.values()))
        except (DaemonUnavailable, ConnectionLost):
            return None  # it is stopped, and its next start sends a word
        except PortwrightError as error:
            if first:
                self._say(f"the daemon doesn't say its ports' limits, and is asked again: {error}")
            return None

    async def _send(self, found: Mapping[str, Limits], *, last: bool) -> bool:
        """Send what is new; whether some of it is to be sent again."""
        failed = False
        for ifname, port_id in list(self._ports.items()):
            if port_id not in found:  # deleted by somebody, and its tap with it
                del self._ports[ifname], self._sent[ifname]
                continue
            try:
                limits = _wanted(found[port_id])
                if limits != self._sent[ifname]:
                    self._sent[ifname] = None
                    await self._guest.driver.set_limits(ifname, limits)
                    self._sent[ifname] = limits
            except InvalidInput as error:  # no bucket is so large, however often it is asked for
                self._say_refused(ifname, error, _STAYS)
            except PortwrightError as error:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_END_WITHIN):
                        await self._guest.gone.wait()
                if self._guest.gone.is_set():
                    return False
                self._say_refused(ifname, error, _STAYS if last else "it is asked again")
                failed = True
        return failed

    def _say_refused(self, ifname: str, error: PortwrightError, then: str) -> None:
        self._say(f"{ifname}: Firecracker has not taken the port's new limits, {then}: {error}")

    def _say(self, sentence: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it: no reason to end
            sys.stderr.write(f"portwright: guest {self._guest.spec.name!r}: {sentence}\n")
            sys.stderr.flush()


def _wanted(limits: Limits) -> Limits:
    """What buckets say of a port's limits. Raises InvalidInput."""
    return fitted(
        msgspec.structs.replace(  # a port may have a burst without a rate, which limits nothing
            limits,
            egress_burst=limits.egress_burst if limits.egress_rate else 0,
            ingress_burst=limits.ingress_burst if limits.ingress_rate else 0,
        )
    )


def asking(daemon: Path, within: float) -> Ask:
    """Ask the daemon at that socket, ``within`` so many seconds for each port; no connection is kept."""

    async def ask(port_ids: Sequence[str]) -> Mapping[str, Limits]:
        found: dict[str, Limits] = {}
        async with AsyncClient(daemon, timeout=within) as client:
            for port_id in port_ids:
                with contextlib.suppress(NotFound):
                    found[port_id] = (await client.port_show(port_id)).limits
        return found

    return ask
