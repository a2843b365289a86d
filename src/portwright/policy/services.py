"""What a packet is, as one number: the *service*, of which every rule's traffic is a set of ranges.

::

    TCP port p     0 << 16 | p              ICMP     3 << 16 | type << 8 | code
    UDP port p     1 << 16 | p              ICMPv6   4 << 16 | type << 8 | code
    SCTP port p    2 << 16 | p              others   5 << 16 | protocol
    one of the five above whose port or type is not in the packet (a later fragment): 6 << 16 | protocol

Ports are the destination's. The data path computes the same number (dataplane/policy.h). Source ports are
ranges of the same numbers, with the sender's port in the destination's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from portwright.policy.ranges import EMPTY, Ranges, complement, intersect, union
from portwright.policy.rules import ICMP, ICMP6, PORT_PROTOCOLS, SCTP, TCP, UDP, Flow, Traffic

#: The block of 65,536 numbers of each protocol that says more than its own number.
BLOCKS = {TCP: 0, UDP: 1, SCTP: 2, ICMP: 3, ICMP6: 4}
OTHER_BLOCK = 5
UNKNOWN_BLOCK = 6
#: One past the last service.
SERVICES_END = 7 << 16
ALL_SERVICES: Ranges = ((0, SERVICES_END),)
#: One past the last service that is no later fragment.
FIRST_PACKETS = (OTHER_BLOCK << 16) + 256

#: A sender's port that its system picked (RFC 6335, 6): where nobody says which, it is this one.
EPHEMERAL = 49_152

_PORT_BLOCKS = tuple(BLOCKS[protocol] for protocol in (TCP, UDP, SCTP))
_ICMP_BLOCKS = tuple(BLOCKS[protocol] for protocol in (ICMP, ICMP6))


def service_of(flow: Flow) -> int:
    """The number of a flow's packets.

    A flow of TCP, UDP or SCTP without ``port``, or of ICMP without ``icmp_type``, is a later fragment. ICMP
    with a type and no code has code 0.
    """
    block = BLOCKS.get(flow.protocol)
    if block is None:
        return OTHER_BLOCK << 16 | flow.protocol
    if block in _PORT_BLOCKS:
        if flow.port is not None:
            return block << 16 | flow.port
    elif flow.icmp_type is not None:
        return block << 16 | flow.icmp_type << 8 | (flow.icmp_code or 0)
    return UNKNOWN_BLOCK << 16 | flow.protocol


def source_of(flow: Flow) -> int:
    """The same of the sender's port: where the flow has none, a number that no rule's source ports hold."""
    if flow.protocol in PORT_PROTOCOLS and flow.port is not None and flow.source_port is not None:
        return BLOCKS[flow.protocol] << 16 | flow.source_port
    return UNKNOWN_BLOCK << 16


def protocol_services(protocol: int) -> Ranges:
    """All of one IP protocol."""
    block = BLOCKS.get(protocol)
    if block is None:
        number = OTHER_BLOCK << 16 | protocol
        return ((number, number + 1),)
    unknown = UNKNOWN_BLOCK << 16 | protocol
    return union([(block << 16, (block + 1) << 16), (unknown, unknown + 1)])


def traffic_services(traffic: Traffic, named: Callable[[str, int], tuple[int, ...]]) -> Ranges:
    """The services that ``traffic`` is true of, leaving aside ``ip_version`` and source ports.

    ``named(name, protocol)``: the numbers that the destination gives to a name.
    """
    found = ALL_SERVICES if traffic.protocol is None else protocol_services(traffic.protocol)
    if traffic.ports or traffic.names:
        found = intersect(found, _port_services(traffic, named))
    if traffic.icmp_type is not None or traffic.icmp_code is not None:
        found = intersect(found, _icmp_services(traffic))
    return found


def service_text(first: int, end: int) -> str:
    """A range of services for people: ``tcp 80``, ``udp 5000-5010``, ``icmp type 8 code 0``, ``any``."""
    if (first, end) == ALL_SERVICES[0]:
        return "any"
    block, last = first >> 16, end - 1
    names = {0: "tcp", 1: "udp", 2: "sctp", 3: "icmp", 4: "icmp6"}
    if block != last >> 16:
        middle = (block + 1) << 16
        return f"{service_text(first, middle)}, {service_text(middle, end)}"
    low, high = first & 0xFFFF, last & 0xFFFF
    if block in names and (low, high) == (0, 0xFFFF):
        return names[block]
    span = f"{low}" if low == high else f"{low}-{high}"
    if block in _PORT_BLOCKS:
        return f"{names[block]} {span}"
    if block in _ICMP_BLOCKS:
        both = f"type {low >> 8} code {low & 0xFF}"
        return f"{names[block]} {both}" + ("" if low == high else f" to type {high >> 8} code {high & 0xFF}")
    return f"protocol {span}" if block == OTHER_BLOCK else f"later fragments of protocol {span}"


def services_text(services: Ranges) -> tuple[str, ...]:
    """Services below FIRST_PACKETS for people, each a text: ``tcp 80``, ``icmp type 8``, ``other protocols``.

    What is nearly all of them is told by what it lacks: ``all but tcp 80, udp 53`` is one text.
    """
    lacking = complement(services, FIRST_PACKETS)
    if not lacking:
        return ("any",)
    told, missing = list(_parts(services)), list(_parts(lacking))
    return (f"all but {', '.join(missing)}",) if len(missing) < len(told) else tuple(told)


def _parts(services: Ranges) -> Iterator[str]:
    """Each range, cut where a protocol ends."""
    for block in range(OTHER_BLOCK + 1):
        whole = (block << 16, min((block + 1) << 16, FIRST_PACKETS))
        for first, end in intersect(services, (whole,)):
            if block == OTHER_BLOCK and (first, end) == whole:
                yield "other protocols"
            elif block in _ICMP_BLOCKS and first & 0xFF == 0 and end - first == 256:  # one type
                yield service_text(first, first + 1).partition(" code")[0]
            else:
                yield service_text(first, end)


def _port_services(traffic: Traffic, named: Callable[[str, int], tuple[int, ...]]) -> Ranges:
    pairs: list[tuple[int, int]] = []
    for protocol in (TCP, UDP, SCTP):
        base = BLOCKS[protocol] << 16
        pairs += [(base | ports.first, (base | ports.last) + 1) for ports in traffic.ports]
        for name in traffic.names:
            pairs += [(base | port, (base | port) + 1) for port in named(name, protocol)]
    return union(pairs) if pairs else EMPTY


def _icmp_services(traffic: Traffic) -> Ranges:
    types = range(256) if traffic.icmp_type is None else (traffic.icmp_type,)
    codes = (0, 256) if traffic.icmp_code is None else (traffic.icmp_code, traffic.icmp_code + 1)
    return union(
        (block << 16 | kind << 8 | codes[0], (block << 16 | kind << 8) + codes[1])
        for block in _ICMP_BLOCKS
        for kind in types
    )
