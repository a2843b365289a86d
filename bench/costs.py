"""What a packet costs the data path, counted and not timed: look-ups by kind on each path that it takes.

The programs' own source is compiled once more, with every look-up, insertion and deletion counted by map
(a header before all others), loaded, and given made packets by BPF_PROG_TEST_RUN. ``python -m bench.costs``
prints the table, as root.

What policy and the flow table look up is hash tables and tries; an array's element or a slot of a map of maps
is an address that is computed, and stands in a column of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import ipaddress
import platform
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portwright.dataplane import OBJECT
from portwright.kernel import bpf
from portwright.kernel.bpf._fd import object_info
from portwright.node import generations
from portwright.policy.compile import compile_policies
from portwright.policy.manifests.read import read
from tests.dataplane import frames
from tests.dataplane.model import FRAGMENT, IP4, IP6, TCP, UDP, Address, ModelPort
from tests.dataplane.rig import NEXT, REDIRECT, SHOT, Rig, topology
from tests.fix_bpf import ip, own_netns

#: Look-ups by what they ask, as (map, key) stand in the source; "inner" is what a slot of an outer map holds.
_LOOK_UPS = {
    "flow": {("&pw_conns", "&key")},
    "ageing": {("&pw_conns", "&ticket.key")},
    "policy": {("inner", "&key")},
    "fragment": {("&pw_frags", "&key")},
    "other": {
        (f"&pw_{name}", "")
        for name in ("ports", "addrs", "reach", "counters", "drops", "slow_flows", "limits")
    },
    "array": {
        *((f"&pw_{name}", "") for name in ("state", "budget", "trace", "generation", "ager")),
        *((f"&pw_{name}", "") for name in ("peers", "bounds", "sets", "cells")),
        ("inner", "&set_id"),
        ("inner", "&place"),
    },
}
_KINDS = ("unknown", *_LOOK_UPS, "insert", "delete")
_COUNTED = "pw_counted"

SYN, SYN_ACK, ACK = 0x02, 0x12, 0x10
_OUTSIDE = {4: "203.0.113.9", 6: "2001:db8:1::9"}
_MANIFESTS = """
apiVersion: v1
kind: Pod
metadata: {name: one, labels: {app: one}}
status: {podIPs: [{ip: 10.1.0.2}, {ip: "fd00:1::2"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: two, labels: {app: two}}
status: {podIPs: [{ip: 10.1.0.3}, {ip: "fd00:1::3"}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: one}
spec:
  podSelector: {matchLabels: {app: one}}
  policyTypes: [Egress]
  egress:
  - to: [{podSelector: {matchLabels: {app: two}}}]
    ports: [{port: 80}, {port: 80, protocol: UDP}, {port: 81}]
  - {to: [{ipBlock: {cidr: 203.0.113.0/24}}, {ipBlock: {cidr: "2001:db8:1::/48"}}], ports: [{port: 443}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: two}
spec:
  podSelector: {matchLabels: {app: two}}
  ingress:
  - {from: [{podSelector: {matchLabels: {app: one}}}], ports: [{port: 80}, {port: 80, protocol: UDP}]}
  - {from: [{ipBlock: {cidr: 203.0.113.0/24}}, {ipBlock: {cidr: "2001:db8:1::/48"}}], ports: [{port: 80}]}
"""


@dataclass(frozen=True)
class Cost:
    """What one packet costs, the same in both families.

    ``flow``, ``policy`` and ``fragment``: look-ups in hash tables by which it is judged.
    ``other``: of hash tables that delivery, counting and limits need.
    ``array``: elements and slots. ``insert`` and ``delete``: of any map.
    """

    program: str
    path: str
    flow: int
    policy: int
    fragment: int
    other: int
    array: int
    insert: int
    delete: int

    @property
    def judged_by(self) -> int:
        """Look-ups of the flow table and of policy together."""
        return self.flow + self.policy + self.fragment


@dataclass(frozen=True)
class Size:
    """A program, its functions included, as the kernel took it."""

    program: str
    verified: int
    instructions: int
    machine_bytes: int


class _Info(ctypes.Structure):
    """``struct bpf_prog_info`` (linux/bpf.h) as far as verified_insns; what is not asked for is padding."""

    _fields_ = (
        ("head", ctypes.c_ubyte * 16),
        ("jited_prog_len", ctypes.c_uint32),
        ("xlated_prog_len", ctypes.c_uint32),
        ("between", ctypes.c_ubyte * 192),
        ("verified_insns", ctypes.c_uint32),
    )


def sizes() -> list[Size]:
    """Of the programs as they are shipped."""
    found = []
    with bpf.Collection.load(bpf.CollectionSpec.load(OBJECT)) as collection:
        for name, program in sorted(collection.programs.items()):
            info = _Info()
            object_info(program.fd, info, name)
            found.append(Size(name, info.verified_insns, info.xlated_prog_len // 8, info.jited_prog_len))
    return found


def rows() -> list[Cost]:
    """The table, measured now: needs root and clang, leaves nothing."""
    with _counting() as counted:
        by_family = [list(_walk(counted, version)) for version in (4, 6)]
    if by_family[0] != by_family[1]:
        raise AssertionError(f"the families differ: {by_family[0]} and {by_family[1]}")
    return by_family[0]


def look_up_table(costs: list[Cost]) -> list[str]:
    """As Markdown, a line each."""
    numbers = [field.name for field in dataclasses.fields(Cost)][2:]
    lines = [_line("program", "path", *numbers), _line("---", "---", *["---:"] * len(numbers))]
    for c in costs:
        lines.append(_line(c.program, c.path, *(getattr(c, name) for name in numbers)))
    return lines


def size_table(programs: list[Size]) -> list[str]:
    """As Markdown, a line each."""
    head = ("program", "verified instructions", "translated instructions", "bytes of machine code")
    lines = [_line(*head), _line("---", *["---:"] * 3)]
    for s in programs:
        lines.append(_line(s.program, f"{s.verified:,}", f"{s.instructions:,}", f"{s.machine_bytes:,}"))
    return lines


def section() -> list[str]:
    """For docs/performance.md, measured now: as of rows() and sizes()."""
    return [
        "## Look-ups",
        "",
        "`python -m bench.costs`: counted, not timed, on a copy of the programs that counts. flow, policy",
        "and fragment are the look-ups in hash tables by which a packet is judged; other is",
        "what delivery, counting and limits look up; array is elements of arrays and slots of maps of maps,",
        "up to six of them the nodes by which the net of an address that is no port's is found.",
        "",
        *look_up_table(rows()),
        "",
        *size_table(sizes()),
        "",
    ]


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


# -- the copy that counts ------------------------------------------------------------------------------


def _header() -> str:
    """C that comes before everything else: look-ups, insertions and deletions by any macro of their name."""

    def place(kind: str) -> int:
        return _KINDS.index(kind)

    tests = "".join(
        f'\\\n\t(__builtin_strcmp(map, "{name}") == 0'
        + (f' && __builtin_strcmp(key, "{key}") == 0' if key else "")
        + f") ? {place(kind)} : "
        for kind, asked in _LOOK_UPS.items()
        for name, key in sorted(asked)
    )
    return f"""#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
__u64 {_COUNTED}[{len(_KINDS)}];
#define PW_KIND(map, key) ({tests}\\\n\t0)
#define bpf_map_lookup_elem(map, key) ({{ \\
	enum {{ at = PW_KIND(#map, #key) }}; \\
	{_COUNTED}[at]++; \\
	(bpf_map_lookup_elem)(map, key); }})
#define bpf_map_update_elem(map, ...) ({{ \\
	{_COUNTED}[{place("insert")}]++; \\
	(bpf_map_update_elem)(map, __VA_ARGS__); }})
#define bpf_map_delete_elem(map, key) ({{ \\
	{_COUNTED}[{place("delete")}]++; \\
	(bpf_map_delete_elem)(map, key); }})
