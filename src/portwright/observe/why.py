"""What would happen to a packet: the very programs, on the live maps, with a made packet.

``BPF_PROG_TEST_RUN`` runs ``pw_from_port`` as if the sandbox had sent the packet, or ``pw_to_port``
as if the host had. A mark and a priority that no sandbox can set make the run write its steps
and leave every counter as it is (abi.h, ``pw_trace_const``). Nothing is sent.
"""

from __future__ import annotations

import ipaddress
import struct
import sys
from collections.abc import Mapping
from typing import NamedTuple

from portwright.dataplane import values
from portwright.dataplane.abi import SIZES, PwSlow, PwStep, PwTrace, PwTraceConst, PwVerdict
from portwright.kernel.bpf import Map, Program

PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "sctp": 132}
#: Offsets in struct __sk_buff (linux/bpf.h), which is stable API.
_MARK, _PRIORITY, _INGRESS, _IFINDEX, _SIZE = 8, 32, 36, 40, 192
TC_ACT_SHOT, TC_ACT_REDIRECT = 2, 7

_SLOW = {
    PwSlow.SLOW_CONFIG: "the fast path is switched off",
    PwSlow.SLOW_TTL: "its TTL ends here, the host answers",
    PwSlow.SLOW_MTU: "it is larger than the target's MTU, the host answers",
    PwSlow.SLOW_FRAGMENT: "it is a fragment",
    PwSlow.SLOW_FLOW: "the host translates this flow",
    PwSlow.SLOW_OPTIONS: "it has IP options or extension headers",
    PwSlow.SLOW_SCOPE: "its source is link-local, the host refuses to forward it",
    PwSlow.SLOW_PADDING: "it has padding, which the host takes off",
    PwSlow.SLOW_ERROR: "it is an ICMP error, perhaps about a flow that the host translates",
    PwSlow.SLOW_NAMES: "it is a look-up, which the host steers to the proxy of domain names",
    PwSlow.SLOW_TAP: "it is for a tap, which has no other side to redirect to",
}
_ANSWERS = {1: "ARP", 2: "neighbour discovery", 3: "echo"}


class Step(NamedTuple):
    """A short name, a sentence, the facts."""

    step: str
    text: str
    detail: str


class Trace(NamedTuple):
    """``verdict`` is ``forward`` (fast path), ``drop``, ``answered`` or ``host`` (a miss, or delivered)."""

    verdict: str
    steps: list[Step]
    ifindex: int
    reason: str
    slow: str


def packet(
    *,
    src_mac: str,
    dst_mac: str,
    src: str,
    dst: str,
    proto: str,
    sport: int = 40000,
    dport: int = 80,
    ttl: int = 64,
) -> bytes:
    """A first packet of a flow: TCP SYN, UDP, SCTP INIT's header, or an echo request."""
    source, target = ipaddress.ip_address(src), ipaddress.ip_address(dst)
    number = PROTOCOLS[proto]
    if source.version == 6 and number == 1:
        number = 58
    match number:
        case 6:
            l4 = struct.pack("!HHIIBBHHH", sport, dport, 1, 0, 0x50, 2, 65535, 0, 0)
        case 17:
            l4 = struct.pack("!HHHH", sport, dport, 8, 0)
        case 132:
            l4 = struct.pack("!HHII", sport, dport, 0, 0)
        case _:
            l4 = struct.pack("!BBHHH", 8 if number == 1 else 128, 0, 0, 1, 1)
    mac = values.mac(dst_mac) + values.mac(src_mac)
    if source.version == 4:
        head = struct.pack(
            "!BBHHHBBH4s4s", 0x45, 0, 20 + len(l4), 1, 0, ttl, number, 0, source.packed, target.packed
        )
        # Of the header only (RFC 791): the guard refuses a wrong one.
        total = sum(struct.unpack("!10H", head))
        total = (total & 0xFFFF) + (total >> 16)
        check = struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF)
        return mac + b"\x08\x00" + head[:10] + check + head[12:] + l4
    head = struct.pack("!IHBB16s16s", 6 << 28, len(l4), number, ttl, source.packed, target.packed)
    return mac + b"\x86\xdd" + head + l4


