"""A guest as a Firecracker process: started in the sandbox's namespace, steered by its API, gone when we are.

Firecracker opens each tap by its name, so it has to be in the taps' namespace, and it needs a path for its
socket, which is in a directory of the guest's own (home.py). It is killed when the thread that started it
ends, SIGKILL too (``PR_SET_PDEATHSIG``). CPUs are KVM's: there is no emulation.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, Self

from portwright.kernel import netns, private
from portwright.model.errors import InvalidInput, NotFound, NotSupported, PortwrightError
from portwright.model.port import Limits
from portwright.vmm.driver import ENDED_BY_US, Console, End, GuestFailed, State
from portwright.vmm.firecracker.api import PutBootSource, PutDrive, PutMachineConfig
from portwright.vmm.firecracker.capabilities import missing
from portwright.vmm.firecracker.description import load
from portwright.vmm.firecracker.driver import BeforeBoot, Driver
from portwright.vmm.firecracker.errors import VmmUnavailable
from portwright.vmm.firecracker.limits import fitted
from portwright.vmm.firecracker.nics import Nic
from portwright.vmm.qemu import bounded_file
from portwright.vmm.spec import MAX_COMMAND_LINE, GuestSpec, check, command_line

PROGRAM: Final = "firecracker"
_TITLE: Final = "Firecracker"
#: Seconds: until the socket answers and between two looks, for the whole start, until it ends after SIGTERM,
#: and between two presses of Ctrl-Alt-Del.
_ANSWER_WITHIN, _LOOK_EVERY, _START_WITHIN, _QUIT_WITHIN, _PRESS_EVERY = 10.0, 0.02, 60.0, 5.0, 2.0
#: Bytes of its last words that an error repeats.
_SAID: Final = 4096
#: A restart is Firecracker's end, by the keyboard controller that it has for that alone; there is no PCI.
_WORDS: Final = "reboot=k pci=off"


def found(program: str, guest: str) -> str:
    """The executable's path, from $PATH if it is a name. Raises GuestFailed."""
    where = shutil.which(program)
    if where is None:
        why = "it is not packaged; name its executable with --firecracker PATH"
        raise GuestFailed(guest, f"{program} is missing", why)
    return str(Path(where).absolute())


def requests(spec: GuestSpec) -> tuple[BeforeBoot, ...]:
    """The guest but for its NICs, in the order in which Firecracker is told. Pure."""
    put: list[BeforeBoot] = [
        PutMachineConfig(vcpu_count=spec.cpus, mem_size_mib=spec.memory),
        PutBootSource(
            kernel_image_path=spec.kernel,
            initrd_path=spec.initramfs or None,
            boot_args=_boot_args(spec),
        ),
    ]
    if spec.root:
        put.append(PutDrive(drive_id="root", is_root_device=True, path_on_host=spec.root, is_read_only=False))
    return tuple(put)


def _boot_args(spec: GuestSpec) -> str:
    # Firecracker has the root file system's words itself, from the drive.
    words = command_line(replace(spec, root="", append=""))
    return " ".join(filter(None, (words, _WORDS, spec.append)))


def prepare(spec: GuestSpec) -> None:
    """Raises what can be known before anything is made: a wrong spec, a missing file, what no API takes."""
    check(spec)
    if (length := len(_boot_args(spec))) > MAX_COMMAND_LINE:
        why = f"the kernel's command line would have {length} characters; it takes {MAX_COMMAND_LINE}"
        raise InvalidInput("append", spec.append, f"{why}; use fewer routes, addresses or words")
    for path in (spec.kernel, spec.initramfs, spec.root):
        if path and not os.access(path, os.R_OK):
            raise NotFound("file", path)
    if platform.machine() != "x86_64":
        raise NotSupported(PROGRAM, f"guests on {platform.machine()}", "so far they are x86-64's")
    description = load()
    for request in requests(spec):
        request.check()
        description.check_request(request.METHOD, request.path, request.body)


