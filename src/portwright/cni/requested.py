"""What the runtime asks for one attachment: runtimeConfig, args.cni and CNI_ARGS, as values.

Sources: CNI CONVENTIONS ("Dynamic Plugin specific Fields", "args in network config",
"CNI_ARGS") and the reference plugins for the keys' shapes. Precedence, weakest first:
the configuration itself, CNI_ARGS, args.cni, runtimeConfig. A stronger channel replaces,
it does not append.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from portwright.cni.errors import unsupported
from portwright.cni.fields import Fields, address, as_fields, as_text, elements, interface, subnet
from portwright.model.errors import InvalidInput
from portwright.model.network import AddressRange, Dns
from portwright.model.port import Limits, PortMapping

_MAX_PORT: Final = 65535
_MAX_I64: Final = (1 << 63) - 1
_MAC: Final = re.compile(r"[0-9a-f]{2}([:-])(?:[0-9a-f]{2}\1){4}[0-9a-f]{2}", re.IGNORECASE | re.ASCII)
PROTOCOLS: Final = ("tcp", "udp", "sctp")

#: Capabilities of other plugins. A runtime sends them only to a configuration that declares them, so
#: one that arrives with a value was meant for us, and dropping it would be a lie.
_FOREIGN_CAPABILITIES: Final = ("deviceID", "infinibandGUID", "aliases", "cgroupPath", "CNIDeviceInfoFile")

#: The keys of CNI_ARGS that Kubernetes' runtimes send, with the labels they become.
POD_LABELS: Final = {
    "K8S_POD_NAMESPACE": "io.kubernetes.pod.namespace",
    "K8S_POD_NAME": "io.kubernetes.pod.name",
    "K8S_POD_UID": "io.kubernetes.pod.uid",
}
#: The keys of CNI_ARGS by which tc-redirect-tap's users choose a tap's name and owner.
TAP_ARGS: Final = ("TC_REDIRECT_TAP_NAME", "TC_REDIRECT_TAP_UID", "TC_REDIRECT_TAP_GID")


class Requested(msgspec.Struct, frozen=True, kw_only=True):
    """One attachment's wishes. ``ips`` are bare addresses; ``mac`` '' means no wish.

    ``ip_ranges`` are used before the network's own; ``dns`` None means that nothing was said.
    """

    port_mappings: tuple[PortMapping, ...] = ()
    limits: Limits = Limits()
    ips: tuple[str, ...] = ()
    ip_ranges: tuple[tuple[AddressRange, ...], ...] = ()
    mac: str = ""
    dns: Dns | None = None
    labels: dict[str, str] = {}


def read(top: Fields, args: Mapping[str, str]) -> Requested:
    """Read the wishes in the configuration ``top`` and the parsed CNI_ARGS ``args``.

    Raises :class:`InvalidInput` (code 7) for wrong values and :class:`CniError` 2 for a
    capability that Portwright does not have.
    """
    runtime = top.child("runtimeConfig") or Fields({}, "runtimeConfig")
    outer = top.child("args")
    cni_args = (outer.child("cni") if outer else None) or Fields({}, "args.cni")
    for key in _FOREIGN_CAPABILITIES:
        value = runtime.get(key)
        if value not in (None, "", [], {}):
            raise unsupported(runtime.at(key), value, "Portwright does not have this capability")
    # Runtimes send empty capabilities for pods that ask for nothing: that is unsaid, not "none".
    mappings = runtime if runtime.get("portMappings") else top
    shaping = (runtime if runtime.get("bandwidth") else top).child("bandwidth")
    return Requested(
        port_mappings=_port_mappings(mappings),
        limits=_limits(shaping) if shaping else Limits(),
        ips=_ips(runtime, cni_args, args),
        ip_ranges=range_sets(runtime.at("ipRanges"), runtime.get("ipRanges")),
        mac=_mac(top, runtime, cni_args, args),
        dns=_dns(runtime.child("dns")),
        labels=_labels(cni_args, args),
    )


def range_sets(at: str, value: object) -> tuple[tuple[AddressRange, ...], ...]:
    """Read host-local's ``ranges``: an array of sets, each an array of ranges; () if absent.

    Only shapes and single values are judged here, and one family per set; how ranges lie to each
    other is the allocator's to judge.
    """
    if value is None:
        return ()
    sets = []
    for set_at, entry in elements(at, value):
        ranges = tuple(range_in(as_fields(one_at, one)) for one_at, one in elements(set_at, entry))
        if not ranges:
            raise InvalidInput(set_at, entry, "no IP ranges specified: an empty range set")
        if len({":" in one.subnet for one in ranges}) > 1:
            raise InvalidInput(
                set_at, [one.subnet for one in ranges], "mixed address families in one range set"
            )
        sets.append(ranges)
    return tuple(sets)


def range_in(fields: Fields) -> AddressRange:
    """Read one range: ``subnet`` and, inside its family, ``rangeStart``, ``rangeEnd``, ``gateway``."""
    if not fields.text("subnet"):
        raise InvalidInput(fields.at("subnet"), None, "missing: a range needs a subnet")
    network = subnet(fields.at("subnet"), fields.text("subnet"))

    def inside(key: str) -> str | None:
        text = fields.text(key)
        if not text:
            return None
        found = str(address(fields.at(key), text))
        if (":" in found) != (":" in network):
            raise InvalidInput(fields.at(key), text, f"mixed address families: the subnet is {network}")
        return found

    return AddressRange(
        subnet=network, start=inside("rangeStart"), end=inside("rangeEnd"), gateway=inside("gateway")
    )


def mac_address(at: str, text: str) -> str:
    """Return a unicast Ethernet address as lower-case ``aa:bb:cc:dd:ee:ff``."""
    if not _MAC.fullmatch(text):
        raise InvalidInput(at, text, "must be a MAC address like 02:00:00:00:00:01")
    canonical = text.lower().replace("-", ":")
    if int(canonical[:2], 16) & 1 or canonical == "00:00:00:00:00:00":
        raise InvalidInput(at, text, "must be a unicast MAC address")
    return canonical


def _mac(top: Fields, runtime: Fields, cni_args: Fields, args: Mapping[str, str]) -> str:
    for at, text in (
        (runtime.at("mac"), runtime.text("mac")),
        (cni_args.at("mac"), cni_args.text("mac")),
        ("CNI_ARGS.MAC", args.get("MAC", "")),
        (top.at("mac"), top.text("mac")),
    ):
        if text:
            return mac_address(at, text)
    return ""


def _ips(runtime: Fields, cni_args: Fields, args: Mapping[str, str]) -> tuple[str, ...]:
    for fields in (runtime, cni_args):
        given = fields.array("ips")
        if given:
            return _unique([(at, as_text(at, one)) for at, one in given])
    listed = args.get("IP", "")
    return _unique([("CNI_ARGS.IP", one.strip()) for one in listed.split(",")]) if listed else ()


def _unique(wishes: list[tuple[str, str]]) -> tuple[str, ...]:
    """Return the bare addresses; a prefix length may be given and is the network's to decide."""
    found: dict[str, None] = {}
    for at, text in wishes:
        bare = str(interface(at, text).ip) if "/" in text else str(address(at, text))
        if bare in found:
            raise InvalidInput(at, text, "the same address is asked for twice")
        found[bare] = None
    return tuple(found)


