"""From the words of the model to the bytes of the maps, and back. Pure."""

from __future__ import annotations

import ipaddress
import socket
import sys

from portwright.dataplane.abi import PwDir, PwDropKey, PwLimitSpec, PwPort, PwPortFlag, PwReason, PwTarget
from portwright.model.port import Limits

ZERO = bytes(16)
_V4 = bytes(10) + b"\xff\xff"


def address(text: str) -> bytes:
    """``struct pw_addr``: IPv6 as it is, IPv4 mapped (RFC 4291, 2.5.5.2). ValueError for others."""
    try:
        if ":" in text:
            return socket.inet_pton(socket.AF_INET6, text)
        return _V4 + socket.inet_pton(socket.AF_INET, text)
    except OSError:  # one with a zone, or none: of a thousand ports' addresses it is not asked
        packed = ipaddress.ip_address(text).packed
        return packed if len(packed) == 16 else _V4 + packed


def address_text(raw: bytes) -> str:
    """The inverse of ``address``; '' for zero."""
    if raw == ZERO:
        return ""
    if raw.startswith(_V4):
        return str(ipaddress.IPv4Address(raw[12:]))
    return str(ipaddress.IPv6Address(raw))


def mac(text: str) -> bytes:
    """The six bytes of ``02:00:00:00:00:01``; ValueError for other than hexadecimal digits and colons."""
    return bytes.fromhex(text.replace(":", ""))


def mac_text(raw: bytes) -> str:
    """The inverse of ``mac``."""
    return raw.hex(":")


def link_local(mac_address: str) -> str:
    """The address that the sandbox's kernel derives from its MAC (RFC 4291, appendix A)."""
    raw = mac(mac_address)
    eui = bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:]
    return str(ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + eui))


def port_value(
    *,
    port_id: str,
    net_id: int,
    mac_address: str,
    gateway_mac: str,
    mtu: int,
    sandbox: int,
    addresses: tuple[str, ...],
    gateways: tuple[str, ...],
    limits: Limits,
    flows: int = 0,
    names: bool = False,
    tap: bool = False,
    onlink: bool = False,
) -> bytes:
    """The value of pw_ports. ``flows``: the count that the data path keeps in it.

    ``names``: its look-ups are proxied. ``tap``: its representor is a tap. ``onlink``: it came off a bridge.
    """
    flags = PwPortFlag.PF_NAMES if names else 0
    if tap:
        flags |= PwPortFlag.PF_TAP
    if onlink:
        flags |= PwPortFlag.PF_ONLINK
    if limits.egress_rate:
        flags |= PwPortFlag.PF_LIMIT_FROM
    if limits.ingress_rate:
        flags |= PwPortFlag.PF_LIMIT_TO
    return PwPort(
        port_id=int(port_id, 16),
        sandbox=sandbox,
        net_id=net_id,
        mtu=mtu,
        flags=flags,
        mac=mac(mac_address),
        gateway_mac=mac(gateway_mac),
        addr4=_first(addresses, 4),
        addr6=_first(addresses, 6),
        link_local=address(link_local(mac_address)),
        gateway4=_first(gateways, 4),
        gateway6=_first(gateways, 6),
        flows=flows,
    ).pack()


def target_value(
    *,
    port_id: str,
    net_id: int,
    ifindex: int,
    mtu: int,
    sandbox: int,
    mac_address: str,
    gateway_mac: str,
    limited: bool,
    down: bool = False,
    tap: bool = False,
) -> bytes:
    """The value of pw_addrs."""
    flags = PwPortFlag.PF_LIMIT_TO if limited else 0
    if tap:
        flags |= PwPortFlag.PF_TAP
    if down:
        flags |= PwPortFlag.PF_DOWN
    return PwTarget(
        port_id=int(port_id, 16),
        sandbox=sandbox,
        net_id=net_id,
        ifindex=ifindex,
        mtu=mtu,
        flags=flags,
        mac=mac(mac_address),
        gateway_mac=mac(gateway_mac),
    ).pack()


def limit_value(rate_bits: int, burst_bits: int, now_ns: int) -> bytes:
    """The value of pw_limits: a lock, padding, and a full bucket. Rates come in bits."""
    spec = PwLimitSpec(
        rate=max(rate_bits // 8, 1), burst=burst_bits // 8, tokens=burst_bits // 8, last_ns=now_ns
    )
    return bytes(8) + spec.pack()


def limit_spec(value: bytes) -> PwLimitSpec:
    """What a value of pw_limits says, in bytes and nanoseconds."""
    return PwLimitSpec.unpack(value[8:])


def reason_text(reason: int) -> str:
    """``PwReason.R_SRC_MAC`` -> ``src_mac``; an unknown number says so. None: a rule logs what passed."""
    if reason == PwReason.R_NONE:
        return "logged"
    try:
        return PwReason(reason).name.removeprefix("R_").lower()
    except ValueError:
        return f"reason_{reason}"


def port_key(port_id: str) -> bytes:
    """The key of maps by port_id."""
    return int(port_id, 16).to_bytes(8, sys.byteorder)


def port_text(value: bytes) -> str:
    """The port_id at the head of a value of pw_ports or pw_addrs."""
    return f"{int.from_bytes(value[:8], sys.byteorder):016x}"


def drop_keys(port_id: str) -> list[bytes]:
    """Every key that pw_drops can hold for a port."""
    number = int(port_id, 16)
    return [
        PwDropKey(port_id=number, dir=direction, reason=reason).pack()
        for direction in PwDir
        for reason in PwReason
        if reason not in (PwReason.R_NONE, PwReason.R_MAX)
    ]


def _first(addresses: tuple[str, ...], version: int) -> bytes:
    for text in addresses:
        if (":" in text) == (version == 6):
            return address(text)
    return ZERO
