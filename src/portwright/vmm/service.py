"""What a running guest does when asked on its control socket (contract.py): say what it has, plug, unplug.

A NIC is on record here from the moment that its number and its name are taken, until its port is deleted. A
guest may let go of a card whenever it likes, or long after it was asked to: that ends the card in the same
way.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from typing import Literal

from portwright import __version__
from portwright.api import calls
from portwright.api.aio import AsyncClient
from portwright.api.calls import Call
from portwright.api.errors import ConnectionLost, RequestTimeout
from portwright.api.registry import Registry
from portwright.api.request import Request
from portwright.api.server import Server
from portwright.kernel import netns
from portwright.model.errors import Conflict, InvalidInput, NotFound, PortwrightError
from portwright.model.network import Network
from portwright.model.port import Port
from portwright.vmm import frozen
from portwright.vmm.cards import nic_of, open_card
from portwright.vmm.cmdline import network_words
from portwright.vmm.contract import (
    CONTRACT,
    CardHeld,
    FreezeParams,
    Frozen,
    NicFacts,
    PlugParams,
    ShowParams,
    Started,
    UnplugParams,
    facts_of,
)
from portwright.vmm.driver import State
from portwright.vmm.qemu import Guest
from portwright.vmm.spec import MAX_NICS, Nic

#: Callers at once, and seconds that the guest's end waits for what they asked.
_CALLERS, _GRACE = 16, 2.0
#: Seconds for each call to the daemon, and between two requests to let go of a card.
CALL_WITHIN, _ASK_EVERY = 60.0, 1.0


@dataclass(frozen=True)
class Sandbox:
    """Where a guest's ports are: the namespace, its path for others, and what its NICs have in common."""

    namespace: int
    path: str
    model: str
    vhost: bool

    def nic(self, port: Port) -> Nic:
        """The NIC on one of them."""
        return nic_of(port, vhost=self.vhost)


class _State(enum.Enum):
    PLUGGING = "is being plugged"
    PLUGGED = "is plugged"
    UNPLUGGING = "is being unplugged"


@dataclass
class _Card:
    """``ending``: what is done once the guest has let go, from that moment."""

    number: int
    index: int
    state: _State
    port: Port | None = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    ending: asyncio.Task[None] | None = None

    @property
    def ifname(self) -> str:
        return f"eth{self.index}"


def wanted(guest: str, index: int, network: str, sandbox: Sandbox, **options: object) -> Call[Port]:
    """The call that makes the port of a guest's NIC ``eth<index>``, in a namespace of the guest's own."""
    # Nobody else has filters or a qdisc on the device there, which this way past its egress would hide from.
    join: Literal["peer"] | None = (
        "peer" if sandbox.model == "tcfilter" and not options.get("inner_addresses") else None
    )
    return calls.port_create(
        network,
        sandbox.path,
        ifname=f"eth{index}",
        name=guest if index == 0 else f"{guest}-{index}",
        model=sandbox.model,
        join=join,
        **options,  # type: ignore[arg-type]  # labels and queues, as the callers' own parameters are
    )


def only_network(networks: Sequence[Network]) -> str:
    """The name of the only one there is. Raises InvalidInput where there are more, or none."""
    names = [network.name for network in networks]
    if len(names) == 1:
        return names[0]
    why = f"name one of {', '.join(names)}" if names else "there is none yet: portwright network create"
    raise InvalidInput("network", None, why)


@contextlib.asynccontextmanager
async def answering(handlers: object, listener: socket) -> AsyncIterator[None]:
    """Answer by these methods on a guest's control socket until the end."""
    registry = Registry(handlers, version=__version__, contract=CONTRACT)
    server = Server("", registry.dispatch, listener=listener, max_connections=_CALLERS)
    await server.start()
    try:
        yield
    finally:
        await server.close(_GRACE)