def _port_mappings(fields: Fields) -> tuple[PortMapping, ...]:
    found: list[PortMapping] = []
    for entry in fields.children("portMappings"):
        protocol = entry.text("protocol", "tcp").lower()
        if protocol not in PROTOCOLS:
            raise InvalidInput(entry.at("protocol"), protocol, f"must be one of {', '.join(PROTOCOLS)}")
        host_ip = entry.text("hostIP")
        mapping = PortMapping(
            host_port=_port(entry, "hostPort", "host"),
            container_port=_port(entry, "containerPort", "container"),
            protocol=protocol,
            host_ip=str(address(entry.at("hostIP"), host_ip)) if host_ip else "",
        )
        for other in found:
            if (other.host_port, other.protocol, other.host_ip) == (
                mapping.host_port,
                protocol,
                mapping.host_ip,
            ):
                raise InvalidInput(
                    entry.at("hostPort"), mapping.host_port, f"{protocol} host port is mapped twice"
                )
        found.append(mapping)
    return tuple(found)


def _port(entry: Fields, key: str, side: str) -> int:
    """Read a port of 1..65535 (the reference lets more than 65535 pass)."""
    value = entry.number(key, -_MAX_I64, _MAX_I64) or 0
    if not 1 <= value <= _MAX_PORT:
        raise InvalidInput(entry.at(key), value, f"Invalid {side} port number: {value}")
    return value


def _limits(fields: Fields) -> Limits:
    """Read bandwidth, in bits per second and bits; a rate and its burst only come together."""
    numbers: dict[str, int] = {}
    for side in ("ingress", "egress"):
        rate = fields.number(f"{side}Rate", 0, _MAX_I64) or 0
        burst = fields.number(f"{side}Burst", 0, _MAX_I64) or 0
        if rate and not burst:
            raise InvalidInput(fields.at(f"{side}Burst"), burst, "if rate is set, burst must also be set")
        if burst and not rate:
            raise InvalidInput(fields.at(f"{side}Rate"), rate, "if burst is set, rate must also be set")
        numbers[f"{side}_rate"], numbers[f"{side}_burst"] = rate, burst
    return Limits(**numbers)


def _dns(fields: Fields | None) -> Dns | None:
    """Read the dns capability, whose names differ from a result's: searches, servers, options.

    All three empty is what CRI runtimes send for a pod without dnsConfig, and means unsaid.
    """
    if fields is None or not any(fields.get(key) for key in ("searches", "servers", "options")):
        return None
    at = fields.at("servers")
    return Dns(
        nameservers=tuple(str(address(f"{at}[{i}]", text)) for i, text in enumerate(fields.texts("servers"))),
        search=fields.texts("searches"),
        options=fields.texts("options"),
    )


def _labels(cni_args: Fields, args: Mapping[str, str]) -> dict[str, str]:
    """Return the labels of args.cni.labels, and over them the pod's identity from CNI_ARGS.

    The labels may be a tenant's, the identity is the runtime's own word: where it says anything of the pod,
    no label does. Labels come as the conventions' ``[{"key":…,"value":…}]`` or as a plain object.
    """
    identity = {label: args[key] for key, label in POD_LABELS.items() if args.get(key)}
    labels: dict[str, str] = {}
    given = cni_args.get("labels")
    at = cni_args.at("labels")
    if isinstance(given, dict):
        pairs = [(f"{at}.{key}", key, as_text(f"{at}.{key}", value)) for key, value in given.items()]
    else:
        entries = [as_fields(one_at, one) for one_at, one in elements(at, given or [])]
        pairs = [(one.at("key"), one.text("key"), one.text("value")) for one in entries]
    seen: set[str] = set()
    for key_at, key, value in pairs:
        if not key or key in seen:
            raise InvalidInput(key_at, key, "a label needs a key, and each key once")
        seen.add(key)
        if not (identity and key in POD_LABELS.values()):
            labels[key] = value
    return identity | labels
