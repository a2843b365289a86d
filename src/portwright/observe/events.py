"""Turns a drop record of the ring into words."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from portwright.dataplane import values
from portwright.dataplane.abi import SIZES, PwEvent

_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}
_ETHERTYPES = {0x0800: "ipv4", 0x0806: "arp", 0x86DD: "ipv6", 0x8100: "802.1q", 0x88A8: "802.1ad"}


#: Reasons that policy has beside a rule.
_POLICYS = frozenset({"policy", "not_ready", "flow_table", "fragment_order"})


class Drop(NamedTuple):
    """One reported drop; or, of reason ``logged``, a connection that a Log rule matched and policy lets pass.

    ``time`` is unix seconds.
    """

    time: float
    port_id: str
    ifindex: int
    direction: str
    reason: str
    rule: str
    summary: str
    lost: int


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
