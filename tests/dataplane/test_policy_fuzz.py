"""Generated policies and packets: the engine, the programs on live maps, and nftables say the same.

Each packet has three verdicts: the pure engine's, that of the real programs (BPF_PROG_TEST_RUN) on compiled
tables, and that of an nft ruleset of the same model, through which a real packet goes. The first that differs
is shrunk, and printed as manifests and one packet.

The seed is printed and can be given: ``PWT_SEED=123 pytest -s tests/dataplane/test_policy_fuzz.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

import msgspec
import pytest
import yaml
from msgspec.structs import replace

from portwright.dataplane import OBJECT
from portwright.kernel import bpf
from portwright.model.errors import InvalidInput
from portwright.policy.compile import compile_policies
from portwright.policy.engine import Connection, Engine, Implicit
from portwright.policy.rules import (
    PORT_PROTOCOLS,
    Action,
    Direction,
    Flow,
    NamedPort,
    Peer,
    Policy,
    PortRange,
    Rule,
    Traffic,
)
from portwright.policy.tables import Compiled
from tests.dataplane.model import Topology
from tests.dataplane.nft_rules import Nft, nft, ruleset
from tests.dataplane.rig import Rig
from tests.dataplane.shrink import shrink
from tests.dataplane.test_policy_tables import Asked
from tests.fix_bpf import ip, own_netns
from tests.policy_random.dice import Document
from tests.policy_random.packets import packets
from tests.policy_random.world import World, make_world, read_world

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(600)]

#: What the base seed is unless another is given: the same worlds in each run of CI.
SEED: Final = int(os.environ.get("PWT_SEED", "0")) or 3
#: Of as many worlds, also under emulation.
PACKETS, A_WORLD = (10_000, 80) if "PORTWRIGHT_LAB_KERNEL" in os.environ else (100_000, 800)
#: In how many worlds a wrong judge must have been found.
SOON: Final = 40

#: The kinds of policy whose rules are in order, which allow and deny.
ORDERED_KINDS: Final = (
    "ClusterNetworkPolicy",
    "AdminNetworkPolicy",
    "BaselineAdminNetworkPolicy",
    "CalicoNetworkPolicy",
    "GlobalNetworkPolicy",
)

#: What somebody says of each packet; None where he never sees it.
Verdicts: TypeAlias = list[bool | None]
Judge: TypeAlias = Callable[[World, Sequence[Flow]], Verdicts]


def engine(world: World, flows: Sequence[Flow]) -> Verdicts:
    """The oracle."""
    asked = Engine(world.policies, world.snapshot)
    return [asked.connect(flow).allowed for flow in flows]


class Judges:
    """The kernel's two, in one namespace."""

    def __init__(self, asked: Asked, rules: Nft) -> None:
        self._asked, self._rules = asked, rules
        self._in_force: World | None = None

    def _put_in_force(self, world: World) -> None:
        if self._in_force is not world:
            self._asked.load(world.snapshot, compile_policies(world.policies, world.snapshot))
            self._in_force = world

    def programs(self, world: World, flows: Sequence[Flow]) -> Verdicts:
        """The data path, on the tables that the policies compile to."""
        self._put_in_force(world)
        return [self._asked.allows(flow) for flow in flows]

    def slow_path(self, world: World, flows: Sequence[Flow]) -> Verdicts:
        """The same of packets from pod to pod that the host's stack forwards."""
        self._put_in_force(world)
        return [self._asked.delivers(flow) for flow in flows]

    def of_tables(self, world: World, compiled: Compiled, flows: Sequence[Flow]) -> Verdicts:
        """The data path on these tables."""
        self._in_force = None
        self._asked.load(world.snapshot, compiled)
        return [self._asked.allows(flow) for flow in flows]

    def nft(self, world: World, flows: Sequence[Flow]) -> Verdicts:
        """An nft ruleset of the policies, on packets that come in."""
        self._rules.load(ruleset(world.policies, world.snapshot))
        return list(self._rules.verdicts(flows))


@pytest.fixture(scope="module")
def judges() -> Iterator[Judges]:
    """The programs loaded, and a device before an empty ruleset, in a namespace of their own."""
    with own_netns(), contextlib.ExitStack() as stack:
        ip("link", "add", "near", "type", "veth", "peer", "name", "far")
        near, far = socket.if_nametoindex("near"), socket.if_nametoindex("far")
        collection = stack.enter_context(bpf.Collection.load(bpf.CollectionSpec.load(OBJECT)))
        rig = Rig(collection, Topology((), frozenset()), far)
        yield Judges(Asked(rig, near, far), stack.enter_context(nft()))


