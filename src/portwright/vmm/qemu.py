"""A guest as a QEMU process: started in the sandbox's namespace, steered by QMP, and gone when we are.

The process has no descriptor but the taps, one end of a socket pair for QMP, and its console, and no name
anywhere: no socket in a folder, no pid file. It is killed when the thread that started it ends, SIGKILL too
(``PR_SET_PDEATHSIG``). QMP is the package ``qemu.qmp``'s (the extra ``vm``), imported when a guest starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import platform
import shutil
import socket
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from portwright.jail.process import Jailed
from portwright.kernel import netns, private
from portwright.kernel.monitor import LinkMonitor
from portwright.model.errors import NotFound, NotSupported
from portwright.vmm import cell, frozen
from portwright.vmm.agent import Agent
from portwright.vmm.cards import open_card
from portwright.vmm.driver import INTERNAL_ERROR, Console, End, GuestFailed, State
from portwright.vmm.hotplug import Cards
from portwright.vmm.spec import GuestSpec, check, qemu_args

if TYPE_CHECKING:
    from qemu.qmp import EventListener, QMPClient

_PROGRAM: Final = "qemu-system-x86_64"
#: Seconds: until QEMU answers, until it ends after ``quit``, and between two presses of the power button.
_ANSWER_WITHIN, _QUIT_WITHIN, _PRESS_EVERY = 30.0, 5.0, 2.0
#: Bytes of QEMU's last words that an error repeats, and of all that is kept of them.
_SAID, _MOST = 4096, 64 * 1024


class Guest:
    """A running guest; made by :meth:`start`. For one event loop, in one thread."""

    def __init__(
        self,
        spec: GuestSpec,
        process: subprocess.Popen[bytes] | Jailed,
        qmp: QMPClient,
        *,
        words: int,
        monitor: LinkMonitor,
        agent: Agent,
        namespace: int,
    ) -> None:
        """Takes all of it over, but for the namespace, which has to stay open."""
        self.spec = spec
        self.state = State.RUNNING
        self._process = process
        self._qmp = qmp
        self._words = words
        self._monitor = monitor
        self.agent = agent
        self.cards = Cards(spec, qmp, monitor, namespace)
        self._pidfd = os.pidfd_open(process.pid)
        self.gone = asyncio.Event()  # set when the process has ended
        asyncio.get_running_loop().add_reader(self._pidfd, self.gone.set)
        self._listener: EventListener | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._given_up = False

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._process.command_pid if isinstance(self._process, Jailed) else self._process.pid

    @classmethod
    async def start(
        cls, spec: GuestSpec, netns_fd: int, console: Console, *, devices_fd: int | None = None
    ) -> Self:
        """Start the guest in the namespace behind ``netns_fd``; it runs on return.

        ``devices_fd`` is the namespace of its NICs' devices, if that is another. ``spec.accel`` is chosen.
        Raises what :func:`prepare` does, Conflict for a tap that is in use, and GuestFailed for what QEMU
        refuses. Then nothing is left.
        """
        prepare(spec)
        from qemu.qmp import EventListener, QMPClient  # noqa: PLC0415 - of the extra: see the module

        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            near, far = socket.socketpair()
            ours.callback(near.close)
            theirs.callback(far.close)  # QEMU has its own copy, of this and of the taps
            agent = ours.enter_context(contextlib.closing(Agent()))
            theirs.callback(agent.far.close)
            # From before the taps are opened, so that no news of them is missed.
            devices = netns_fd if devices_fd is None else devices_fd
            monitor = ours.enter_context(LinkMonitor(devices))
            cards = [theirs.enter_context(open_card(nic, netns_fd)) for nic in spec.nics]
            words = bounded_file("qemu-stderr")
            ours.callback(os.close, words)
            passed = [far.fileno(), agent.far.fileno()]
            incoming = -1
            if spec.incoming:
                incoming = theirs.enter_context(frozen.state(Path(spec.incoming)))
                passed.append(incoming)
            args = qemu_args(
                spec, qmp=passed[0], agent=passed[1], cards=cards, mux=console.terminal, incoming=incoming
            )
            given = [*passed, *(fd for card in cards for fd in (*card.fds, *card.vhost_fds))]
            process = _spawn(spec, args, netns_fd, console, words=words, fds=given)
            ours.callback(_kill, process)
            guest = cls(
                spec,
                process,
                QMPClient(spec.name),
                words=words,
                monitor=monitor,
                agent=agent,
                namespace=devices,
            )
            ours.pop_all()
        deleted = EventListener(("DEVICE_DELETED",), guest.cards.heard)
        await guest._greet(near, EventListener(("SHUTDOWN", "STOP")), deleted)
        return guest

    async def wait(self) -> End:
        """Wait for the guest's end, however it comes; all of it is gone then. May be called again."""
        await self.gone.wait()
        return await self._finish()

    async def shutdown(self, patience: float) -> End:
        """Press the power button until the guest is off; end it after ``patience`` seconds."""
        await self.power_down(patience)
        return await self.quit()

    async def power_down(self, patience: float) -> None:
        """Press the power button until the guest is off, for ``patience`` seconds at most."""
        if self.state is State.RUNNING:
            self.state = State.STOPPING
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience
        # Again and again: a guest that is booting has nobody to hear it yet.
        while not self.gone.is_set() and (left := deadline - loop.time()) > 0:
            await self._tell("system_powerdown")
            await self._ended_within(min(left, _PRESS_EVERY))

    async def freeze(self, fd: int) -> None:
        """Write all of it to ``fd``, from where that stands. It stands still meanwhile, and then goes on.

        Raises GuestFailed: then it goes on too, and what was written is worth nothing.
        """
        try:
            await frozen.freeze(self._qmp, fd)
        except frozen.NotFrozen as error:
            raise GuestFailed(self.spec.name, "could not be frozen", str(error)) from error

    async def quit(self) -> End:
        """End the guest at once, as if its power was cut."""
        if not self.gone.is_set():
            await self._tell("quit")
            await self._ended_within(_QUIT_WITHIN)
        if not self.gone.is_set():
            self._process.kill()
        return await self.wait()

    # -- inside ----------------------------------------------------------------------------------

    async def _greet(self, near: socket.socket, listener: EventListener, deleted: EventListener) -> None:
        """Meet QEMU, which waits for it, and let the guest run. On failure nothing is left."""
        # The default listener keeps every event for good, and a guest can make events.
        self._qmp.events.event_filter = _nothing
        self._listen(listener)
        self._qmp.register_listener(deleted)
        try:
            async with asyncio.timeout(_ANSWER_WITHIN):
                await self._qmp.connect(near)
                if self.spec.incoming:
                    await frozen.thawed(self._qmp, self.gone)
                await self._qmp.execute("cont")
            self.cards.follow()
        except BaseException as error:
            near.close()
            said = await self._abandon()
            if isinstance(error, TimeoutError):
                why = f"QEMU has not answered in {_ANSWER_WITHIN:g} s"
                raise GuestFailed(self.spec.name, why, said) from None
            if isinstance(error, Exception):
                with_kvm = " with KVM (there is --accel tcg)" if self.spec.accel == "kvm" else ""
                why = f"QEMU did not start it{with_kvm}"
                raise GuestFailed(self.spec.name, why, said or str(error)) from None
            raise

    def _listen(self, listener: EventListener) -> None:
        self._qmp.register_listener(listener)
        self._listener = listener
        self._tasks.append(asyncio.create_task(self._watch(listener), name="guest events"))

    async def _watch(self, listener: EventListener) -> None:
        """End a guest that stopped because its accelerator gave up: nobody would ever resume it."""
        from qemu.qmp import QMPError  # noqa: PLC0415 - of the extra: see the module

        async for event in listener:
            if event["event"] == "STOP":
                with contextlib.suppress(QMPError):
                    said = await self._qmp.execute("query-status")
                    if isinstance(said, dict) and said.get("status") == INTERNAL_ERROR:
                        self._given_up = True
                        await self._qmp.execute("quit")

    async def _tell(self, command: str, arguments: dict[str, object] | None = None) -> None:
        """Say it to QEMU; one that is gone or deaf is seen elsewhere."""
        from qemu.qmp import QMPError  # noqa: PLC0415 - of the extra: see the module

        with contextlib.suppress(QMPError, TimeoutError):
            async with asyncio.timeout(_QUIT_WITHIN):
                await self._qmp.execute(command, arguments)

    async def _ended_within(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.gone.wait()

    async def _finish(self) -> End:
        """The process is gone: read what QMP still has, and close everything."""
        status = self._process.wait()
        await self._close()
        reason = INTERNAL_ERROR if self._given_up else ""
        for event in self._listener.history if self._listener is not None else ():
            data: Any = event.get("data", {})
            if event["event"] == "SHUTDOWN" and not reason:
                reason = str(data.get("reason", ""))
        return End(status, reason)

    async def _abandon(self) -> str:
        """A start that failed: end the process, if it hasn't, and return what it said."""
        # One that refused is about to end by itself, and its words are not complete before.
        await self._ended_within(1.0)
        self._process.kill()
        self._process.wait()
        # The position is QEMU's too: it got the file by inheritance.
        written = os.lseek(self._words, 0, os.SEEK_CUR)
        said = os.pread(self._words, min(written, _SAID), max(0, written - _SAID))
        self._words_closed()
        await self._close()
        lines = said.decode(errors="replace").replace(f"{_PROGRAM}: ", "").split("\n")
        return "; ".join(filter(None, map(str.strip, lines)))

    async def _close(self) -> None:
        if self.state is State.ENDED:
            return
        self.state = State.ENDED
        self._words_closed()
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        await self.cards.close()
        self._monitor.close()
        self.agent.close()
        from qemu.qmp import QMPError, Runstate  # noqa: PLC0415 - of the extra: see the module

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_QUIT_WITHIN):
                while self._qmp.runstate is Runstate.RUNNING:  # until all that it said is read
                    await self._qmp.runstate_changed()
        with contextlib.suppress(QMPError, EOFError, OSError):
            await self._qmp.disconnect()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _words_closed(self) -> None:
        if self._words >= 0:
            os.close(self._words)
            self._words = -1


