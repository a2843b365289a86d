"""What the server's frames hold: a request's envelope, and answers. ``wire`` is the clients' side."""

from __future__ import annotations

import logging

import msgspec

from portwright.api import frames
from portwright.api.errors import ProtocolError, error_to_wire
from portwright.model.errors import InternalError

_log = logging.getLogger(__name__)


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON request. ``id`` is the client's, unique among its requests that are not answered yet."""

    v: int
    id: int
    method: str
    params: dict[str, object] = {}


def envelope(payload: bytes) -> Envelope:
    """Return the envelope of a JSON request. Raises ProtocolError."""
    try:
        return msgspec.json.decode(payload, type=Envelope)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a request: {error}") from None


def encode(value: object) -> bytes:
    """Return the value as JSON; what JSON has no form for, as its repr."""
    return msgspec.json.encode(value, enc_hook=repr)


def opaque(result: object) -> bytes:
    """Return the payload of an answer to a CNI request. Raises InternalError if it isn't one."""
    if not isinstance(result, bytes) or len(result) > frames.MAX_REPLY:
        raise InternalError(f"the answer to a CNI request is {type(result).__name__} or too long")
    return result


def answer(request_id: int | None, *, result: object = None, error: BaseException | None = None) -> bytes:
    """Return the payload of an answer. What JSON or a frame can't hold becomes an ``internal`` error."""
    try:
        if error is not None:
            payload = encode({"id": request_id, "error": error_to_wire(error)})
        else:
            payload = encode({"id": request_id, "result": result})
    except Exception as failure:  # noqa: BLE001 - the peer waits for an answer
        _log.error("an answer can't be encoded", exc_info=failure)
        why = ascii(f"the answer can't be encoded: {failure}")
    else:
        if len(payload) <= frames.MAX_REPLY:
            return payload
        why = f"the answer of {len(payload)} bytes is over the limit of {frames.MAX_REPLY}"
    return encode({"id": request_id, "error": {"code": "internal", "message": why, "facts": {}}})
