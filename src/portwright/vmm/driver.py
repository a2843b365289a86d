"""What every hypervisor's running guest is to ``vm run``, and how one ends."""

from __future__ import annotations

import asyncio
import enum
import signal
from dataclasses import dataclass
from typing import Final, Protocol

from portwright.model.errors import PortwrightError
from portwright.vmm.spec import GuestSpec

INTERNAL_ERROR: Final = "internal-error"  # QMP's RunState: the accelerator gave up
#: QMP's ShutdownCause for a guest that we ended; other hypervisors' guests have it too.
ENDED_BY_US: Final = "host-qmp-quit"

_ENDED: Final = {
    "guest-shutdown": "the guest powered itself off",
    "guest-reset": "the guest reset itself: a panic, or a reboot",
    "guest-panic": "the guest's kernel panicked",
    ENDED_BY_US: "the guest did not shut down in time and was ended",
    "host-signal": "QEMU was sent a signal",
    INTERNAL_ERROR: "KVM can't run this guest here; there is --accel tcg",
}


class GuestFailed(PortwrightError):
    """The hypervisor could not start the guest, or go on with it. ``said`` is what it wrote last."""

    code = "guest"

    def __init__(self, name: str, why: str, said: str = "") -> None:
        super().__init__(f"guest {name!r}: {why}" + (f": {said}" if said else ""))
        self.name = name
        self.why = why
        self.said = said


class State(enum.StrEnum):
    """running -> stopping -> ended, or at once."""

    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"


@dataclass(frozen=True)
class Console:
    """Where the guest's first serial line goes. ``terminal``: both are one, and all keys are the guest's."""

    stdin: int
    stdout: int
    terminal: bool = False


@dataclass(frozen=True)
class End:
    """How a guest ended. ``status``: as subprocess gives it; ``reason``: QMP's ShutdownCause, or ''.

    That we ended the process is no failure of it: ``status`` is 0 then, with the reason ENDED_BY_US.
    """

    status: int
    reason: str = ""
    program: str = "QEMU"

    @property
    def ok(self) -> bool:
        """Whether the guest ended as it, or we, wanted."""
        return self.status == 0 and self.reason in {"", "guest-shutdown", ENDED_BY_US}

    def __str__(self) -> str:
        if self.reason:
            return _ENDED.get(self.reason, self.reason)
        if self.status < 0:
            return f"{self.program} was killed by {signal.Signals(-self.status).name}"
        return (
            "ended from its console"
            if self.status == 0
            else f"{self.program} failed with status {self.status}"
        )


class RunningGuest(Protocol):
    """A guest that runs. For one event loop, in one thread. ``gone`` is set when its process has ended."""

    spec: GuestSpec
    gone: asyncio.Event

    @property
    def pid(self) -> int:
        """The hypervisor's process."""

    async def power_down(self, patience: float) -> None:
        """Ask the guest to shut down until it is off, for ``patience`` seconds at most."""

    async def quit(self) -> End:
        """End the guest at once, if it runs still; how it ended. All of it is gone then."""
