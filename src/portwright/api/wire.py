"""What both clients share: requests to bytes, answers to values. Pure."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from portwright.api import frames
from portwright.api.calls import Call
from portwright.api.errors import ProtocolError, WireError, error_from_wire
from portwright.api.frames import Frame
from portwright.api.registry import CONTRACT, PROTOCOL

Result = TypeVar("Result")
#: A connection without use for longer is replaced before the next request: well below the
#: server's idle_timeout, so that its close and our request can't cross.
REUSE_WITHIN = 15.0


class Reply(msgspec.Struct, frozen=True):
    """A ``j`` or ``e`` frame: exactly one of result, error, event or lost is there."""

    id: int | None
    result: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    error: WireError | msgspec.UnsetType = msgspec.UNSET
    event: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    lost: int = 0


def request_frame(request_id: int, method: str, params: object) -> bytes:
    """Return the frame of a JSON request. Raises ProtocolError if it would be over the limit."""
    envelope = {"v": PROTOCOL, "id": request_id, "method": method, "params": params}
    payload = msgspec.json.encode(envelope)
    kind, limit = frames.JSON_REQUEST, frames.MAX_REQUEST
    if len(payload) > limit and CONTRACT[method].large:
        kind, limit = frames.LARGE_REQUEST, frames.MAX_LARGE
    if len(payload) > limit:
        why = f"a {method} request of {len(payload)} bytes is over the limit of {limit}; send it in parts"
        raise ProtocolError(why)
    return frames.encode(kind, payload)


def parse_reply(frame: Frame) -> Reply:
    """Return the frame's content. Raises ProtocolError if it isn't a reply."""
    if frame.kind not in (frames.JSON_REPLY, frames.EVENT):
        raise ProtocolError(f"an answer of kind {chr(frame.kind)!r} to a JSON request")
    try:
        return msgspec.json.decode(frame.payload, type=Reply)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not an answer: {error}") from None


def result_of(reply: Reply, call: Call[Result]) -> Result:
    """Return the result as the call's type. Raises the error that the reply carries, or ProtocolError."""
    if isinstance(reply.error, WireError):
        raise error_from_wire(reply.error)
    if not isinstance(reply.result, msgspec.Raw):
        raise ProtocolError(f"the answer to {call.method} has neither result nor error")
    return _decode(reply.result, call)


class Events:
    """Turns the replies of one stream into events; carries the count of lost ones to the next event."""

    def __init__(self, call: Call[Any]) -> None:
        self._call = call
        self._lost = 0
        self.ended = False

    def take(self, reply: Reply) -> list[Any]:
        """Return the events of a reply: none or one. Sets ``ended``. Raises as :func:`result_of`."""
        if isinstance(reply.event, msgspec.Raw):
            event = _decode(reply.event, self._call)
            if self._lost and "lost" in getattr(event, "__struct_fields__", ()):
                event = msgspec.structs.replace(event, lost=event.lost + self._lost)
                self._lost = 0
            return [event]
        if isinstance(reply.error, WireError):
            raise error_from_wire(reply.error)
        self._lost += reply.lost
        self.ended = isinstance(reply.result, msgspec.Raw)
        return []


def _decode(raw: msgspec.Raw, call: Call[Result]) -> Result:
    try:
        return msgspec.json.decode(raw, type=call.result)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"the answer to {call.method} is not understood: {error}") from None
