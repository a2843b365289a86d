"""Traffic under policy: the same pair of sandboxes, the same policy, enforced by each contender in turn.

Ours with no policy is what it is measured against. The others are the reference plugin `ptp` and what a
careful user writes for it by hand: established flows pass first, each side's rules stand in a chain of their
own, found by its address, and sources are looked up in sets (bench/policy_rules.py); or, where it
stays sane, in a list. They filter addresses by the kernel's strict reverse path check (rp_filter), which is
a part of what our guard does, and count nothing, while ours counts all.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from bench import policy_rules
from bench.figures import Goal, Series, at_least, at_most
from bench.lab import PTP, Host, OurHost, Sandbox, conflist
from bench.policy_rules import CLIENT, CLOSED, SERVER, SERVICE
from bench.traffic import CPUS, answer, compiled, iperf, iperf_server, turned
from portwright import Client

#: What each contender's name begins with.
NONE, OURS, NFT, IPSET = "no policy", "portwright", "ptp + nft set", "ptp + ipset"
NFT_LIST, IPTABLES_LIST = "ptp + nft rules", "ptp + iptables rules"
#: A rule each is walked through packet by packet: beyond, one first packet takes longer than a round trip.
LONGEST_LIST = 10_000
_FIRST_SOURCE = 2048
#: Of the API: an apply of 100,000 rules is seconds.
_TIMEOUT = 120.0


class Contender(NamedTuple):
    """Who, and under how many rules."""

    kind: str
    rules: int

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        return f"{self.kind}, {self.rules:,} rules" if self.rules else self.kind


class Effort(NamedTuple):
    """How much is measured: rounds of each figure, and how long one sample is."""

    stream_rounds: int
    megabytes: int
    trip_rounds: int
    flow_rounds: int
    milliseconds: int
    datagrams: int


class _Pair(NamedTuple):
    """A client's and a server's sandbox, the server's address, the host that joins them; how policy came."""

    client: Sandbox
    server: Sandbox
    address: str
    host: Host
    told: str


def contenders(sizes: Sequence[int]) -> tuple[Contender, ...]:
    """All of them, by size."""
    found = [Contender(NONE, 0)]
    for rules in sorted(sizes, reverse=True):
        found += [Contender(kind, rules) for kind in (OURS, NFT, IPSET)]
        if rules <= LONGEST_LIST:
            found += [Contender(kind, rules) for kind in (NFT_LIST, IPTABLES_LIST)]
    return tuple(found)


