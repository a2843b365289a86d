"""Errors of the socket itself, and errors carried over it.

The rest of the errors live in :mod:`portwright.model.errors`; over the socket an error is
``{"code", "message", "facts"}``, and :func:`error_from_wire` makes the same class of it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from portwright.model.errors import InternalError, PortwrightError


class ProtocolError(PortwrightError):
    """The peer broke the framing or the envelope; the connection is of no more use."""

    code = "protocol"

    def __init__(self, why: str) -> None:
        super().__init__(f"protocol error: {why}")
        self.why = why


class Busy(PortwrightError):
    """A limit of the daemon's socket is reached; nothing was done, try again later."""

    code = "busy"

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(f"the daemon serves at most {limit} {what}; try again when one has ended")
        self.what = what
        self.limit = limit


class RequestTimeout(PortwrightError):
    """No answer in time. The request may still be carried out: look before you repeat it."""

    code = "timeout"

    def __init__(self, method: str, seconds: float) -> None:
        super().__init__(f"no answer to {method} within {seconds:g} s; it may still be carried out")
        self.method = method
        self.seconds = seconds


class ConnectionLost(PortwrightError):
    """The daemon went away between request and answer. The request may have been carried out."""

    code = "connection-lost"

    def __init__(self, method: str, why: str) -> None:
        super().__init__(
            f"the daemon went away before it answered {method} ({why}); look before you repeat it"
        )
        self.method = method
        self.why = why


class RemoteFailure(PortwrightError):
    """An error whose code this version does not know: a newer daemon's, or a plug-in's.

    ``code`` is the daemon's, set on the instance.
    """

    def __init__(self, code: str, message: str, facts: Mapping[str, object]) -> None:
        super().__init__(message)
        self.__dict__["code"] = code
        self._facts = dict(facts)

    def facts(self) -> dict[str, object]:
        """Return the facts as the daemon sent them."""
        return dict(self._facts)


class WireError(msgspec.Struct, frozen=True):
    """The shape of an error on the wire and in ``--json`` output."""

    code: str
    message: str
    facts: dict[str, object] = {}


def error_to_wire(error: BaseException) -> dict[str, object]:
    """Return the wire shape of ``error``.

    A deliberate error keeps code, message and facts. Anything else is a bug of ours: code
    ``internal``, and only the exception's class and text, never a traceback.
    """
    if isinstance(error, PortwrightError):
        return {"code": error.code, "message": str(error), "facts": error.facts()}
    return {
        "code": InternalError.code,
        "message": f"internal error: {type(error).__name__}: {error}; the daemon's log has more",
        "facts": {},
    }


def _leaves(base: type[PortwrightError]) -> Iterator[type[PortwrightError]]:
    for leaf in base.__subclasses__():
        yield leaf
        yield from _leaves(leaf)


def error_from_wire(wire: WireError) -> PortwrightError:
    """Return an error of the class that ``wire.code`` names, with its message and facts.

    The constructor is not run: the message was made by the daemon, whose version may word it
    otherwise. An unknown code gives :class:`RemoteFailure`.
    """
    if wire.code == PortwrightError.code:
        return _revive(PortwrightError, wire)
    for leaf in _leaves(PortwrightError):
        if leaf.__dict__.get("code") == wire.code:
            return _revive(leaf, wire)
    return RemoteFailure(wire.code, wire.message, wire.facts)


def _revive(cls: type[PortwrightError], wire: WireError) -> PortwrightError:
    error = cls.__new__(cls)
    Exception.__init__(error, wire.message)
    vars(error).update(wire.facts)
    return error