def run(
    program: Program, maps: Mapping[str, Map], frame: bytes, ifindex: int, ingress_ifindex: int = 0
) -> Trace:
    """Runs ``program`` on ``frame`` as of device ``ifindex``. Call it in the device's namespace."""
    maps["pw_trace"].update(bytes(4), bytes(SIZES["PwTrace"]))
    context = bytearray(_SIZE)
    for offset, number in (
        (_MARK, PwTraceConst.TRACE_MARK),
        (_PRIORITY, PwTraceConst.TRACE_PRIORITY),
        (_INGRESS, ingress_ifindex),
        (_IFINDEX, ifindex),
    ):
        context[offset : offset + 4] = int(number).to_bytes(4, sys.byteorder)
    outcome = program.test_run(frame, ctx=bytes(context))
    raw = maps["pw_trace"].lookup(bytes(4)) or bytes(SIZES["PwTrace"])
    return explain(PwTrace.unpack(raw), outcome.retval)


def explain(trace: PwTrace, verdict: int) -> Trace:
    """The steps in words. Pure."""
    steps: list[Step] = []
    ifindex, reason, slow, answered = 0, "", "", False
    for n in range(min(trace.used, PwTraceConst.TRACE_STEPS)):
        step, a, b = struct.unpack_from("=III", trace.steps, n * 12)
        match step:
            case PwStep.S_PORT:
                steps.append(Step("port", "the device belongs to a port", f"net {a}"))
            case PwStep.S_PARSED:
                steps.append(Step("parse", "the headers are whole", f"ethertype 0x{a:04x}, protocol {b}"))
            case PwStep.S_GUARD_OK:
                steps.append(Step("guard", "source MAC and address are the port's own", ""))
            case PwStep.S_ANSWERED:
                answered = True
                steps.append(
                    Step("answer", f"the gateway answers {_ANSWERS.get(a, '')} in the data path", "")
                )
            case PwStep.S_NO_TARGET:
                steps.append(Step("destination", "no port has this address: to the host's stack", "miss"))
            case PwStep.S_MULTICAST:
                steps.append(Step("destination", "multicast: to the representor only", "miss"))
            case PwStep.S_TARGET:
                ifindex = a
                steps.append(
                    Step("destination", "a port of this host has the address", f"ifindex {a}, net {b}")
                )
            case PwStep.S_REACH_OK:
                steps.append(Step("isolation", "the networks name each other", f"net {a} -> net {b}"))
            case PwStep.S_POLICY:
                sides = zip(("sender", "receiver"), (a, b), strict=True)
                said = ", ".join(
                    f"{who}: {'deny' if word & PwVerdict.V_DENY else 'allow'}" for who, word in sides
                )
                rules = f"rules {a & PwVerdict.V_RULE} and {b & PwVerdict.V_RULE}"
                steps.append(Step("policy", f"the policies' verdicts, {said}", rules))
            case PwStep.S_FAST:
                steps.append(
                    Step("deliver", "straight into the sandbox", f"redirect to the peer of ifindex {a}")
                )
            case PwStep.S_SLOW:
                slow = _SLOW.get(PwSlow(a), str(a)) if a in PwSlow._value2member_map_ else str(a)
                steps.append(Step("deliver", f"through the host's stack: {slow}", ""))
            case PwStep.S_DELIVER:
                ifindex = a
                steps.append(Step("deliver", "over the representor into the sandbox", f"ifindex {a}"))
            case PwStep.S_DROP:
                reason = values.reason_text(a)
                steps.append(Step("drop", f"refused: {reason}", "to_port" if b else "from_port"))
            case _:
                steps.append(Step(f"step {step}", "unknown to this release", f"{a} {b}"))
    if verdict == TC_ACT_SHOT:
        outcome = "drop"
    elif answered:
        outcome = "answered"
    elif verdict == TC_ACT_REDIRECT:
        outcome = "forward"
    else:
        outcome = "host"
    return Trace(outcome, steps, ifindex, reason, slow)
