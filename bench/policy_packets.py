"""Nanoseconds of the programs themselves, by BPF_PROG_TEST_RUN: the same code and tables, and no network.

The programs are loaded once for each number of rules, and the compiled policy is put in force in their maps
as the daemon does it. Two kinds of figure:

- *in a loop*: the mean of many runs on one packet of a known flow, caches warm. The ports' MACs are such that
  forwarding leaves the packet's as they were, and its TTL begins at 255, so each run is a whole one: parse,
  guard, flow, count, rewrite, redirect.
- *one run each*: each packet has a system call of its own, which the kernel times inside: caches are as cold
  as a system call leaves them, and two readings of the clock are in it. A first packet can be timed in no
  other way, as it is the first once; so the packet after the first is timed in this way too.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from bench import policy_rules
from bench.figures import Goal, Series, at_most, number
from bench.policy_rules import CLOSED, SERVICE
from bench.traffic import turned
from portwright.dataplane import OBJECT
from portwright.kernel import bpf
from portwright.node import generations
from portwright.policy.compile import compile_policies
from portwright.policy.manifests.read import read
from tests.dataplane import frames
from tests.dataplane.model import IP4, IP6, TCP, ModelPort, Topology
from tests.dataplane.rig import NEXT, REDIRECT, SHOT, Rig
from tests.fix_bpf import ip, own_netns

NONE = "no policy"
_SYN, _SYN_ACK, _ACK = 0x02, 0x12, 0x10
_CLIENT, _SERVER = ("10.60.0.2", "fd00:60::2"), ("10.60.0.3", "fd00:60::3")
#: Crosswise each other's gateway's: what forwarding writes is what stood there.
_MAC, _GATEWAY = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2"
#: Runs of one packet: one fewer than its TTL would let it live.
_REPEAT = 250
_SOURCE = 20_000
#: A prime: from net to net without an order that a cache could learn.
_STRIDE = 7919
ESTABLISHED_NS = 300
_VERSIONS = (4, 6)
#: By IP version and contender.
_Samples: TypeAlias = dict[int, dict[str, list[float]]]


class Runs(NamedTuple):
    """Rounds; calls of a loop each; packets timed one by one each."""

    rounds: int
    loops: int
    singles: int


class _Loaded:
    """The programs under one policy, with a client's and a server's port."""

    def __init__(self, collection: bpf.Collection, near: int, far: int, rules: int) -> None:
        def port(index: int, mac: bytes, gateway: bytes, addresses: Sequence[str]) -> ModelPort:
            return ModelPort(
                port_id=index,
                ifindex=index,
                net=1,
                sandbox=index,
                mac=mac,
                gateway_mac=gateway,
                addresses=tuple(map(ipaddress.ip_address, addresses)),
            )

        self._client = port(near, _MAC, _GATEWAY, _CLIENT)
        self._server = port(far, _GATEWAY, _MAC, _SERVER)
        self._rig = Rig(collection, Topology((self._client, self._server)), spare=far)
        self._rules = rules
        #: Who else may open what: an address in each of the nets, and the service.
        self._elsewhere = [("172.16.0.1", SERVICE)]
        if rules:
            files = [*policy_rules.manifests(rules), policy_rules.pods(_SERVER, _CLIENT)]
            manifests = read(files)
            compiled = compile_policies(manifests.policy_set, manifests.snapshot)
            generations.install(self._rig.maps, generations.Entries(compiled))
            self._elsewhere = [
                (str(ipaddress.ip_network(pair.source)[1]), pair.port)
                for pairs in policy_rules.policies(rules)
                for pair in pairs
                if pair.source.endswith("/28") and pair.protocol == "tcp"
            ]

    def looped(self, version: int, loops: int) -> float:
        """A packet of an answered flow, in a loop."""
        self._established(version)
        frame = self._frame(version, _SOURCE, _ACK, ttl=255)
        return self._loop(frame, REDIRECT, loops)

    def refused(self, version: int, loops: int) -> float:
        """A packet that would open a flow and may not, in a loop: a decision, and a drop with its count."""
        return self._loop(self._frame(version, _SOURCE, _SYN, service=CLOSED), SHOT, loops)

    def second(self, version: int, singles: int) -> float:
        """A packet of an answered flow, one run each."""
        self._established(version)
        return self._each([self._frame(version, _SOURCE, _ACK)] * singles)

    def first(self, version: int, singles: int) -> float:
        """The SYN of a flow from port to port, one run each."""
        self._forget()
        return self._each([self._frame(version, _SOURCE + n, _SYN) for n in range(singles)])

    def from_elsewhere(self, singles: int) -> float:
        """The SYN of a flow from an address that only a net covers, to the server's port, one run each.

        They come from all over the nets, so that the caches know none of them well.
        """
        self._forget()
        count = len(self._elsewhere)
        made = []
        for n in range(singles):
            source, service = self._elsewhere[n * _STRIDE % count]
            made.append(self._frame(4, _SOURCE + n, _SYN, service=service, source=source))
        context = self._rig.context(self._server.ifindex, self._client.ifindex + self._server.ifindex + 7)
        return self._timed("pw_to_port", made, context, NEXT)

    def _each(self, made: Sequence[bytes]) -> float:
        context = self._rig.context(self._client.ifindex, self._client.ifindex)
        return self._timed("pw_from_port", made, context, REDIRECT)

    def _timed(self, program: str, made: Sequence[bytes], context: bytes, expected: int) -> float:
        taken = []
        run = self._rig.programs[program].test_run
        for frame in made:
            done = run(frame, ctx=context)
            assert done.retval == expected, f"{self._rules} rules: {program} returned {done.retval}"
            taken.append(done.duration_ns)
        return statistics.median(taken)

    def _loop(self, frame: bytes, expected: int, loops: int) -> float:
        context = self._rig.context(self._client.ifindex, self._client.ifindex)
        run = self._rig.programs["pw_from_port"].test_run
        taken = []
        for _ in range(loops):
            done = run(frame, ctx=context, repeat=_REPEAT)
            assert done.retval == expected, f"{self._rules} rules: pw_from_port returned {done.retval}"
            taken.append(done.duration_ns)
        return statistics.median(taken)

    def _forget(self) -> None:
        """No flow is known, and the ports have opened none."""
        flows = self._rig.maps["pw_conns"]
        flows.delete_batch(list(flows.keys()))
        for port in (self._client, self._server):
            self._rig.put(port)

    def _established(self, version: int) -> None:
        self._forget()
        for frame, port in (
            (self._frame(version, _SOURCE, _SYN), self._client),
            (self._frame(version, _SOURCE, _SYN_ACK, back=True), self._server),
        ):
            context = self._rig.context(port.ifindex, port.ifindex)
            assert self._rig.programs["pw_from_port"].test_run(frame, ctx=context).retval == REDIRECT

    def _frame(
        self,
        version: int,
        sport: int,
        flags: int,
        *,
        ttl: int = 64,
        service: int = SERVICE,
        back: bool = False,
        source: str = "",
    ) -> bytes:
        ends = [source or _CLIENT[version == 6], _SERVER[version == 6]]
        ports, macs = [sport, service], [_MAC, _GATEWAY]
        if back:
            for pair in (ends, ports, macs):
                pair.reverse()
        src, dst = map(ipaddress.ip_address, ends)
        body = frames.tcp(src, dst, ports[0], ports[1], b"", flags=flags)
        build = frames.ipv4 if version == 4 else frames.ipv6
        return frames.ethernet(
            macs[0], macs[1], IP4 if version == 4 else IP6, build(ends[0], ends[1], TCP, body, ttl=ttl)
        )


def packets(sizes: Sequence[int], runs: Runs) -> tuple[list[Series], list[Goal]]:
    """Every figure at every size, in turn."""
    with _loaded(sizes) as programs:
        names = tuple(programs)
        looped: _Samples = {version: {name: [] for name in names} for version in _VERSIONS}
        first: _Samples = {version: {name: [] for name in names} for version in _VERSIONS}
        refused: dict[str, list[float]] = {name: [] for name in names if name != NONE}
        second: dict[str, list[float]] = {name: [] for name in names}
        elsewhere: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(runs.rounds + 1):
            for name in turned(names, turn):
                asked = programs[name]
                found = [(second[name], asked.second(4, runs.singles))]
                found.append((elsewhere[name], asked.from_elsewhere(runs.singles)))
                for version in _VERSIONS:
                    found.append((looped[version][name], asked.looped(version, runs.loops)))
                    found.append((first[version][name], asked.first(version, runs.singles)))
                if name != NONE:
                    found.append((refused[name], asked.refused(4, runs.loops)))
                for samples, sample in found:
                    if turn:  # the first round warms up
                        samples.append(sample)
    once = f"BPF_PROG_TEST_RUN, one run each, median of {runs.singles} a round"
    loop = f"BPF_PROG_TEST_RUN in a loop, median of {runs.loops} means of {_REPEAT} a round"
    net = "a SYN from an address that only a net covers, another net each time"
    least, most = _name(min(sizes)), _name(max(sizes))
    established = [
        _series(
            f"established packet, pw_from_port, IPv{version}", samples, f"from port to port, {loop}", NONE
        )
        for version, samples in looped.items()
    ]
    opening = [
        _series(f"first packet, pw_from_port, IPv{version}", samples, f"a SYN, port to port, {once}", least)
        for version, samples in first.items()
    ]
    opening.append(_series("first packet from elsewhere, pw_to_port", elsewhere, f"{net}, {once}", least))
    series = [
        *established,
        _series("refused packet, pw_from_port", refused, f"no flow, a decision, a drop; {loop}", least),
        _series("established packet, one by one", second, f"from port to port, IPv4, {once}", NONE),
        *opening,
    ]
    goals = [
        Goal(
            f"{one.name}, at {most}",
            one.spread(most).median < ESTABLISHED_NS,
            f"{one.spread(most)} ns, goal < {number(ESTABLISHED_NS)} ns",
        )
        for one in established
    ]
    goals += [at_most(f"{one.name}, at {most} against {least}", one, most, least, 2) for one in opening]
    return series, goals


def _series(name: str, samples: dict[str, list[float]], what: str, reference: str) -> Series:
    return Series(name, "ns", samples, "less", what, reference)


def _name(rules: int) -> str:
    return f"{rules:,} rules" if rules else NONE


@contextlib.contextmanager
def _loaded(sizes: Sequence[int]) -> Iterator[dict[str, _Loaded]]:
    """By the number of rules; the programs and their devices are gone at the end."""
    spec = bpf.CollectionSpec.load(OBJECT)
    with own_netns(), contextlib.ExitStack() as stack:
        ip("link", "add", "near", "type", "veth", "peer", "name", "far")
        near, far = socket.if_nametoindex("near"), socket.if_nametoindex("far")
        yield {
            _name(rules): _Loaded(stack.enter_context(bpf.Collection.load(spec)), near, far, rules)
            for rules in (0, *sizes)
        }
