"""Reads the data path's counters: totals, slow path, drops. Sums over CPUs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from portwright.dataplane import values
from portwright.dataplane.abi import SIZES, PwCounter, PwCounters, PwDir, PwDropKey
from portwright.kernel.bpf import Map
from portwright.model.port import Port

DIRECTIONS = {PwDir.FROM_PORT: "from_port", PwDir.TO_PORT: "to_port"}


def totals(maps: Mapping[str, Map], port: Port) -> PwCounters:
    """The port's counters; zero if it has none yet."""
    cpus = maps["pw_counters"].lookup_percpu(values.port_key(port.port_id)) or []
    rows = [PwCounters.unpack(raw[: SIZES["PwCounters"]]) for raw in cpus]
    return (
        PwCounters._make(sum(column) for column in zip(*rows, strict=True)) if rows else PwCounters(*[0] * 8)
    )


def drops(maps: Mapping[str, Map], ports: Iterable[Port]) -> Iterator[tuple[Port, str, str, PwCounter]]:
    """(port, direction, reason, count) of every drop counter that is not zero."""
    known = {int(p.port_id, 16): p for p in ports}
    table = maps["pw_drops"]
    for raw in sorted(table.keys()):
        key = PwDropKey.unpack(raw)
        port = known.get(key.port_id)
        cpus = table.lookup_percpu(raw)
        if port is None or cpus is None:
            continue
        rows = [PwCounter.unpack(one[:16]) for one in cpus]
        count = PwCounter(packets=sum(r.packets for r in rows), octets=sum(r.octets for r in rows))
        if count.packets:
            yield port, DIRECTIONS[PwDir(key.dir)], values.reason_text(key.reason), count