def bounded_file(name: str) -> int:
    """A file in memory that takes _MOST bytes and no more: how much a VMM says may be the guest's choice."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _MOST)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    return fd


def _nothing(_event: object) -> bool:
    return False


def prepare(spec: GuestSpec) -> None:
    """Raises what can be known before anything is made: a wrong spec, a missing file, package or program."""
    check(spec)
    if spec.cell is not None:
        spec.cell.check()
    for path in (spec.kernel, spec.initramfs, spec.root, spec.incoming):
        if path and not os.access(path, os.R_OK):
            raise NotFound("file", path)
    if platform.machine() != "x86_64":
        raise NotSupported("QEMU", f"guests on {platform.machine()}", "so far they are x86-64's")
    if shutil.which(_PROGRAM) is None:
        raise GuestFailed(spec.name, f"{_PROGRAM} is missing", "apt-get install qemu-system-x86")
    try:
        import qemu.qmp  # noqa: F401, PLC0415 - of the extra: see the module
    except ImportError:
        why = "the Python package qemu.qmp is missing"
        raise GuestFailed(spec.name, why, "pip install 'portwright[vm]'") from None


def _spawn(
    spec: GuestSpec, args: list[str], netns_fd: int, console: Console, *, words: int, fds: list[int]
) -> subprocess.Popen[bytes] | Jailed:
    if spec.cell is not None:
        stdio = (console.stdin, console.stdout, words)
        read, write = (spec.kernel, spec.initramfs), (spec.root,)
        return cell.spawn(spec.cell, args, netns_fd, read=read, write=write, stdio=stdio, fds=fds)
    with netns.entered(netns_fd):  # a child is in its thread's namespace
        return subprocess.Popen(
            [_PROGRAM, *args],
            stdin=console.stdin,
            stdout=console.stdout,
            stderr=words,
            pass_fds=fds,
            # The linter's fear is a lock that another thread holds at the fork: prctl and getppid take none.
            preexec_fn=partial(private.end_with, os.getpid()),  # noqa: PLW1509 - as said above
            # On a terminal it has to be in the foreground; elsewhere ^C is for us, who shut the guest down.
            start_new_session=not console.terminal,
        )


def _kill(process: subprocess.Popen[bytes] | Jailed) -> None:
    process.kill()
    process.wait()
