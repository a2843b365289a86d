"""``portwright vm run``: a namespace, its ports and a guest on them, all of which end together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from portwright.api.aio import AsyncClient
from portwright.api.client import Client
from portwright.kernel import netns, news, private
from portwright.kernel.signals import terminable, terminal_kept
from portwright.model.errors import InvalidInput
from portwright.model.port import Limits, Port
from portwright.vmm import accel, control, matrix
from portwright.vmm.cards import home_of
from portwright.vmm.cmdline import network_words
from portwright.vmm.contract import Started
from portwright.vmm.driver import Console, End, GuestFailed, RunningGuest
from portwright.vmm.firecracker import home
from portwright.vmm.frozen import FrozenNic
from portwright.vmm.guard import Guard
from portwright.vmm.qemu import Guest, prepare
from portwright.vmm.service import CALL_WITHIN, Sandbox, Service, only_network, wanted
from portwright.vmm.spec import GuestSpec
from portwright.vmm.vhost import Vhost
from portwright.vmm.vhost import choose as choose_vhost

G = TypeVar("G", bound=RunningGuest)
#: Ended in order: the terminal's ^C, a service manager's stop, and a terminal that is gone.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(
    client: Client,
    spec: GuestSpec,
    networks: Sequence[str],
    console: Console,
    *,
    labels: Mapping[str, str],
    model: str = "tcfilter",
    queues: int = 1,
    vhost: Vhost = "auto",
    patience: float,
    started: Callable[[Started], None],
    nics: Sequence[FrozenNic] = (),
    limits: Limits | None = None,
    firecracker: str = "",
) -> End:
    """Run the guest with a port on each of ``networks`` (eth0, eth1, …), with ``labels``, until it ends; how.

    The ports are of that ``model``, and have ``queues`` and ``limits``; whether vhost-net carries their
    packets is chosen by ``vhost``, and told. ``nics``: those of a restored guest, which get ports that are a
    clone's, on the networks that they were on if no others are named. ``firecracker``: the executable of that
    which runs the guest; '' is QEMU.

    ``started`` is called once, when the guest runs. SIGINT, SIGTERM and SIGHUP shut it down within
    ``patience`` seconds; a second one ends it at once. However this ends, by SIGKILL too, the guest, its
    ports and its namespace are gone. Where nobody asked for KVM, and it makes a guest and can't run it, the
    guest is started again without. For a process with one thread. Raises what the daemon and
    :meth:`Guest.start` raise.
    """
    if firecracker:
        spec, program = _prepared(spec, firecracker, model=model, queues=queues, vhost=vhost)
    else:
        prepare(spec)
    if not networks:
        networks = [nic.network for nic in nics] or [only_network(client.network_list())]
    if nics and len(networks) != len(nics):
        why = f"the guest has {len(nics)} NICs: name a network for each, or none"
        raise InvalidInput("network", len(networks), why)
    carried = not firecracker and choose_vhost(vhost)
    spec, fall_back = (spec, False) if firecracker else chosen(spec)
    with contextlib.ExitStack() as stack:
        namespace = private.new_netns()
        stack.callback(os.close, namespace)
        cookie = netns.cookie(namespace)
        stack.enter_context(terminable(signal.SIGTERM, signal.SIGHUP))  # outside of the event loop too
        stack.enter_context(Guard(client.socket, cookie, spec.name))
        listener = stack.enter_context(control.claimed(client.socket.parent, spec.name))
        # Others find it by this path as long as we live.
        sandbox = Sandbox(namespace, f"/proc/{os.getpid()}/fd/{namespace}", model, carried)
        ports = [
            client.call(
                wanted(
                    spec.name,
                    index,
                    network,
                    sandbox,
                    labels=labels,
                    limits=limits,
                    **_held(nics, index, queues),
                )
            )
            for index, network in enumerate(networks)
        ]
        words = " ".join([*network_words(ports), f"portwright.host={spec.name}", spec.append]).strip()
        whole = replace(spec, append=words, nics=tuple(map(sandbox.nic, ports)))
        if firecracker:
            api = stack.enter_context(home.made(control.folder(client.socket.parent), spec.name, cookie))
            word = stack.enter_context(news.heard(client.socket.parent, cookie))
            return _firecracker(
                whole,
                sandbox,
                ports,
                console,
                program=program,
                api=api,
                daemon=client.socket,
                word=word,
                listener=listener,
                patience=patience,
                started=started,
            )
        devices = home_of(whole.nics[0], namespace)
        stack.callback(os.close, devices)

        @contextlib.asynccontextmanager
        async def served(guest: Guest) -> AsyncIterator[None]:
            service = Service(guest, AsyncClient(client.socket, timeout=CALL_WITHIN), sandbox, ports)
            async with service.serving(listener):
                started(service.facts())
                yield

        return boot(whole, namespace, devices, console, served, patience=patience, fall_back=fall_back)


def _held(nics: Sequence[FrozenNic], index: int, queues: int) -> dict[str, object]:
    """What a port has of its guest's NIC."""
    if not nics:
        return {"queues": queues}
    nic = nics[index]
    return {"queues": nic.queues, "mac": nic.mac, "mtu": nic.mtu, "inner_addresses": nic.addresses}


