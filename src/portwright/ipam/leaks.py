"""What is left over: the record compared with what lives in the kernel, as a pure function.

``portwright doctor`` prints the answer; the node repairs from the same comparison. It
names differences and decides nothing: which side is right depends on who asks.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from portwright.model.port import Port, PortState

_REPRESENTOR = re.compile(r"pw[0-9a-f]{8}")
_UNFINISHED = frozenset({PortState.CREATING, PortState.PLUGGING, PortState.DELETING})


@dataclass(frozen=True, slots=True, order=True)
class Leak:
    """One difference: a stable ``kind``, the thing's name, and one sentence of reason."""

    kind: str
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class ObservedLink:
    """A link as the kernel shows it; ``netns`` is the cookie of the namespace that holds it."""

    netns: int
    name: str
    ifindex: int


def find_leaks(
    ports: Iterable[Port],
    *,
    boot_id: str,
    living: Collection[int],
    links: Iterable[ObservedLink],
    held: Mapping[str, str],
    routed: Mapping[str, str],
    pending: Collection[str] = (),
) -> list[Leak]:
    """Compare the record with the kernel; an empty list means that they agree.

    ``living``: cookies of the namespaces that exist in this boot. ``links``: links of
    the host namespaces. ``held``: address -> port_id, the record of addresses.
    ``routed``: address -> name of the host link that the kernel delivers it to.
    ``pending``: port_ids with an open journal entry; those are judged when it is closed.
    Sorted by kind, then name. Raises nothing, changes nothing.
    """
    record = {p.port_id: p for p in ports}
    seen = {(link.netns, link.name): link for link in links}
    settled = [p for p in record.values() if p.port_id not in pending]
    leaks = [
        *_ports(settled, boot_id, living, seen),
        *_links(record, seen),
        *_addresses(record, held, pending),
        *_routes(record, routed, pending),
    ]
    return sorted(leaks)


def _ports(
    ports: list[Port], boot_id: str, living: Collection[int], seen: Mapping[tuple[int, str], ObservedLink]
) -> Iterator[Leak]:
    for port in ports:
        if port.state in _UNFINISHED:
            why = f"is {port.state.value}, and no journal entry is open that would finish it"
            yield Leak("port-unfinished", port.port_id, why)
            continue
        if port.state is not PortState.ATTACHED:
            continue  # a detached port has no device by definition
        if port.sandbox.boot_id != boot_id or port.sandbox.cookie not in living:
            when = "in an earlier boot" if port.sandbox.boot_id != boot_id else "and is gone"
            yield Leak("port-without-sandbox", port.port_id, f"its sandbox {port.sandbox.path!r} was {when}")
            continue
        if port.host.boot_id != boot_id or port.host.cookie not in living:
            yield Leak("port-without-host", port.port_id, f"its host namespace {port.host.path!r} is gone")
            continue
        link = seen.get((port.host.cookie, port.rep_name))
        if link is None:
            why = f"is attached, but its representor {port.rep_name} is not in {port.host.path!r}"
            yield Leak("port-without-representor", port.port_id, why)
        elif port.rep_ifindex and link.ifindex != port.rep_ifindex:
            why = f"{port.rep_name} has ifindex {link.ifindex}, the record says {port.rep_ifindex}"
            yield Leak("representor-replaced", port.port_id, why)


def _links(record: Mapping[str, Port], seen: Mapping[tuple[int, str], ObservedLink]) -> Iterator[Leak]:
    # A pending port still explains its link, so this looks at the whole record.
    known = {(p.host.cookie, p.rep_name) for p in record.values()}
    for (netns, name), link in seen.items():
        if _REPRESENTOR.fullmatch(name) and (netns, name) not in known:
            why = f"ifindex {link.ifindex} in namespace {netns} has the name of a representor, and no port"
            yield Leak("link-without-port", name, why)


def _addresses(
    record: Mapping[str, Port], held: Mapping[str, str], pending: Collection[str]
) -> Iterator[Leak]:
    for address, port_id in held.items():
        if port_id not in record:
            if port_id not in pending:
                yield Leak("address-without-port", address, f"held for port {port_id}, which does not exist")
        elif port_id not in pending and address not in {a.address for a in record[port_id].addresses}:
            yield Leak("address-unused", address, f"held for port {port_id}, whose record does not list it")
    owners: dict[str, str] = {}
    for port in record.values():
        for entry in port.addresses:
            other = owners.setdefault(entry.address, port.port_id)
            if other != port.port_id:
                why = f"ports {other} and {port.port_id} both list it"
                yield Leak("address-duplicate", entry.address, why)
            if port.ipam != "portwright" or port.port_id in pending:
                continue  # a foreign IPAM keeps its own record
            holder = held.get(entry.address)
            if holder != port.port_id:
                by = f"port {holder} holds it" if holder else "it is not held for anybody"
                yield Leak("address-not-held", entry.address, f"port {port.port_id} lists it, but {by}")


def _routes(
    record: Mapping[str, Port], routed: Mapping[str, str], pending: Collection[str]
) -> Iterator[Leak]:
    owner = {a.address: p for p in record.values() for a in p.addresses}
    names = {p.rep_name for p in record.values()}
    for address, link in routed.items():
        port = owner.get(address)
        if port is None:
            if link in names or _REPRESENTOR.fullmatch(link):
                yield Leak("route-without-port", address, f"the kernel sends it to {link}; no port lists it")
        elif link != port.rep_name and port.port_id not in pending:
            why = f"the kernel sends it to {link}, but port {port.port_id} ({port.rep_name}) has it"
            yield Leak("route-wrong", address, why)
