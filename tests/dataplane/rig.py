"""The data path loaded for a test: its maps filled for a topology, run by BPF_PROG_TEST_RUN.

Nothing is pinned, and nothing is attached. The devices whose ifindex stand for representors are in a
namespace that the thread is in meanwhile (the kernel looks the index of a test run up there).
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from portwright.dataplane import OBJECT, values
from portwright.dataplane.abi import (
    SIZES,
    PwAbi,
    PwCounters,
    PwDir,
    PwLimitKey,
    PwPort,
    PwReachKey,
    PwReason,
    PwState,
    PwTarget,
)
from portwright.kernel import bpf
from tests.dataplane.model import ModelPort, Topology
from tests.fix_bpf import ip, own_netns

SHOT, REDIRECT, NEXT = 2, 7, 0xFFFFFFFF
#: Offsets in struct __sk_buff (linux/bpf.h).
_INGRESS, _IFINDEX, _GSO_SEGS, _GSO_SIZE, _SKB = 36, 40, 164, 176, 192


@dataclass(frozen=True)
class Outcome:
    """What a program did: its verdict, the frame it left, and what it counted, by port_id."""

    verdict: int
    frame: bytes
    counted: dict[int, PwCounters]
    drops: dict[tuple[int, str, str], tuple[int, int]]
    """(port_id, direction, reason) to (packets, bytes)."""


def _drop_keys(topology: Topology) -> dict[bytes, tuple[int, str, str]]:
    keys = {}
    for number in (0, *(p.port_id for p in topology.ports)):
        for key in values.drop_keys(f"{number:016x}"):
            name = ("from_port", "to_port")[key[8]], values.reason_text(key[9])
            keys[key] = (number, *name)
    return keys


class Rig:
    """The two programs on maps that hold a topology."""

    def __init__(self, collection: bpf.Collection, topology: Topology, spare: int) -> None:
        """Fill the maps; the collection stays the caller's. ``spare`` is a device without a port."""
        self.spare = spare
        self.maps, self.programs = collection.maps, collection.programs
        self.topology = topology
        self._drops = _drop_keys(topology)
        for port in topology.ports:
            self.put(port)
        for a, b in topology.reach:
            self.maps["pw_reach"].update(
                PwReachKey(from_net=a, to_net=b).pack(), (1).to_bytes(4, sys.byteorder)
            )
        self.set_state(0)

    def set_state(self, flags: int, slow_flows: int = 0) -> None:
        """Write pw_state."""
        state = PwState(abi=PwAbi.ABI_VERSION, flags=flags, slow_flows=slow_flows)
        self.maps["pw_state"].update(bytes(4), state.pack())

    def put(self, port: ModelPort, flags: int = 0) -> None:
        """Record a port, with zeroed counters; ``flags`` are PwPortFlag's."""

        def first(version: int) -> bytes:
            return next((values.address(str(a)) for a in port.addresses if a.version == version), values.ZERO)

        def gateway(version: int) -> bytes:
            found = port.gateway(version)
            return values.ZERO if found is None else values.address(str(found))

        record = PwPort(
            port_id=port.port_id,
            sandbox=port.sandbox,
            net_id=port.net,
            mtu=port.mtu,
            flags=flags,
            mac=port.mac,
            gateway_mac=port.gateway_mac,
            addr4=first(4),
            addr6=first(6),
            link_local=values.address(str(port.link_local)),
            gateway4=gateway(4),
            gateway6=gateway(6),
            flows=0,
        )
        self.maps["pw_ports"].update(port.ifindex.to_bytes(4, sys.byteorder), record.pack())
        target = PwTarget(
            port_id=port.port_id,
            sandbox=port.sandbox,
            net_id=port.net,
            ifindex=port.ifindex,
            mtu=port.mtu,
            flags=flags,
            mac=port.mac,
            gateway_mac=port.gateway_mac,
        ).pack()
        for address in port.addresses:
            self.maps["pw_addrs"].update(values.address(str(address)), target)
        self.maps["pw_counters"].update_percpu(
            port.port_id.to_bytes(8, sys.byteorder), [bytes(SIZES["PwCounters"])] * bpf.possible_cpus()
        )

    def limit(self, port: ModelPort, direction: PwDir, rate: int, burst: int) -> None:
        """Give it a full bucket of ``burst`` bytes that fills at ``rate`` bytes a second."""
        key = PwLimitKey(port_id=port.port_id, dir=direction).pack()
        self.maps["pw_limits"].update(key, values.limit_value(rate * 8, burst * 8, time.monotonic_ns()))

    def counters(self) -> dict[int, PwCounters]:
        """The sums over the CPUs, by port_id."""
        out = {}
        for port in self.topology.ports:
            per_cpu = self.maps["pw_counters"].lookup_percpu(port.port_id.to_bytes(8, sys.byteorder)) or []
            rows = [PwCounters.unpack(raw) for raw in per_cpu]
            out[port.port_id] = PwCounters._make(map(sum, zip(*rows, strict=True)))
        return out

    def drops(self) -> dict[tuple[int, str, str], tuple[int, int]]:
        """What was dropped so far, where it is not nothing."""
        out = {}
        for key, name in self._drops.items():
            per_cpu = self.maps["pw_drops"].lookup_percpu(key)
            if per_cpu is not None:
                rows = [struct.unpack("=QQ", raw) for raw in per_cpu]
                out[name] = (sum(r[0] for r in rows), sum(r[1] for r in rows))
        return out

    def context(self, ifindex: int, ingress: int = 0, gso: tuple[int, int] = (0, 0)) -> bytes:
        """A struct __sk_buff; ``gso`` is (size, segments)."""
        skb = bytearray(_SKB)
        fields = ((_INGRESS, ingress), (_IFINDEX, ifindex), (_GSO_SIZE, gso[0]), (_GSO_SEGS, gso[1]))
        for offset, number in fields:
            struct.pack_into("=I", skb, offset, number)
        return bytes(skb)

    def run(
        self, program: str, frame: bytes, port: ModelPort, *, ingress: int = 0, gso: tuple[int, int] = (0, 0)
    ) -> Outcome:
        """Run a program on a frame of ``port``'s representor, and tell what changed."""
        before, dropped = self.counters(), self.drops()
        done = self.programs[program].test_run(frame, ctx=self.context(port.ifindex, ingress, gso))
        after = self.counters()
        counted = {
            number: PwCounters._make(b - a for a, b in zip(before[number], row, strict=True))
            for number, row in after.items()
        }
        drops = {
            name: (packets - dropped.get(name, (0, 0))[0], octets - dropped.get(name, (0, 0))[1])
            for name, (packets, octets) in self.drops().items()
            if (packets, octets) != dropped.get(name, (0, 0))
        }
        return Outcome(done.retval, done.data, counted, drops)

    def send(self, frame: bytes, port: ModelPort, gso: tuple[int, int] = (0, 0)) -> Outcome:
        """What ``pw_from_port`` does with a frame of the sandbox."""
        return self.run("pw_from_port", frame, port, ingress=port.ifindex, gso=gso)