def traffic(sizes: Sequence[int], effort: Effort) -> tuple[list[Series], list[Goal], dict[str, str]]:
    """Stream and request/response at the smallest, the middle and the largest of ``sizes``; flows at all."""
    everyone = contenders(sizes)
    ordered = sorted(sizes)
    few = {ordered[0], ordered[len(ordered) // 2], ordered[-1]}
    bulk = tuple(
        one.name
        for one in everyone
        if one.kind == NONE
        or (one.kind == OURS and one.rules in few)
        or (one.kind in (NFT, IPSET) and one.rules in (ordered[0], ordered[-1]))
    )
    with contextlib.ExitStack() as stack:
        pairs: dict[str, _Pair] = {}
        for one in everyone:
            pairs[one.name] = stack.enter_context(_pair(one))
        flows = stack.enter_context(compiled("flows"))
        rr = stack.enter_context(compiled("rr"))
        for pair in pairs.values():
            _same_isolation(flows, pair)
        stream, cost = _stream(bulk, pairs, effort)
        trips = _trips(bulk, pairs, rr, effort)
        opened, first, following = _flows(tuple(one.name for one in everyone), pairs, flows, effort)
        for pair in pairs.values():
            _nothing_overflowed(pair)
    least, most = Contender(OURS, ordered[0]), Contender(OURS, ordered[-1])
    goals = [
        at_least(f"{one.name} at {most.rules:,} rules against no policy", one, most.name, NONE, 0.97)
        for one in (stream, trips)
    ]
    flat = f"{first.name}, at {most.rules:,} rules against {least.rules}"
    goals.append(at_most(flat, first, most.name, least.name, 2))
    facts = {
        "lists of rules are cut at": f"{LONGEST_LIST:,} rules, where each new flow walks through all of them",
        f"policy put in force at {most.rules:,} rules": "; ".join(
            f"{one.kind} {pairs[one.name].told}" for one in everyone if one.rules == most.rules
        ),
    }
    return [stream, cost, trips, opened, first, following], goals, facts


def _stream(names: tuple[str, ...], pairs: dict[str, _Pair], effort: Effort) -> list[Series]:
    speed: dict[str, list[float]] = {name: [] for name in names}
    cost: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(iperf_server(pairs[name].server, SERVICE))
        for turn in range(effort.stream_rounds):
            for name in turned(names, turn):
                gbits, cpu = iperf(pairs[name].client, pairs[name].address, effort.megabytes, SERVICE)
                speed[name].append(gbits)
                cost[name].append(cpu / gbits)
    how = f"iperf3, one stream of {effort.megabytes} MB a round, client and server on a CPU each"
    both = "both sides, as iperf3 accounts for it"
    return [
        Series("TCP stream", "Gb/s", _sorted(speed), "more", how, NONE),
        Series("CPU of the stream", "% of a CPU per Gb/s", _sorted(cost), "less", both, NONE),
    ]


def _trips(names: tuple[str, ...], pairs: dict[str, _Pair], rr: str, effort: Effort) -> Series:
    rate: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(effort.trip_rounds):
        for name in turned(names, turn):
            pair = pairs[name]
            command = [
                rr,
                pair.client.path,
                pair.server.path,
                pair.address,
                "tcp",
                str(effort.milliseconds),
                *CPUS,
            ]
            rate[name].append(float(answer(command)["rate"]))
    how = f"bench/rr.c, one byte each way, {effort.milliseconds} ms a round, client and server on a CPU each"
    return Series("TCP request/response", "round trips/s", _sorted(rate), "more", how, NONE)


def _flows(names: tuple[str, ...], pairs: dict[str, _Pair], flows: str, effort: Effort) -> list[Series]:
    """Connections, and single datagrams: of a new flow each, and of one that is known."""
    rate: dict[str, list[float]] = {name: [] for name in names}
    first: dict[str, list[float]] = {name: [] for name in names}
    following: dict[str, list[float]] = {name: [] for name in names}
    step = effort.datagrams + 100  # the warm-up has flows too
    for turn in range(effort.flow_rounds):
        source = _FIRST_SOURCE + turn * step  # a flow is new once
        for name in turned(names, turn):
            pair = pairs[name]
            connected = answer(_command(flows, pair, SERVICE, "connect", effort.milliseconds))
            rate[name].append(float(connected["rate"]))
            for mode, found in (("first", first), ("next", following)):
                sent = answer(_command(flows, pair, SERVICE, mode, effort.datagrams, source))
                assert sent["arrived"] == sent["count"], f"{name}: {sent}"
                found[name].append(float(sent["ns"]))
    how = f"bench/flows.c: opened, a byte each way, closed; one at a time, {effort.milliseconds} ms a round"
    count = f"{effort.datagrams:,} UDP datagrams a round, from the system call to the receiver's queue"
    return [
        Series("TCP connections", "connections/s", _sorted(rate), "more", how, NONE),
        Series("first packet, all its way", "ns", _sorted(first), "less", f"{count}, a flow each", NONE),
        Series(
            "next packet, all its way", "ns", _sorted(following), "less", f"{count}, all of one flow", NONE
        ),
    ]


def _sorted(samples: dict[str, list[float]]) -> dict[str, list[float]]:
    """For the reader: by kind, then by size, and not in the order of measuring."""

    def place(name: str) -> tuple[int, int]:
        kind, _, rules = name.partition(", ")
        return (NONE, OURS, NFT, IPSET, NFT_LIST, IPTABLES_LIST).index(kind), len(rules)

    return {name: samples[name] for name in sorted(samples, key=place)}


def _command(flows: str, pair: _Pair, port: int, mode: str, *more: int) -> list[str]:
    return [
        flows,
        pair.client.path,
        pair.server.path,
        pair.address,
        str(port),
        *CPUS,
        mode,
        *(str(number) for number in more),
    ]


def _same_isolation(flows: str, pair: _Pair) -> None:
    """Everybody does the work: what the policy denies does not arrive, what it allows does."""
    policy = pair.host.name != NONE
    for port, expected in ((CLOSED, 0 if policy else 20), (SERVICE, 20)):
        found = answer(_command(flows, pair, port, "first", 20, 1024))
        assert found["arrived"] == expected, f"{pair.host.name}: {found} on port {port}"


def _nothing_overflowed(pair: _Pair) -> None:
    if isinstance(pair.host, OurHost):
        with pair.host.daemon.client() as client:
            full = [drop for drop in client.drops() if drop.reason == "flow_table"]
        assert not full, f"{pair.host.name}: the table of flows was full, {full}"


@contextlib.contextmanager
def _pair(who: Contender) -> Iterator[_Pair]:
    """Two sandboxes of a contender with its policy in force."""
    with contextlib.ExitStack() as stack:
        host = OurHost(who.name) if who.kind in (NONE, OURS) else Host(who.name)
        stack.callback(host.close)
        client, server = host.sandbox(), host.sandbox()
        if isinstance(host, OurHost):
            addresses = _ours(host, client, server)
            requests = list(policy_rules.requests(policy_rules.manifests(who.rules))) if who.rules else []
            begun = time.perf_counter()
            with Client(host.daemon.run_dir / "portwright.sock", timeout=_TIMEOUT) as api:
                for files in requests:
                    api.policy_apply(files)
            told = f"by {len(requests)} requests in {time.perf_counter() - begun:.3g} s"
        else:
            addresses = _theirs(host, client, server)
            begun = time.perf_counter()
            _ENFORCE[who.kind](host, who.rules, *addresses)
            told = f"in {time.perf_counter() - begun:.3g} s"
        yield _Pair(client, server, addresses[1], host, told)


def _ours(host: OurHost, client: Sandbox, server: Sandbox) -> tuple[str, str]:
    """Ports in both families; (client's address, server's), IPv4."""
    with host.daemon.client() as api:
        api.network_create("policy", subnets=["10.60.0.0/24", "fd00:60::/64"])
        found = []
        for label, sandbox in ((CLIENT, client), (SERVER, server)):
            port = api.port_create("policy", sandbox.path, name=label, labels={"app": label})
            found.append(next(a.address for a in port.addresses if ":" not in a.address))
    return found[0], found[1]


def _theirs(host: Host, client: Sandbox, server: Sandbox) -> tuple[str, str]:
    conf = conflist(PTP, host)
    found = []
    for sandbox in (client, server):
        result = host.runtime.add(conf, sandbox.id, sandbox.path)
        found.append(str(result["ips"][0]["address"]).partition("/")[0])
    host.ns.run(["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1"])
    return found[0], found[1]


def _nft(host: Host, rules: int, client: str, server: str, *, linear: bool) -> None:
    host.ns.run(["nft", "-f", "-"], input=policy_rules.nft(rules, server, client, linear=linear))


def _iptables(host: Host, rules: int, client: str, server: str, *, linear: bool) -> None:
    if not linear:
        host.ns.run(["ipset", "restore"], input=policy_rules.ipset(rules, client))
    for command, text in policy_rules.iptables(rules, server, client, linear=linear).items():
        host.ns.run([command], input=text)


_ENFORCE: dict[str, Callable[[Host, int, str, str], None]] = {
    NFT: lambda *given: _nft(*given, linear=False),
    NFT_LIST: lambda *given: _nft(*given, linear=True),
    IPSET: lambda *given: _iptables(*given, linear=False),
    IPTABLES_LIST: lambda *given: _iptables(*given, linear=True),
}
