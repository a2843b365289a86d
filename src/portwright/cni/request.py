"""One CNI call as a value: environment and stdin, judged as the specification says.

The order of judgements is the Go library's (``pkg/skel``), so that a caller with several
mistakes hears of the same one first: variables, then stdin as JSON, the network's name,
the identifiers, the version and verb, and only then the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from portwright.cni import config
from portwright.cni.config import NetConf
from portwright.cni.errors import CniCode, CniError, map_error
from portwright.cni.fields import Fields, loads
from portwright.cni.requested import POD_LABELS, TAP_ARGS
from portwright.cni.version import CURRENT, require
from portwright.model.errors import PortwrightError
from portwright.model.port import Owner

COMMANDS: Final = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION")

#: Variables that must be there and not empty. CNI_PATH is not among them although skel asks for it:
#: only a foreign IPAM plugin needs it, and :mod:`portwright.cni.delegate` then says so.
_REQUIRED: Final = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME"),
}
#: Verbs that undo or tidy: nothing that they do not need may make them fail.
_LENIENT: Final = frozenset({"DEL", "GC"})

#: Keys of CNI_ARGS that are known; K8S_POD_INFRA_CONTAINER_ID repeats CNI_CONTAINERID.
_KNOWN_ARGS: Final = frozenset(
    {"IgnoreUnknown", "IP", "MAC", "K8S_POD_INFRA_CONTAINER_ID", *POD_LABELS, *TAP_ARGS}
)
_BOOLEANS: Final = {"1": True, "true": True, "0": False, "false": False}

_CONTAINER_ID: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*", re.ASCII)
#: IFNAMSIZ less the terminating zero (linux/if.h).
_MAX_IFNAME: Final = 15
_TRACE: Final = ("TRACEPARENT", "TRACESTATE", "BAGGAGE")


class CniRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A call that passed. For VERSION ``config`` is empty; for DEL and GC it is read leniently.

    ``netns`` is the caller's text ('' is possible but for ADD and CHECK) and belongs verbatim into
    results. ``env`` are the variables a delegated plugin must see. ``trace`` are the W3C trace
    headers, for logs.
    """

    command: str
    container_id: str = ""
    netns: str = ""
    ifname: str = ""
    args: dict[str, str] = {}
    path: tuple[str, ...] = ()
    config: NetConf
    raw_stdin: bytes = b""
    netns_override: bool = False
    env: dict[str, str] = {}
    trace: dict[str, str] = {}

    def owner(self) -> Owner:
        """Return the key of the attachment: configuration's name, container, device."""
        return Owner(kind="cni", network=self.config.name, container_id=self.container_id, ifname=self.ifname)

    def to_record(self) -> dict[str, object]:
        """Return what calling a foreign IPAM plugin again takes, as JSON values; for ``Port.cni``."""
        return {"env": dict(self.env), "stdin": self.raw_stdin.decode()}


def from_record(record: Mapping[str, object], command: str = "DEL") -> CniRequest:
    """Return the call that undoes a recorded ADD, whatever the caller of today says.

    ``record`` is of :meth:`CniRequest.to_record`. Raises :class:`CniError` 6 for anything else.
    """
    env, stdin = record.get("env"), record.get("stdin")
    if not isinstance(env, dict) or not isinstance(stdin, str):
        raise CniError(CniCode.DECODE, "the record of the CNI call is damaged")
    known = {str(key): str(value) for key, value in env.items()}
    return parse({**known, "CNI_COMMAND": command}, stdin.encode())


def parse(env: Mapping[str, str], stdin: bytes) -> CniRequest:
    """Return the call, or raise :class:`CniError`, and nothing else whatever the input.

    Codes: 4 environment, 6 stdin is no JSON object, 1 version or verb for the version,
    7 and 2 configuration (see :mod:`portwright.cni.config`).
    """
    try:
        return _parse(env, stdin)
    except PortwrightError as error:
        raise map_error(error) from None