def topology(ifindexes: list[int]) -> Topology:
    """Eight ports: two of net 1, one each of nets 2 and 3 (3 and 1 reach each other), and odd ones.

    ``one``, its ``leg`` and, on another net, its ``far`` share a sandbox; ``four`` and ``six`` have one
    family; ``two`` has a small MTU.
    """
    rows = [
        # net, sandbox, MTU, addresses
        (1, 1, 1500, ("10.1.0.2", "fd00:1::2")),
        (1, 2, 1400, ("10.1.0.3", "fd00:1::3")),
        (2, 3, 1500, ("10.2.0.2", "fd00:2::2")),
        (3, 4, 1500, ("10.3.0.2", "fd00:3::2")),
        (1, 5, 1500, ("10.1.0.4",)),
        (1, 6, 1500, ("fd00:1::5",)),
        (1, 1, 1500, ("10.1.0.9", "fd00:1::9")),
        (2, 1, 1500, ("10.2.0.9", "fd00:2::9")),
    ]
    ports = tuple(
        ModelPort(
            port_id=0x100 + n,
            ifindex=ifindex,
            net=net,
            sandbox=sandbox,
            mac=bytes([2, 0, 0, 0, 0, n + 1]),
            addresses=tuple(ipaddress.ip_address(a) for a in addresses),
            mtu=mtu,
        )
        for n, (ifindex, (net, sandbox, mtu, addresses)) in enumerate(zip(ifindexes, rows, strict=True))
    )
    return Topology(ports, frozenset({(1, 3), (3, 1)}))


@contextlib.contextmanager
def loaded() -> Iterator[Rig]:
    """A rig with :func:`topology`; everything is gone at the end."""
    with own_netns(), bpf.Collection.load(bpf.CollectionSpec.load(OBJECT)) as collection:
        names = []
        for pair in range(5):
            ip("link", "add", f"r{pair}", "type", "veth", "peer", "name", f"s{pair}")
            names += [f"r{pair}", f"s{pair}"]
        indexes = [socket.if_nametoindex(name) for name in names]
        yield Rig(collection, topology(indexes[:8]), spare=indexes[8])


def reasons() -> set[str]:
    """Every reason by its word."""
    return {values.reason_text(r) for r in PwReason if r not in (PwReason.R_NONE, PwReason.R_MAX)}
