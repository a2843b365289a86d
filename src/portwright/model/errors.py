"""The errors a caller can meet: one base, few leaves, each carrying its facts.

Everything raised across a layer on purpose derives from :class:`PortwrightError`.
A leaf's attributes are JSON-able facts; ``str(error)`` is one clear sentence that
names the field, the value and the way out. Built-in exceptions mean a bug of ours.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import ClassVar

#: Characters of what a caller sent that an error repeats: it may have sent a megabyte.
_MAX_SHOWN = 300


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


class PortwrightError(Exception):
    """Base of every deliberate error. ``code`` is stable and goes over the socket."""

    code: ClassVar[str] = "failed"

    def facts(self) -> dict[str, object]:
        """The attributes of this error, for ``--json`` and the socket."""
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}


class InvalidInput(PortwrightError):
    """The caller's input is wrong; nothing was changed.

    ``field`` is a dotted path (``ipam.ranges[0][1].subnet``), ``value`` what was given.
    """

    code = "invalid"

    def __init__(self, field: str, value: object, why: str) -> None:
        super().__init__(f"{_short(field)}: {_short(why)} (got {_short(repr(value))})")
        self.field = _short(field)
        plain = value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
        self.value = _short(plain) if isinstance(plain, str) else plain
        self.why = why


class NotFound(PortwrightError):
    """A named thing does not exist."""

    code = "not-found"

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"{kind} {_short(name)!r} does not exist")
        self.kind = kind
        self.name = _short(name)


class Conflict(PortwrightError):
    """The thing asked for collides with one that is there; ``why`` says with which."""

    code = "conflict"

    def __init__(self, kind: str, name: str, why: str) -> None:
        super().__init__(f"{kind} {name!r}: {why}")
        self.kind = kind
        self.name = name
        self.why = why


class NotSupported(PortwrightError):
    """A model (or this kernel under this model) cannot do what was asked."""

    code = "not-supported"

    def __init__(self, model: str, feature: str, way_out: str) -> None:
        super().__init__(f"{model} does not support {feature}: {way_out}")
        self.model = model
        self.feature = feature
        self.way_out = way_out


class KernelTooOld(PortwrightError):
    """A kernel feature is missing. ``need`` and ``have`` are versions or option names."""

    code = "kernel-too-old"

    def __init__(self, feature: str, need: str, have: str) -> None:
        super().__init__(f"{feature} needs {need}; this kernel has {have}")
        self.feature = feature
        self.need = need
        self.have = have


class VerifierRejected(PortwrightError):
    """The kernel's verifier refused a program.

    ``str()`` shows the lines that matter; ``log`` keeps the whole log.
    """

    code = "verifier-rejected"

    def __init__(self, program: str, summary: str, log: str) -> None:
        super().__init__(f"the verifier rejected {program}:\n{summary}")
        self.program = program
        self.summary = summary
        self.log = log


class PortStateError(PortwrightError):
    """An operation needs the port in another state."""

    code = "port-state"

    def __init__(self, port_id: str, state: str, required: str) -> None:
        super().__init__(f"port {port_id} is {state}; this needs it {required}")
        self.port_id = port_id
        self.state = state
        self.required = required


class NetlinkFailed(PortwrightError):
    """The kernel refused a netlink request. ``extack`` is its own sentence, or ''."""

    code = "netlink"

    def __init__(self, errno: int, request: str, extack: str = "") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        detail = f": {extack}" if extack else ""
        super().__init__(f"{request}: {name} {os.strerror(errno)}{detail}")
        self.errno = errno
        self.request = request
        self.extack = extack


class KernelFailed(PortwrightError):
    """A system call other than netlink failed (bpf(2), setns(2), a sysctl, nft)."""

    code = "kernel"

    def __init__(self, errno: int, what: str, detail: str = "") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        more = f": {detail}" if detail else ""
        super().__init__(f"{what}: {name} {os.strerror(errno)}{more}")
        self.errno = errno
        self.what = what
        self.detail = detail


class PoolExhausted(PortwrightError):
    """No address left. ``resting`` counts released ones that may not be reused yet."""

    code = "pool-exhausted"

    def __init__(self, network: str, ranges: str, used: int, resting: int) -> None:
        super().__init__(
            f"network {network!r}: no address left in {ranges} "
            f"({used} in use, {resting} resting); add a range or release ports"
        )
        self.network = network
        self.ranges = ranges
        self.used = used
        self.resting = resting


class DaemonUnavailable(PortwrightError):
    """Nothing answers on the daemon's socket."""

    code = "daemon-unavailable"

    def __init__(self, socket: str, why: str) -> None:
        super().__init__(f"no daemon on {socket} ({why}); start it with: portwright node run")
        self.socket = socket
        self.why = why


class InternalError(PortwrightError):
    """Our bug. All bets about the operation are off; the record still holds."""

    code = "internal"