"""


def _compiled(folder: Path) -> Path:
    header, made = folder / "counted.h", folder / "portwright.bpf.o"
    header.write_text(_header())
    include = f"/usr/include/{platform.machine()}-linux-gnu"
    source = OBJECT.with_suffix(".c")
    flags = [
        "-O2",
        "-g",
        "-target",
        "bpf",
        "-mcpu=v3",
        "-fms-extensions",
        "-Wno-microsoft-anon-tag",
        "-Wall",
        "-Werror",
        "-I",
        str(source.parent),
        "-I",
        include,
    ]
    command = ["clang", *flags, "-include", str(header), "-c", str(source), "-o", str(made)]
    subprocess.run(command, check=True)
    return made


class _Counted:
    """The counting copy of the programs on the rig's ports, the policy in force."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self._counts = rig.maps[".bss"]
        self.one, self.two = rig.topology.ports[:2]

    def policy(self, on: bool) -> None:
        """Put the policy in force, or none."""
        maps = self.rig.maps
        if on:
            manifests = read([("costs.yaml", _MANIFESTS)])
            compiled = compile_policies(manifests.policy_set, manifests.snapshot)
            generations.install(maps, generations.Entries(compiled))
        elif generations.in_force(maps):
            generations.withdraw(maps)

    def forget(self) -> None:
        """No flow and no datagram is known."""
        for name in ("pw_conns", "pw_frags", "pw_slow_flows"):
            for key in list(self.rig.maps[name].keys()):
                self.rig.maps[name].delete(key)
        self.rig.set_state(0)

    def cost(
        self, path: str, program: str, port: ModelPort, frame: bytes, verdict: int, *, ingress: int
    ) -> Cost:
        """Run a program on a frame, which it must end with ``verdict``; a drop is not its kind's first."""
        size = len(_KINDS) * 8
        context = self.rig.context(port.ifindex, ingress)
        if verdict == SHOT:
            self.rig.programs[program].test_run(frame, ctx=context)
        raw = self._counts.lookup(bytes(4)) or b""
        self._counts.update(bytes(4), bytes(size) + raw[size:])
        done = self.rig.programs[program].test_run(frame, ctx=context)
        if done.retval != verdict:
            raise AssertionError(f"{path}: the program ended with {done.retval}, not {verdict}")
        raw = self._counts.lookup(bytes(4)) or b""
        counts = dict(zip(_KINDS, struct.unpack_from(f"={len(_KINDS)}Q", raw), strict=True))
        counts.pop("ageing")  # the kernel's timer may have run meanwhile, and is no part of the packet
        if counts.pop("unknown"):
            raise AssertionError(f"{path}: a look-up that bench/costs.py does not know")
        return Cost(program, path, **counts)


