"""Portwright: the network of a sandbox host.

``portwright.Client`` and ``portwright.AsyncClient`` talk to the daemon; every error they raise
derives from ``portwright.PortwrightError``. Names are imported on first use, so that
``import portwright`` costs next to nothing in a program that only might need it.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing costs 8 ms to import; type checkers know this name
if TYPE_CHECKING:
    from portwright.api.aio import AsyncClient
    from portwright.api.client import Client
    from portwright.api.errors import Busy, ConnectionLost, ProtocolError, RemoteFailure, RequestTimeout
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

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "Busy",
    "Client",
    "Conflict",
    "ConnectionLost",
    "DaemonUnavailable",
    "InternalError",
    "InvalidInput",
    "KernelFailed",
    "KernelTooOld",
    "NetlinkFailed",
    "NotFound",
    "NotSupported",
    "PoolExhausted",
    "PortStateError",
    "PortwrightError",
    "ProtocolError",
    "RemoteFailure",
    "RequestTimeout",
    "VerifierRejected",
    "__version__",
]

_HOMES = {
    "AsyncClient": "portwright.api.aio",
    "Client": "portwright.api.client",
    "Busy": "portwright.api.errors",
    "ConnectionLost": "portwright.api.errors",
    "ProtocolError": "portwright.api.errors",
    "RemoteFailure": "portwright.api.errors",
    "RequestTimeout": "portwright.api.errors",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'portwright' has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_HOMES.get(name, "portwright.model.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
