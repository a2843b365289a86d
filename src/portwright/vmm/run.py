"""``portwright vm run``: a namespace, its ports and a guest on them, all of which end together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec

from portwright.api.client import Client
from portwright.kernel import netns, private
from portwright.model.errors import InvalidInput
from portwright.model.port import Port
from portwright.vmm import accel
from portwright.vmm.cmdline import network_words
from portwright.vmm.guard import Guard
from portwright.vmm.qemu import Console, End, Guest, GuestFailed, prepare
from portwright.vmm.spec import GuestSpec, Nic

MODEL = "tcfilter"
#: Ended in order: the terminal's ^C, a service manager's stop, and a terminal that is gone.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class NicFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A NIC of a started guest: its port's record, in the parts that matter for reaching it."""

    ifname: str
    port_id: str
    rep: str
    network: str
    tap: str
    mac: str
    mtu: int
    addresses: tuple[str, ...]


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """A guest that has been started. ``pid`` is the hypervisor's."""

    name: str
    pid: int
    accel: str
    nics: tuple[NicFacts, ...]


def run(
    client: Client,
    spec: GuestSpec,
    networks: Sequence[str],
    console: Console,
    *,
    labels: Mapping[str, str],
    queues: int = 1,
    patience: float,
    started: Callable[[Started], None],
) -> End:
    """Run the guest with a port on each of ``networks`` (eth0, eth1, …), with ``labels``, until it ends; how.

    Each port's tap has ``queues``.

    ``started`` is called once, when the guest runs. SIGINT, SIGTERM and SIGHUP shut it down within
    ``patience`` seconds; a second one ends it at once. However this ends, by SIGKILL too, the guest, its
    ports and its namespace are gone. Where nobody asked for KVM, and it makes a guest and can't run it, the
    guest is started again without. For a process with one thread. Raises what the daemon and
    :meth:`Guest.start` raise.
    """
    prepare(spec)
    if not networks:
        networks = [_only_network(client)]
    asked, spec = spec.accel, replace(spec, accel=accel.choose(spec.accel))
    fall_back = spec.accel == "kvm" and not (asked or os.environ.get(accel.VARIABLE))
    with contextlib.ExitStack() as stack:
        namespace = private.new_netns()
        stack.callback(os.close, namespace)
        cookie = netns.cookie(namespace)
        stack.enter_context(_terminable())
        stack.enter_context(Guard(client.socket, cookie))
        ports = [
            client.port_create(
                network,
                # Others find it by this path as long as we live.
                f"/proc/{os.getpid()}/fd/{namespace}",
                ifname=f"eth{index}",
                name=spec.name if index == 0 else f"{spec.name}-{index}",
                labels=labels,
                model=MODEL,
                queues=queues,
            )
            for index, network in enumerate(networks)
        ]
        words = " ".join([*network_words(ports), f"portwright.host={spec.name}", spec.append]).strip()
        nics = tuple(
            Nic(tap=port.tap, mac=port.mac, mtu=port.mtu, queues=port.queues, device=port.ifname)
            for port in ports
        )
        whole = replace(spec, append=words, nics=nics)
        stack.enter_context(_terminal_kept(console))

        def tell(guest: Guest) -> None:
            facts = tuple(_facts(port) for port in ports)
            started(Started(name=spec.name, pid=guest.pid, accel=guest.spec.accel, nics=facts))

        async def start() -> Guest:
            try:
                return await Guest.start(whole, namespace, console)
            except GuestFailed as error:
                if not fall_back:
                    raise
                sys.stderr.write(f"portwright: {error}\nportwright: it is started without KVM instead\n")
                return await Guest.start(replace(whole, accel="tcg"), namespace, console)

        return asyncio.run(_serve(start, tell, patience))


async def _serve(
    start: Callable[[], Awaitable[Guest]], tell: Callable[[Guest], None], patience: float
) -> End:
    asked, hurried = asyncio.Event(), asyncio.Event()

    def signalled() -> None:
        (hurried if asked.is_set() else asked).set()

    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, signalled)
    guest = await start()
    try:
        tell(guest)
        await _first(guest.gone.wait(), asked.wait())
        if asked.is_set():
            await _first(guest.power_down(patience), hurried.wait())
    finally:
        end = await guest.quit()
    return end


async def _first(*ways: Coroutine[object, object, object]) -> None:
    """Wait for the first of them; the others are cancelled."""
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _only_network(client: Client) -> str:
    names = [network.name for network in client.network_list()]
    if len(names) == 1:
        return names[0]
    why = f"name one of {', '.join(names)}" if names else "there is none yet: portwright network create"
    raise InvalidInput("network", None, why)


def _facts(port: Port) -> NicFacts:
    return NicFacts(
        ifname=port.ifname,
        port_id=port.port_id,
        rep=port.rep_name,
        network=port.network,
        tap=port.tap,
        mac=port.mac,
        mtu=port.mtu,
        addresses=tuple(address.address for address in port.addresses),
    )


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Outside of the event loop too, SIGTERM and SIGHUP end the work in order, as ^C does."""

    def ended(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, ended) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _terminal_kept(console: Console) -> Iterator[None]:
    """Give the terminal its modes back: QEMU does, unless it is killed."""
    if not console.terminal:
        yield
        return
    modes = termios.tcgetattr(console.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(console.stdin, termios.TCSADRAIN, modes)


def absolute(path: Path | None) -> str:
    """The path as QEMU is given it; '' for none."""
    return str(path.absolute()) if path is not None else ""
