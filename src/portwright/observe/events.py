"""Turns a drop record of the ring into words."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from typing import NamedTuple

from portwright.dataplane import values
from portwright.dataplane.abi import SIZES, PwEvent

_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}
_WITH_PORTS = frozenset({6, 17, 132})
_ETHERTYPES = {0x0800: "ipv4", 0x0806: "arp", 0x86DD: "ipv6", 0x8100: "802.1q", 0x88A8: "802.1ad"}


#: Reasons that policy has beside a rule.
_POLICYS = frozenset({"policy", "not_ready", "flow_table", "fragment_order"})


class Drop(NamedTuple):
    """One reported drop; or, of reason ``logged``, a connection that a Log rule matched and policy lets pass.

    ``time`` is unix seconds. ``endpoint``: the host endpoint that it is of, '' of a port; ``port_id`` is then
    ``host:`` and the interface.
    """

    time: float
    port_id: str
    ifindex: int
    direction: str
    reason: str
    rule: str
    summary: str
    lost: int
    endpoint: str = ""


def parse(record: bytes, policy_rule: Callable[[int], str] = str) -> Drop | None:
    """The drop in a ring record; None if the record is not of this release.

    ``policy_rule``: what a rule's number of the policy in force stands for.
    """
    if len(record) < SIZES["PwEvent"]:
        return None
    event = PwEvent.unpack(record[: SIZES["PwEvent"]])
    reason = values.reason_text(event.reason)
    return Drop(
        time=time.time() - (time.monotonic_ns() - event.time_ns) / 1e9,
        port_id=f"{event.port_id:016x}",
        ifindex=event.ifindex,
        direction="to_port" if event.dir else "from_port",
        reason=reason,
        rule=rule_of(reason, event.other_net, policy_rule),
        summary=summary(event),
        lost=event.lost,
    )


def rule_of(reason: str, other: int | None = None, policy_rule: Callable[[int], str] = str) -> str:
    """The rule that decided, by name. ``other``: the network on the other side, or the policy's rule."""
    if reason == "isolation":
        return f"isolation: net {other} is not in reach" if other else "isolation"
    if reason in {"policy", "logged"} and other is not None:
        return f"policy: {policy_rule(other)}"
    if reason == "limit":
        return "limit"
    if reason in _POLICYS:
        return f"policy: {reason}"
    return f"guard: {reason}"


def summary(event: PwEvent) -> str:
    """The packet in one line, tcpdump's way."""
    ethertype = int.from_bytes(event.be_ethertype, "big")
    kind = _ETHERTYPES.get(ethertype, f"ethertype 0x{ethertype:04x}")
    macs = f"{values.mac_text(event.src_mac)} > {values.mac_text(event.dst_mac)}"
    if ethertype not in (0x0800, 0x86DD, 0x0806):
        return f"{macs} {kind} length {event.len}"
    source, target = values.address_text(event.saddr) or "?", values.address_text(event.daddr) or "?"
    sport, dport = (int.from_bytes(p, "big") for p in (event.be_sport, event.be_dport))
    if sport or dport:
        source, target = f"{source}.{sport}", f"{target}.{dport}"
    proto = _PROTOCOLS.get(event.proto, f"proto {event.proto}") if ethertype != 0x0806 else "who-has/is-at"
    return f"{macs} {kind} {source} > {target} {proto} length {event.len}"


def ip_summary(ethertype: int, packet: bytes) -> str:
    """A packet that begins with its IP header in one line, as much as its first bytes tell."""
    kind = _ETHERTYPES.get(ethertype, f"ethertype 0x{ethertype:04x}")
    if ethertype == 0x0800 and len(packet) >= 20:
        length, proto, at = int.from_bytes(packet[2:4], "big"), packet[9], (packet[0] & 15) * 4
        source, target = (str(ipaddress.IPv4Address(packet[i : i + 4])) for i in (12, 16))
        later = int.from_bytes(packet[6:8], "big") & 0x1FFF
    elif ethertype == 0x86DD and len(packet) >= 40:
        length, proto, at = int.from_bytes(packet[4:6], "big") + 40, packet[6], 40
        source, target = (str(ipaddress.IPv6Address(packet[i : i + 16])) for i in (8, 24))
        later = 0  # behind a fragment header ``proto`` is none with ports
    else:
        return f"{kind} length {len(packet)}"
    ports = packet[at : at + 4]
    if proto in _WITH_PORTS and not later and len(ports) == 4:
        source, target = (
            f"{address}.{int.from_bytes(port, 'big')}"
            for address, port in ((source, ports[:2]), (target, ports[2:]))
        )
    return f"{kind} {source} > {target} {_PROTOCOLS.get(proto, f'proto {proto}')} length {length}"