def _parse(env: Mapping[str, str], stdin: bytes) -> CniRequest:
    command = env.get("CNI_COMMAND", "")
    _check_environment(command, env)
    if command == "VERSION":
        return CniRequest(command=command, config=NetConf(name="", cni_version=CURRENT))
    top = Fields(loads(stdin, "network config"))
    container_id, ifname = env.get("CNI_CONTAINERID", ""), env.get("CNI_IFNAME", "")
    _, version = config.identity(top)
    if container_id and not _CONTAINER_ID.fullmatch(container_id):
        raise CniError(
            CniCode.BAD_ENVIRONMENT, "invalid characters in containerID", f"CNI_CONTAINERID={container_id}"
        )
    if ifname:
        check_ifname(ifname)
    require(version, command)
    if command in _LENIENT:
        args: dict[str, str] = {}
        conf = config.read_leniently(top, command)
    else:
        args = parse_args(env.get("CNI_ARGS", ""))
        conf = config.read(top, args)
    return CniRequest(
        command=command,
        container_id=container_id,
        netns=env.get("CNI_NETNS", ""),
        ifname=ifname,
        args=args,
        path=tuple(part for part in env.get("CNI_PATH", "").split(":") if part),
        config=conf,
        raw_stdin=stdin,
        netns_override=env.get("CNI_NETNS_OVERRIDE", "").upper() in {"1", "TRUE"},
        env={key: value for key, value in env.items() if key.startswith("CNI_") or key in _TRACE},
        trace={key: env[key] for key in _TRACE if env.get(key)},
    )


def _check_environment(command: str, env: Mapping[str, str]) -> None:
    """Judge the variables without stdin; all missing ones come in one message (skel's sentence)."""
    missing = [key for key in ("CNI_COMMAND", *_REQUIRED.get(command, ())) if not env.get(key)]
    if missing:
        raise CniError(CniCode.BAD_ENVIRONMENT, f"required env variables [{','.join(missing)}] missing")
    if command not in COMMANDS:
        raise CniError(CniCode.BAD_ENVIRONMENT, f"unknown CNI_COMMAND: {command}")
    for key, value in env.items():
        if key.startswith("CNI_") and not _encodable(value):
            raise CniError(CniCode.BAD_ENVIRONMENT, f"{key} is not UTF-8")


def _encodable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def check_ifname(text: str) -> None:
    """Refuse, with code 4, a device name that the kernel would refuse or mangle (dev_valid_name())."""
    why = ""
    if not text:
        why = "interface name is empty"
    elif len(text.encode()) > _MAX_IFNAME:
        why = f"interface name is too long: it should be less than {_MAX_IFNAME + 1} characters"
    elif text in {".", ".."}:
        why = "interface name is . or .."
    elif any(char in "/:" or char.isspace() for char in text):
        why = "interface name contains / or : or whitespace characters"
    elif not text.isprintable():
        why = "interface name contains control characters"
    if why:
        raise CniError(CniCode.BAD_ENVIRONMENT, why, f"CNI_IFNAME={text}")


def parse_args(text: str) -> dict[str, str]:
    """Return CNI_ARGS (``K=V;K=V``) by the Go library's rules.

    Exactly one ``=`` in each pair; an unknown key is an error unless ``IgnoreUnknown`` is 1 or
    true; the last of two equal keys wins. Unknown keys are dropped. Raises :class:`CniError` 4.
    """
    if not text:
        return {}
    pairs: dict[str, str] = {}
    for pair in text.split(";"):
        key, _, value = pair.partition("=")
        if pair.count("=") != 1:
            raise CniError(CniCode.BAD_ENVIRONMENT, f'CNI_ARGS: invalid pair "{pair}"')
        pairs[key] = value
    ignore = pairs.get("IgnoreUnknown", "0").lower()
    if ignore not in _BOOLEANS:
        raise CniError(
            CniCode.BAD_ENVIRONMENT, f'CNI_ARGS: IgnoreUnknown must be true or false, not "{ignore}"'
        )
    unknown = [f'"{key}={value}"' for key, value in pairs.items() if key not in _KNOWN_ARGS]
    if unknown and not _BOOLEANS[ignore]:
        raise CniError(CniCode.BAD_ENVIRONMENT, f"CNI_ARGS: unknown args [{' '.join(unknown)}]")
    return {key: value for key, value in pairs.items() if key in _KNOWN_ARGS}