def chosen(spec: GuestSpec) -> tuple[GuestSpec, bool]:
    """The guest with how its CPUs run; and whether it is to be started without KVM if that fails."""
    whole = replace(spec, accel=accel.choose(spec.accel))
    return whole, whole.accel == "kvm" and not (spec.accel or os.environ.get(accel.VARIABLE))


def boot(
    whole: GuestSpec,
    namespace: int,
    devices: int,
    console: Console,
    served: Callable[[Guest], contextlib.AbstractAsyncContextManager[None]],
    *,
    patience: float,
    fall_back: bool,
) -> End:
    """Start the guest, and be there for it, ``served`` around that, until its end; how it ended.

    ``fall_back``: without KVM if it can't be started with it. Signals and the rest as :func:`run` says.
    """

    async def start() -> Guest:
        try:
            return await Guest.start(whole, namespace, console, devices_fd=devices)
        except GuestFailed as error:
            if not fall_back:
                raise
            sys.stderr.write(f"portwright: {error}\nportwright: it is started without KVM instead\n")
            slow = replace(whole, accel="tcg")
            return await Guest.start(slow, namespace, console, devices_fd=devices)

    with _terminal_kept(console):
        return asyncio.run(_serve(start, served, patience))


def _prepared(
    spec: GuestSpec, program: str, *, model: str, queues: int, vhost: Vhost
) -> tuple[GuestSpec, str]:
    """The guest as a Firecracker's, and the executable's path. Raises what can be known to be refused."""
    matrix.require_model("firecracker", model)
    for asked, feature in (
        (queues > 1, "multi-queue"),
        (vhost == "on", "vhost"),
        (spec.accel == "tcg", "tcg"),
        (bool(spec.incoming), "freeze"),
        (spec.cell is not None, "jail"),
    ):
        if asked:
            matrix.require(feature, "firecracker", model)
    try:
        from portwright.vmm.firecracker import guest  # noqa: PLC0415 - of the extra: needs h11 and jsonschema
    except ImportError as error:
        why = f"the Python package {error.name} is missing"
        raise GuestFailed(spec.name, why, "pip install 'portwright[vm]'") from None
    guest.prepare(spec)
    return replace(spec, accel="kvm"), guest.found(program, spec.name)


def _firecracker(
    whole: GuestSpec,
    sandbox: Sandbox,
    ports: Sequence[Port],
    console: Console,
    *,
    program: str,
    api: Path,
    daemon: Path,
    word: socket.socket,
    listener: socket.socket,
    patience: float,
    started: Callable[[Started], None],
) -> End:
    """As :func:`boot`, by a Firecracker whose API socket is at ``api``; ``word``: of the ports' news."""
    from portwright.vmm.firecracker.follow import LimitsFollower, asking  # noqa: PLC0415 - of the extra
    from portwright.vmm.firecracker.guest import FirecrackerGuest  # noqa: PLC0415 - of the extra, as above
    from portwright.vmm.fixed import FixedService  # noqa: PLC0415 - the same

    limits = {port.tap: port.limits for port in ports}

    async def start() -> FirecrackerGuest:
        return await FirecrackerGuest.start(
            whole, sandbox.namespace, console, program=program, socket=api, limits=limits
        )

    @contextlib.asynccontextmanager
    async def served(guest: FirecrackerGuest) -> AsyncIterator[None]:
        service = FixedService(guest, sandbox, ports)
        follower = LimitsFollower(guest, ports, asking(daemon, CALL_WITHIN))
        async with service.serving(listener), follower.following(word):
            started(service.facts())
            yield

    with _terminal_kept(console):
        return asyncio.run(_serve(start, served, patience))


async def _serve(
    start: Callable[[], Awaitable[G]],
    served: Callable[[G], contextlib.AbstractAsyncContextManager[None]],
    patience: float,
) -> End:
    asked, hurried = asyncio.Event(), asyncio.Event()

    def signalled() -> None:
        (hurried if asked.is_set() else asked).set()

    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, signalled)
    guest = await start()
    try:
        async with served(guest):
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


@contextlib.contextmanager
def _terminal_kept(console: Console) -> Iterator[None]:
    """Give the terminal its modes back: QEMU does, unless it is killed."""
    if not console.terminal:
        yield
        return
    with terminal_kept(console.stdin):
        yield


def absolute(path: Path | None) -> str:
    """The path as QEMU is given it; '' for none."""
    return str(path.absolute()) if path is not None else ""