class FirecrackerGuest:
    """A running guest; made by :meth:`start`. For one event loop, in one thread."""

    def __init__(self, spec: GuestSpec, process: subprocess.Popen[bytes], words: int) -> None:
        """Takes process and ``words`` over."""
        self.spec = spec
        self.state = State.RUNNING
        self.gone = asyncio.Event()  # set when the process has ended
        self.driver: Driver
        self._process = process
        self._words = words
        self._pidfd = os.pidfd_open(process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self.gone.set)

    @property
    def pid(self) -> int:
        """Firecracker's process."""
        return self._process.pid

    @classmethod
    async def start(
        cls,
        spec: GuestSpec,
        netns_fd: int,
        console: Console,
        *,
        program: str,
        socket: Path,
        limits: Mapping[str, Limits],
    ) -> Self:
        """Start ``program`` in the namespace behind ``netns_fd``, and the guest in it; it runs on return.

        ``socket`` is a free path for its API, ``limits`` the ports' by their taps' names. Raises what
        :func:`prepare` does, and GuestFailed for what Firecracker refuses, does not answer or dies of. Then
        the process is gone.
        """
        prepare(spec)
        words = bounded_file("firecracker-stderr")
        try:
            process = _spawn(spec, netns_fd, console, program=program, socket=socket, words=words)
        except BaseException:
            os.close(words)
            raise
        guest = cls(spec, process, words)
        try:
            async with asyncio.timeout(_START_WITHIN):
                guest.driver = await guest._connected(socket)
                await guest._boot(limits)
        except BaseException as error:
            died = await guest._ended_within(0.2 if isinstance(error, PortwrightError) else 0.0)
            await guest._kill()
            said = guest._close()
            if isinstance(error, TimeoutError):
                why = f"Firecracker has not started it in {_START_WITHIN:g} s"
                raise GuestFailed(spec.name, why, said) from None
            if isinstance(error, PortwrightError):
                how = f"; {End(process.returncode, program=_TITLE)}" if died else ""
                why = f"Firecracker did not start it: {error}{how}"
                raise GuestFailed(spec.name, why, said) from error
            raise
        return guest

    async def power_down(self, patience: float) -> None:
        """Press Ctrl-Alt-Del until the guest is off, for ``patience`` seconds at most."""
        if self.state is State.RUNNING:
            self.state = State.STOPPING
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience
        # Again and again: a guest that is booting has nobody to hear it yet.
        while not self.gone.is_set() and (left := deadline - loop.time()) > 0:
            # One that is gone or deaf is seen elsewhere.
            with contextlib.suppress(PortwrightError, TimeoutError):
                async with asyncio.timeout(left):
                    await self.driver.press_power()
            await self._ended_within(min(max(0.0, deadline - loop.time()), _PRESS_EVERY))

    async def quit(self) -> End:
        """End the guest at once, as if its power was cut."""
        if self.state is State.ENDED:
            return End(self._process.returncode, program=_TITLE)
        ours = not self.gone.is_set()
        await self._kill()
        self._close()
        return End(0, ENDED_BY_US, _TITLE) if ours else End(self._process.returncode, program=_TITLE)

    # -- inside ----------------------------------------------------------------------------------

    async def _connected(self, socket: Path) -> Driver:
        """The driver, once the process listens. Raises GuestFailed where it never does."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _ANSWER_WITHIN
        while True:
            try:
                return await Driver.connect(socket)
            except VmmUnavailable:
                if self.gone.is_set() or loop.time() > deadline:
                    raise
            await self._ended_within(_LOOK_EVERY)

    async def _boot(self, limits: Mapping[str, Limits]) -> None:
        for warning in self.driver.warnings:
            sys.stderr.write(f"portwright: Firecracker {self.driver.version}: {warning}\n")
        await self.driver.configure(*requests(self.spec))
        told = not missing("mtu", self.driver.version, pci=False)
        for index, nic in enumerate(self.spec.nics):
            await self.driver.add_nic(
                Nic(
                    iface_id=f"eth{index}",
                    tap=nic.tap,
                    mac=nic.mac,
                    mtu=nic.mtu if told else 0,
                    limits=fitted(limits.get(nic.tap, Limits())),
                )
            )
        await self.driver.boot()

    async def _ended_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.gone.wait()
        return self.gone.is_set()

    async def _kill(self) -> None:
        """End the process, by SIGTERM if it hears that; it is reaped on return."""
        if not self.gone.is_set():
            self._process.terminate()
            try:
                await self._ended_within(_QUIT_WITHIN)
            finally:
                self._process.kill()
        self._process.wait()

    def _close(self) -> str:
        """Let go of everything, once the process is gone; what it said last."""
        self.state = State.ENDED
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        written = os.lseek(self._words, 0, os.SEEK_CUR)
        said = os.pread(self._words, min(written, _SAID), max(0, written - _SAID))
        os.close(self._words)
        return "; ".join(filter(None, map(str.strip, said.decode(errors="replace").split("\n"))))


def _spawn(
    spec: GuestSpec, netns_fd: int, console: Console, *, program: str, socket: Path, words: int
) -> subprocess.Popen[bytes]:
    # An id has letters, digits and hyphens.
    args = [program, "--id", re.sub(r"[^A-Za-z0-9-]", "-", spec.name), "--api-sock", str(socket)]
    with netns.entered(netns_fd):  # a child is in its thread's namespace
        try:
            return subprocess.Popen(
                args,
                stdin=console.stdin,
                stdout=console.stdout,
                stderr=words,
                # The linter's fear is a lock that another thread holds at the fork: these take none.
                preexec_fn=partial(private.end_with, os.getpid()),  # noqa: PLW1509 - as said above
                # On a terminal it has to be in the foreground; elsewhere ^C is for us, who end the guest.
                start_new_session=not console.terminal,
            )
        except OSError as error:
            raise GuestFailed(spec.name, f"{program} can't be run", error.strerror or str(error)) from None
