"""The CNI error object, and the table from our errors to its codes.

Codes below 100 are the specification's (CNI SPEC 1.1.0, "Error"); those from 100 are
Portwright's own and stable:

==== ====================== =====================================================
code error                  what the operator should look at
==== ====================== =====================================================
100  any other refusal      the message
101  Conflict               what holds the name, address or port already
102  NotFound               the thing the message names
103  PoolExhausted          the network's ranges; resting addresses come back
104  PortStateError         the port is busy or half made; ``portwright port show``
105  KernelTooOld           ``portwright doctor``
106  VerifierRejected       ``details`` has the end of the verifier's log
107  NetlinkFailed          the kernel's own sentence in the message
108  KernelFailed           the same, for a system call
199  InternalError, a bug   the daemon's log
==== ====================== =====================================================
"""

from __future__ import annotations

import enum
import json
from typing import ClassVar

from portwright.model.errors import (
    Conflict,
    DaemonUnavailable,
    InternalError,
    InvalidInput,
    KernelFailed,
    KernelTooOld,
    NetlinkFailed,
    NotFound,
    NotSupported,
    PoolExhausted,
    PortStateError,
    PortwrightError,
    VerifierRejected,
)

#: Longest ``msg`` and ``details``, in characters. A runtime copies both into events and logs.
MAX_TEXT = 4096


class CniCode(enum.IntEnum):
    """Codes of the specification, then ours from 100 (see the module's table)."""

    INCOMPATIBLE_VERSION = 1
    UNSUPPORTED_FIELD = 2
    CONTAINER_UNKNOWN = 3
    BAD_ENVIRONMENT = 4
    IO = 5
    DECODE = 6
    INVALID_CONFIG = 7
    INVALID_NETNS = 8
    TRY_AGAIN = 11
    NOT_AVAILABLE = 50
    LIMITED = 51
    FAILED = 100
    CONFLICT = 101
    NOT_FOUND = 102
    POOL_EXHAUSTED = 103
    PORT_STATE = 104
    KERNEL_TOO_OLD = 105
    VERIFIER_REJECTED = 106
    NETLINK = 107
    KERNEL = 108
    INTERNAL = 199


_CODES: dict[type[PortwrightError], CniCode] = {
    InvalidInput: CniCode.INVALID_CONFIG,
    NotSupported: CniCode.UNSUPPORTED_FIELD,
    DaemonUnavailable: CniCode.TRY_AGAIN,
    Conflict: CniCode.CONFLICT,
    NotFound: CniCode.NOT_FOUND,
    PoolExhausted: CniCode.POOL_EXHAUSTED,
    PortStateError: CniCode.PORT_STATE,
    KernelTooOld: CniCode.KERNEL_TOO_OLD,
    VerifierRejected: CniCode.VERIFIER_REJECTED,
    NetlinkFailed: CniCode.NETLINK,
    KernelFailed: CniCode.KERNEL,
    InternalError: CniCode.INTERNAL,
}


class CniError(PortwrightError):
    """An error as a CNI runtime sees it: ``number`` (the object's ``code``), ``msg``, ``details``.

    ``number`` may be any positive integer: a delegated plugin's error passes through unchanged.
    """

    code: ClassVar[str] = "cni"

    def __init__(self, number: int, msg: str, details: str = "") -> None:
        """Keep at most :data:`MAX_TEXT` characters of each text."""
        super().__init__(f"{msg}; {details}" if details else msg)
        self.number = int(number)
        self.msg = msg[:MAX_TEXT]
        self.details = details[:MAX_TEXT]

    def to_json(self, version: str = "") -> bytes:
        """Return the error object for stdout, one line; ``version`` '' means 1.1.0.

        ``details`` is left out when empty. Text that is not valid Unicode is replaced, never raised on.
        """
        body: dict[str, object] = {"cniVersion": version or "1.1.0", "code": self.number, "msg": self.msg}
        if self.details:
            body["details"] = self.details
        return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def unsupported(field: str, value: object, why: str) -> CniError:
    """Return the code-2 error of a known key that cannot be honoured; it names key and value."""
    return CniError(CniCode.UNSUPPORTED_FIELD, f"unsupported field {field}: {why} (got {value!r:.200})")


def map_error(error: BaseException) -> CniError:
    """Return what the runtime is told about ``error``; a :class:`CniError` comes back as it is.

    - ``InvalidInput`` is 7, but 4 when its field is a ``CNI_*`` variable and 8 when it is ``netns``.
    - ``NotFound`` of a network is 7 (the configuration names it), of a namespace 8.
    - An exception that is not a :class:`PortwrightError` is a bug: 199, with its type's name.
    """
    if isinstance(error, CniError):
        return error
    if not isinstance(error, PortwrightError):
        return CniError(CniCode.INTERNAL, f"internal error: {type(error).__name__}: {error}")
    code = next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), CniCode.FAILED)
    details = ""
    match error:
        case InvalidInput(field=field) if field.startswith("CNI_"):
            code = CniCode.BAD_ENVIRONMENT
        case InvalidInput(field="netns") | NotFound(kind="netns"):
            code = CniCode.INVALID_NETNS
        case NotFound(kind="network"):
            code = CniCode.INVALID_CONFIG
        case VerifierRejected(log=log):
            details = log[-MAX_TEXT:]
        case _:
            pass
    return CniError(code, str(error), details)