# --- a mismatch, and what is left of it ---


def differing(world: World, flows: Sequence[Flow], judge: Judge) -> Flow | None:
    """The first packet of which ``judge`` says otherwise than the engine."""
    pairs = zip(flows, engine(world, flows), judge(world, flows), strict=True)
    return next((flow for flow, meant, said in pairs if said is not None and said != meant), None)


def smallest(world: World, flow: Flow, judge: Judge) -> World:
    """The least of the world's manifests by which ``judge`` is still wrong about the packet."""

    def still_wrong(documents: list[Document]) -> bool:
        try:
            found = read_world(world.seed, documents)
        except InvalidInput:
            return False
        return differing(found, [flow], judge) is not None

    return read_world(world.seed, shrink(world.documents, still_wrong))


def told(world: World, flow: Flow, named: dict[str, Judge]) -> str:
    """Manifests, the packet, and every verdict."""
    manifests = yaml.safe_dump_all(world.documents, sort_keys=False)
    said = {name: judge(world, [flow])[0] for name, judge in {"engine": engine, **named}.items()}
    words = {True: "allowed", False: "denied", None: "never seen"}
    verdicts = ", ".join(f"{name}: {words[verdict]}" for name, verdict in said.items())
    fields = ", ".join(f"{k} {v}" for k, v in msgspec.to_builtins(flow).items())
    return f"world {world.seed!r}, shrunk:\n{manifests}---\npacket: {fields}\n{verdicts}"


# --- the run ---


def deciders(connection: Connection) -> Iterator[tuple[str, str]]:
    """(what decided, how) of each side."""
    for side in (connection.egress, connection.ingress):
        if side is not None:
            yield (side.policy.kind if side.policy else str(side.implicit)), str(side.verdict)


#: What must have decided some of the packets, for the run to have shown anything of it.
DECIDERS: Final = {
    *((kind, "allow") for kind in ("NetworkPolicy", *ORDERED_KINDS)),
    *((kind, "deny") for kind in ORDERED_KINDS),
    *((str(way), "allow") for way in (Implicit.ALL_PASSED, Implicit.NO_POLICY, Implicit.LOCAL_NODE)),
    (str(Implicit.TIER_DEFAULT), "deny"),
}