@contextlib.contextmanager
def _counting() -> Iterator[_Counted]:
    with tempfile.TemporaryDirectory(prefix="portwright-costs-") as folder:
        spec = bpf.CollectionSpec.load(_compiled(Path(folder)))
        with own_netns(), bpf.Collection.load(spec) as collection:
            names = []
            for pair in range(5):
                ip("link", "add", f"r{pair}", "type", "veth", "peer", "name", f"s{pair}")
                names += [f"r{pair}", f"s{pair}"]
            indexes = [socket.if_nametoindex(name) for name in names]
            yield _Counted(Rig(collection, topology(indexes[:8]), spare=indexes[8]))


# -- the packets -----------------------------------------------------------------------------------------


class _Packets:
    """Made packets between port one, port two and the outside, in one family."""

    def __init__(self, counted: _Counted, version: int) -> None:
        self.version = version
        self._ports = {"one": counted.one, "two": counted.two}

    def at(self, name: str) -> str:
        """An address."""
        if name == "outside":
            return _OUTSIDE[self.version]
        return next(str(a) for a in self._ports[name].addresses if a.version == self.version)

    def _ends(self, source: str, target: str) -> tuple[Address, Address]:
        return ipaddress.ip_address(self.at(source)), ipaddress.ip_address(self.at(target))

    def frame(self, source: str, target: str, proto: int, data: bytes, **fields: Any) -> bytes:
        """As a sandbox sends it to its gateway; what comes from outside is framed as if it were one's."""
        port = self._ports.get(source, self._ports["one"])
        build, kind = (frames.ipv4, IP4) if self.version == 4 else (frames.ipv6, IP6)
        packet = build(self.at(source), self.at(target), proto, data, **fields)
        return frames.ethernet(port.mac, port.gateway_mac, kind, packet)

    def tcp(self, source: str, target: str, sport: int, dport: int, flags: int) -> bytes:
        """A TCP segment."""
        ends = self._ends(source, target)
        return self.frame(source, target, TCP, frames.tcp(*ends, sport, dport, b"", flags))

    def piece(self, source: str, target: str, offset: int) -> bytes:
        """Half of a datagram for UDP port 80: the first 48 bytes, or the rest."""
        ends = self._ends(source, target)
        whole = frames.udp(*ends, 5000, 80, bytes(88))
        data = whole[offset:] if offset else whole[:48]
        if self.version == 4:
            return self.frame(source, target, UDP, data, frag=offset // 8 if offset else 0x2000)
        head = struct.pack("!BBHI", UDP, 0, offset or 1, 7)
        return self.frame(source, target, FRAGMENT, head + data)

    def error(self, source: str, target: str, sport: int, dport: int) -> bytes:
        """Port unreachable about a TCP segment of the target's."""
        ends = self._ends(source, target)
        quote = self.tcp(target, source, sport, dport, ACK)[14:]
        kind, code, proto = (3, 3, 1) if self.version == 4 else (1, 4, 58)
        return self.frame(source, target, proto, frames.icmp(*ends, kind, bytes(4) + quote, code))


def _walk(counted: _Counted, version: int) -> Iterator[Cost]:
    """Every path, in the order of the table."""
    make, one, two = _Packets(counted, version), counted.one, counted.two
    uplink = counted.rig.spare

    def sent(path: str, frame: bytes, verdict: int = REDIRECT, port: ModelPort = one) -> Cost:
        return counted.cost(path, "pw_from_port", port, frame, verdict, ingress=port.ifindex)

    def came(path: str, frame: bytes, verdict: int = NEXT, *, ingress: int = uplink) -> Cost:
        return counted.cost(path, "pw_to_port", two, frame, verdict, ingress=ingress)

    counted.policy(False)
    counted.forget()
    yield sent("no policy in force: data", make.tcp("one", "two", 5000, 80, ACK))
    counted.policy(True)
    counted.forget()
    yield sent("to a port, new, both sides' policy", make.tcp("one", "two", 5000, 80, SYN))
    yield sent("to a port, established", make.tcp("one", "two", 5000, 80, ACK))
    yield sent("to a port, established, answer", make.tcp("two", "one", 80, 5000, SYN_ACK), port=two)
    yield sent("to a port, denied by the sender", make.tcp("one", "two", 5000, 82, SYN), SHOT)
    yield sent("to a port, denied by the receiver", make.tcp("one", "two", 5000, 81, SYN), SHOT)
    yield sent("to a port, error about a flow", make.error("two", "one", 5000, 80), port=two)
    yield sent("to a port, error about nothing", make.error("one", "two", 9, 9), SHOT)
    counted.policy(True)
    yield sent("to a port, established, after a change of policy", make.tcp("one", "two", 5000, 80, ACK))
    yield sent("to a port, first fragment, new", make.piece("one", "two", 0), NEXT)
    yield sent("to a port, later fragment", make.piece("one", "two", 48), NEXT)
    yield sent("outside, new", make.tcp("one", "outside", 5000, 443, SYN), NEXT)
    yield sent("outside, established", make.tcp("one", "outside", 5000, 443, ACK), NEXT)
    counted.forget()
    yield came("from outside, new", make.tcp("outside", "two", 5000, 80, SYN))
    yield came("from outside, established", make.tcp("outside", "two", 5000, 80, ACK))
    yield came("from outside, denied", make.tcp("outside", "two", 5000, 81, SYN), SHOT)
    yield came("from the host, new", make.tcp("outside", "two", 5001, 80, SYN), ingress=0)
    counted.forget()
    yield came("by the host's stack, new", make.tcp("one", "two", 5000, 80, SYN), ingress=one.ifindex)
    yield came("by the host's stack, established", make.tcp("one", "two", 5000, 80, ACK), ingress=one.ifindex)


def main() -> int:
    """Print the table; 0."""
    print("\n".join(section()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
