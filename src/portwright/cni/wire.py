"""What the shim and the daemon say to each other inside ``C`` and ``c`` frames.

Request payload:  u32 BE length of the environment block, the block (``K=V`` and a zero byte
each), then stdin to the end. Descriptors, with the frame's first byte: the shim's own network
namespace, then the one CNI_NETNS names if it could be opened.
Reply payload:    u8 exit status, u32 BE length of stdout, stdout, then stderr to the end.
A file in the spool is a request payload and nothing else.
"""

from __future__ import annotations

import json
import struct
from typing import Final

from portwright.cni.errors import CniCode, CniError, map_error
from portwright.cni.version import CURRENT, SUPPORTED

_REQUEST: Final = struct.Struct("!I")
_REPLY: Final = struct.Struct("!BI")
#: Exit status of every refusal, as the Go library's.
FAILURE: Final = 1


def decode_request(payload: bytes) -> tuple[dict[str, str], bytes]:
    """Return (environment, stdin). Undecodable bytes become surrogates, as in ``os.environ``.

    Raises :class:`CniError` 6 if the payload has not the shape above; an entry without ``=`` or
    with a repeated name is one too.
    """
    if len(payload) < _REQUEST.size:
        raise CniError(CniCode.DECODE, "short request from the CNI shim")
    (length,) = _REQUEST.unpack_from(payload)
    end = _REQUEST.size + length
    block = payload[_REQUEST.size : end]
    if end > len(payload) or (block and not block.endswith(b"\0")):
        raise CniError(CniCode.DECODE, "malformed request from the CNI shim")
    env: dict[str, str] = {}
    for entry in block.split(b"\0")[:-1]:
        key, equals, value = entry.decode("utf-8", "surrogateescape").partition("=")
        if not equals or not key or key in env:
            raise CniError(CniCode.DECODE, f"malformed variable {key!r:.80} from the CNI shim")
        env[key] = value
    return env, payload[end:]


def encode_request(env: dict[str, str], stdin: bytes) -> bytes:
    """Return the payload that the shim would send; for tests and for replaying tools."""
    block = b"".join(
        f"{key}={value}".encode("utf-8", "surrogateescape") + b"\0" for key, value in env.items()
    )
    return _REQUEST.pack(len(block)) + block + stdin


def encode_reply(stdout: bytes = b"", *, status: int = 0, stderr: bytes = b"") -> bytes:
    """Return a reply's payload."""
    return _REPLY.pack(status, len(stdout)) + stdout + stderr


def decode_reply(payload: bytes) -> tuple[int, bytes, bytes]:
    """Return (status, stdout, stderr) of a reply's payload; the inverse of :func:`encode_reply`."""
    status, length = _REPLY.unpack_from(payload)
    rest = payload[_REPLY.size :]
    return status, rest[:length], rest[length:]


def error_reply(error: BaseException, version: str = "") -> bytes:
    """Return the payload that reports ``error`` (see :func:`portwright.cni.errors.map_error`)."""
    return encode_reply(map_error(error).to_json(version), status=FAILURE)


def version_json(version: str = CURRENT) -> bytes:
    """Return VERSION's answer. The shim gives its own; this is the same one for other callers."""
    return json.dumps({"cniVersion": version, "supportedVersions": list(SUPPORTED)}).encode() + b"\n"


def version_hint(stdin: bytes) -> str:
    """Return the ``cniVersion`` an error to this stdin should carry, '' if it cannot be read.

    Never raises: it serves the very calls whose stdin is broken.
    """
    try:
        value = json.loads(stdin)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(value, dict):
        return ""
    found = next((one for key, one in value.items() if key.casefold() == "cniversion"), "")
    return found if isinstance(found, str) and found in SUPPORTED else ""