def test_engine_programs_and_nft_agree(
    judges: Judges, record_property: Callable[[str, object], None]
) -> None:
    """100,000 packets through some hundred generated clusters: not one verdict of the three differs."""
    print(f"PWT_SEED={SEED}")
    started = time.monotonic()
    named: dict[str, Judge] = {
        "programs": judges.programs,
        "slow path": judges.slow_path,
        "nft": judges.nft,
    }
    judged = worlds = policies = 0
    decided: Counter[tuple[str, str]] = Counter()
    seen: Counter[tuple[int, bool]] = Counter()
    while judged < PACKETS:
        world = make_world(f"{SEED}/{worlds}")
        flows = packets(world, A_WORLD)
        asked = Engine(world.policies, world.snapshot)
        meant = [asked.connect(flow) for flow in flows]
        said = {name: judge(world, flows) for name, judge in named.items()}
        for name, verdicts in said.items():
            for flow, connection, verdict in zip(flows, meant, verdicts, strict=True):
                if verdict is not None and verdict != connection.allowed:
                    least = smallest(world, flow, named[name])
                    pytest.fail(f"{name} differs from the engine\n{told(least, flow, named)}")
        for flow, connection, verdict in zip(flows, meant, said["programs"], strict=True):
            if verdict is not None:
                judged += 1
                decided.update(deciders(connection))
                seen[flow.protocol, ":" in flow.source] += 1
        worlds += 1
        policies += len(world.policies.policies)
    seconds = time.monotonic() - started
    print(f"{judged:,} packets, {policies} policies of {worlds} worlds, 0 mismatches, {seconds:.1f} s")
    for name, figure in (("packets", judged), ("policies", policies), ("worlds", worlds), ("mismatches", 0)):
        record_property(name, figure)
    record_property("seed", f"PWT_SEED={SEED}")
    assert {decider for decider, times in decided.items() if times >= PACKETS // 10_000} >= DECIDERS
    assert min(seen.values()) >= PACKETS // 1000, "too few packets of a protocol and family"


# --- the run is tested: judges that are wrong ---


def of_rules(change: Callable[[Rule], Rule | None]) -> Callable[[World], World]:
    """A world whose every rule is another, or is not there."""

    def changed(policy: Policy) -> Policy:
        lists = {}
        for direction in Direction:
            rules = policy.rules(direction)
            if rules is not None:
                lists[direction.value] = tuple(new for rule in rules if (new := change(rule)) is not None)
        return replace(policy, **lists)

    return lambda world: replace(
        world, policies=replace(world.policies, policies=tuple(map(changed, world.policies.policies)))
    )


def of_peers(change: Callable[[Peer], Peer]) -> Callable[[World], World]:
    """A world whose every rule has other peers."""
    return of_rules(
        lambda rule: replace(rule, peers=rule.peers if rule.peers is None else tuple(map(change, rule.peers)))
    )


def of_traffic(change: Callable[[Traffic], Traffic]) -> Callable[[World], World]:
    """A world whose every rule has other traffic."""
    return of_rules(
        lambda rule: replace(
            rule, traffic=rule.traffic if rule.traffic is None else tuple(map(change, rule.traffic))
        )
    )


def shorter(ports: PortRange) -> PortRange:
    """A range without its end."""
    return PortRange(ports.first, max(ports.first, ports.last - 1))


def names_of_any_protocol(world: World) -> World:
    """The same with named ports under every protocol that has ports."""
    endpoints = tuple(
        replace(
            end,
            named_ports=tuple(
                NamedPort(given.name, protocol, given.port)
                for given in end.named_ports
                for protocol in sorted(PORT_PROTOCOLS)
            ),
        )
        for end in world.snapshot.endpoints
    )
    return replace(world, snapshot=replace(world.snapshot, endpoints=endpoints))


def without_tier_defaults(world: World) -> World:
    """The same with tiers that deny nothing by default."""
    tiers = tuple(replace(tier, default=Action.PASS) for tier in world.policies.tiers)
    return replace(world, policies=replace(world.policies, tiers=tiers))


def one_cell_flipped(compiled: Compiled) -> Compiled:
    """The first cell of the first set that has one says the opposite."""
    for number, table in compiled.sets.items():
        for class_id, ((port_class, verdict), *rest) in table.columns.items():
            wrong = (port_class, replace(verdict, allow=not verdict.allow))
            columns = {**table.columns, class_id: (wrong, *rest)}
            return replace(compiled, sets={**compiled.sets, number: replace(table, columns=columns)})
    return compiled


def without_one_net(compiled: Compiled) -> Compiled:
    """The last net that has a class is not there."""
    nets = [net for net, number in compiled.prefixes.items() if number]
    kept = {net: number for net, number in compiled.prefixes.items() if net not in nets[-1:]}
    return replace(compiled, prefixes=kept)


def by_nft(change: Callable[[World], World]) -> Callable[[Judges], Judge]:
    """A rendering of something else."""
    return lambda judges: lambda world, flows: judges.nft(change(world), flows)


def by_programs(change: Callable[[World], World]) -> Callable[[Judges], Judge]:
    """The programs on tables of something else."""
    return lambda judges: lambda world, flows: judges.programs(change(world), flows)


def by_tables(change: Callable[[Compiled], Compiled]) -> Callable[[Judges], Judge]:
    """The programs on tables that are wrong."""
    return lambda judges: (
        lambda world, flows: judges.of_tables(
            world, change(compile_policies(world.policies, world.snapshot)), flows
        )
    )


WRONG: Final[dict[str, Callable[[Judges], Judge]]] = {
    "nft: an except is ignored": by_nft(of_peers(lambda peer: replace(peer, not_nets=()))),
    "nft: a notSelector is ignored": by_nft(of_peers(lambda peer: replace(peer, not_selector=None))),
    "nft: a pass is lost": by_nft(of_rules(lambda rule: None if rule.action is Action.PASS else rule)),
    "nft: a range ends before its end": by_nft(
        of_traffic(lambda traffic: replace(traffic, ports=tuple(map(shorter, traffic.ports))))
    ),
    "nft: ipVersion is ignored": by_nft(of_traffic(lambda traffic: replace(traffic, ip_version=None))),
    "nft: source ports are ignored": by_nft(of_traffic(lambda traffic: replace(traffic, source_ports=()))),
    "nft: what is not the traffic is ignored": by_nft(of_rules(lambda rule: replace(rule, not_traffic=()))),
    "nft: a port's name is of any protocol": by_nft(names_of_any_protocol),
    "programs: tiers have no default": by_programs(without_tier_defaults),
    "tables: one cell is flipped": by_tables(one_cell_flipped),
    "tables: one net is missing": by_tables(without_one_net),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_judge_is_found_and_shrinks(
    judges: Judges, name: str, record_property: Callable[[str, object], None]
) -> None:
    """Who is wrong in one thing is found in the run's first worlds, and shown by two rules at most."""
    judge = WRONG[name](judges)
    for index in range(SOON):
        world = make_world(f"{SEED}/{index}")
        flow = differing(world, packets(world, A_WORLD), judge)
        if flow is not None:
            break
    else:
        pytest.fail(f"not found in {SOON} worlds")
    least = smallest(world, flow, judge)
    print(f"{name}\n{told(least, flow, {'wrong': judge, 'programs': judges.programs, 'nft': judges.nft})}")
    rules = [rule for p in least.policies.policies for way in Direction for rule in p.rules(way) or ()]
    assert differing(least, [flow], judge) == flow
    assert len(rules) <= 2
    assert len(least.documents) <= 6
    record_property("wrong_judges_found", 1)


ONE_FAMILY: Final = """
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Pod, metadata: {name: p}, status: {podIPs: [{ip: 10.1.0.1}, {ip: "fd00:1::1"}]}}
- apiVersion: projectcalico.org/v3
  kind: GlobalNetworkPolicy
  metadata: {name: g}
  spec:
    types: [Ingress, Egress]
    ingress: [{action: Allow, source: {nets: [NET]}}]
    egress: [{action: Deny, destination: {nets: [NET]}}, {action: Allow}]
"""


@pytest.mark.parametrize("net", ["::/0", "::/1", "::/3", "0.0.0.0/0", "0.0.0.0/1"])
def test_what_is_said_of_a_family_is_not_said_of_the_other(judges: Judges, net: str) -> None:
    """A net that holds all of a family holds nobody of the other one, though one trie has both."""
    world = read_world("", yaml.safe_load(ONE_FAMILY.replace("NET", json.dumps(net)))["items"])
    pairs = (("10.1.0.1", "126.1.0.1"), ("fd00:1::1", "1::1"), ("fd00:1::1", "2001:db8::5"))
    flows = [Flow(source=a, destination=b, protocol=253) for pair in pairs for a, b in (pair, pair[::-1])]
    meant = engine(world, flows)

    assert True in meant
    assert False in meant
    assert judges.programs(world, flows) == meant
    assert judges.nft(world, flows) == meant


TWO_ADDRESSES: Final = """
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {name: two}
  status: {podIPs: [{ip: 10.1.0.1}, {ip: 10.1.0.2}, {ip: "fd00:1::1"}, {ip: "fd00:1::2"}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: one, labels: {app: one}}
  status: {podIPs: [{ip: 10.1.0.9}, {ip: "fd00:1::9"}]}
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: n}
  spec:
    podSelector: {matchLabels: {app: one}}
    ingress: [{from: [{ipBlock: {cidr: FROM4}}, {ipBlock: {cidr: FROM6}}]}]
"""


@pytest.mark.parametrize("end", ["1", "2"])
def test_each_address_of_a_pod_is_itself(judges: Judges, end: str) -> None:
    """What a pod sends from its second address is judged as from that one, and as little from the first."""
    text = TWO_ADDRESSES.replace("FROM4", f"10.1.0.{end}/32").replace("FROM6", f"fd00:1::{end}/128")
    world = read_world("", yaml.safe_load(text)["items"])
    pairs = [(f"{net}{n}", f"{net}9") for net in ("10.1.0.", "fd00:1::") for n in (1, 2)]
    flows = [Flow(source=source, destination=target, protocol=253) for source, target in pairs]
    meant: Verdicts = [end == "1", end == "2"] * 2

    if not engine(world, flows) == judges.nft(world, flows) == meant:
        pytest.fail("engine and nft, of which no failure is expected")
    assert judges.programs(world, flows) == meant
    assert judges.slow_path(world, flows) == meant


def test_a_seed_is_a_world() -> None:
    """The same seed gives the same manifests and packets, another gives others."""
    one, same, other = (make_world(seed) for seed in ("5/0", "5/0", "5/1"))
    assert (one, packets(one, 100)) == (same, packets(same, 100))
    assert one.documents != other.documents