class Service:
    """The methods of a guest with these ``ports``, eth0 first."""

    def __init__(self, guest: Guest, client: AsyncClient, sandbox: Sandbox, ports: Sequence[Port]) -> None:
        self._guest = guest
        self._client = client
        self._sandbox = sandbox
        self._cookie = netns.cookie(sandbox.namespace)
        self._cards = {n: _Card(n, n, _State.PLUGGED, port) for n, port in enumerate(ports)}
        self._numbers = list(range(MAX_NICS))
        #: Names of NICs whose port may be there still, or again: nobody could tell.
        self._doubtful: set[str] = set()
        self._freezing = False
        guest.cards.deleted = self._deleted

    @contextlib.asynccontextmanager
    async def serving(self, listener: socket) -> AsyncIterator[None]:
        """Answer on the socket until the end."""
        try:
            async with answering(self, listener):
                yield
        finally:
            await self._client.close()

    def facts(self) -> Started:
        """What the guest is, and the NICs that it has."""
        ports = [card.port for card in self._ordered() if card.state is not _State.PLUGGING and card.port]
        return Started(
            name=self._guest.spec.name,
            pid=self._guest.pid,
            accel=self._guest.spec.accel,
            nics=tuple(map(facts_of, ports)),
            model=self._sandbox.model,
            vhost=self._sandbox.vhost,
        )

    async def vm_show(self, _params: ShowParams, _request: Request) -> Started:
        """As :meth:`facts`."""
        return self.facts()

    async def vm_plug(self, params: PlugParams, _request: Request) -> NicFacts:
        """Give the guest one more NIC.

        Raises what the daemon does, Conflict where the guest has no room or ends, CardFailed; then there is
        neither card nor port.
        """
        card = self._reserved()
        try:
            port = card.port = await self._created(card, params)
            try:
                nic = self._sandbox.nic(port)
                with open_card(nic, self._sandbox.namespace) as opened:
                    await self._guest.cards.plug(card.number, nic, opened, card.ifname)
            except BaseException:
                await self._delete(card.ifname, port)
                raise
        except BaseException:
            self._forget(card)
            raise
        if card.state is _State.PLUGGING:
            card.state = _State.PLUGGED
        others = [c.port for c in self._cards.values() if c is not card and c.port is not None]
        self._guest.agent.tell(" ".join(network_words([port], besides=others)))
        return facts_of(port)

    async def vm_unplug(self, params: UnplugParams, _request: Request) -> NicFacts:
        """Take a NIC away, once the guest has let go of it.

        Raises NotFound, Conflict while something else is done with it, CardFailed, CardHeld, and what the
        daemon does. Then all is as it was, unless the daemon went away at the very end.
        """
        card = next((c for c in self._cards.values() if c.ifname == params.ifname), None)
        if card is None:
            raise NotFound("NIC", params.ifname)
        if card.state is not _State.PLUGGED or card.port is None or card.ending is not None or self._freezing:
            why = _State.UNPLUGGING.value if card.ending is not None else card.state.value
            why = "is of a guest that is being frozen" if self._freezing else why
            raise Conflict("NIC", card.ifname, f"{why}; try again when that has ended")
        facts = facts_of(card.port)
        card.state = _State.UNPLUGGING
        try:
            with contextlib.suppress(NotFound):  # deleted by somebody: its card is left
                await self._client.port_show(card.port.port_id)  # or it would outlive the card
            await self._let_go(card, params.patience)
        except BaseException:
            card.state = _State.PLUGGED
            raise
        assert card.ending is not None  # noqa: S101 - set with what was waited for
        await asyncio.shield(card.ending)
        return facts

    async def vm_freeze(self, params: FreezeParams, _request: Request) -> Frozen:
        """Write the guest to a file; no NIC comes or goes meanwhile.

        Raises NotSupported for what copies could not share, Conflict while a NIC comes or goes, or where the
        file is there, KernelFailed where it can't be written, GuestFailed. Then there is no such file.
        """
        cards = self._ordered()
        ports = [card.port for card in cards if card.state is _State.PLUGGED and card.port is not None]
        # A card that was plugged later, or left a gap, has a number that a new machine gives to another.
        if self._freezing or len(ports) != len(cards) or any(c.number != c.index for c in cards):
            why = "a NIC of it comes or goes, or it is being frozen, or one was plugged into another's place"
            raise Conflict("guest", self._guest.spec.name, why)
        self._freezing = True
        began = time.monotonic()
        try:
            with frozen.written(Path(params.file), frozen.describe(self._guest.spec, ports)) as fd:
                await self._guest.freeze(fd)
                size = os.fstat(fd).st_size
        finally:
            self._freezing = False
        return Frozen(file=params.file, bytes=size, seconds=round(time.monotonic() - began, 3))

    # -- inside ----------------------------------------------------------------------------------

    def _ordered(self) -> list[_Card]:
        return sorted(self._cards.values(), key=lambda card: card.index)

    def _reserved(self) -> _Card:
        """A number and a name for one more card. Raises Conflict."""
        name = self._guest.spec.name
        if self._guest.state is not State.RUNNING or self._guest.gone.is_set():
            raise Conflict("guest", name, "is ending, and takes no NIC")
        if self._freezing:
            raise Conflict("guest", name, "is being frozen; try again when that has ended")
        if len(self._cards) >= MAX_NICS:
            raise Conflict("guest", name, f"has {MAX_NICS} NICs, which is all that fit; unplug one")
        # The one that was empty longest: a guest may still be at what was asked of the last card there.
        number = next(n for n in self._numbers if n not in self._cards)
        self._numbers.remove(number)
        self._numbers.append(number)
        index = min(set(range(MAX_NICS)) - {card.index for card in self._cards.values()})
        card = self._cards[number] = _Card(number, index, _State.PLUGGING)
        return card

    def _forget(self, card: _Card) -> None:
        if self._cards.get(card.number) is card:
            del self._cards[card.number]

    async def _created(self, card: _Card, params: PlugParams) -> Port:
        if card.ifname in self._doubtful:
            await self._cleared(card.ifname)
        network = params.network or only_network(await self._client.network_list())
        call = wanted(
            self._guest.spec.name,
            card.index,
            network,
            self._sandbox,
            labels=params.labels,
            queues=params.queues,
        )
        try:
            return await self._client.call(call)
        except (RequestTimeout, ConnectionLost):
            await self._cleared(card.ifname, quietly=True)
            raise

    async def _cleared(self, ifname: str, *, quietly: bool = False) -> None:
        """Delete what a call without an answer may have made under that name."""
        self._doubtful.add(ifname)
        boot = netns.boot_id()
        try:
            for port in await self._client.port_list():
                ours = port.sandbox.cookie == self._cookie and port.sandbox.boot_id == boot
                if ours and port.ifname == ifname:
                    await self._client.port_delete(port.port_id)
        except PortwrightError:
            if not quietly:
                raise
        else:
            self._doubtful.discard(ifname)

    async def _delete(self, ifname: str, port: Port) -> None:
        """Of a card that did not come to be: what can't be deleted now is before the name's next use."""
        try:
            await self._client.port_delete(port.port_id)
        except NotFound:
            pass
        except PortwrightError:
            self._doubtful.add(ifname)

    async def _let_go(self, card: _Card, patience: float) -> None:
        """Ask the guest for the card until it lets go. Raises CardFailed, CardHeld."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience
        while True:  # again and again: one that boots, and has nobody to hear it yet, forgets
            await self._guest.cards.ask_back(card.number, card.ifname)
            left = max(0.0, deadline - loop.time())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, _ASK_EVERY)):
                    await card.gone.wait()
            if card.gone.is_set():
                return
            if left <= _ASK_EVERY:
                raise CardHeld(self._guest.spec.name, card.ifname, patience)

    def _deleted(self, number: int) -> None:
        card = self._cards.get(number)
        if card is not None and card.ending is None:
            card.ending = asyncio.create_task(self._end(card), name=f"end of {card.ifname}")
            card.gone.set()

    async def _end(self, card: _Card) -> None:
        """The guest has let go of the card: take the rest away. Raises what the daemon does."""
        asked = card.state is _State.UNPLUGGING
        await self._guest.cards.drop(card.number)
        self._forget(card)
        try:
            if card.port is not None:
                await self._client.port_delete(card.port.port_id)
        except NotFound:
            pass
        except PortwrightError as error:
            self._doubtful.add(card.ifname)
            if asked:
                raise
            sys.stderr.write(f"portwright: {card.ifname} is unplugged, its port is left: {error}\n")
