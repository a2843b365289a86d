"""Every distinct state of the corpora on real packets: a daemon, ports, and connections between namespaces.

A state's manifests go through ``policy.apply``, its pods are sandboxes, and what it speaks of beyond them is
made: addresses of nodes and of the world are behind the uplink, those of this node the host's own.
Denials are drop counters, never time-outs (portwright.live.probe).
"""

from __future__ import annotations

import ipaddress
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import NamedTuple

import msgspec
import pytest

from portwright.api.client import Client
from portwright.kernel.bpf import Map
from portwright.live.ears import Place
from portwright.live.probe import Prober
from portwright.live.sandboxes import Sandboxes
from portwright.model.errors import InvalidInput
from portwright.model.port import Port
from portwright.observe import counters
from portwright.policy.engine import Engine
from portwright.policy.labels import NAMESPACE_PREFIX, SERVICE_ACCOUNT_PREFIX
from portwright.policy.manifests.cluster import (
    CALICO_NAME,
    CALICO_NAMESPACE,
    CALICO_ORCHESTRATOR,
    CALICO_SERVICE_ACCOUNT,
)
from portwright.policy.rules import SCTP, TCP, UDP, Endpoint, EndpointKind, Flow, PolicySet, Snapshot
from tests.deadline import wait_until
from tests.fix_daemon import Daemon
from tests.fix_netns import NetnsFactory, TestNetns
from tests.fix_policy import (
    CORPORA,
    Step,
    corpus,
    cyclonus,
    cyclonus_policies,
    states,
    texts,
)

pytestmark = pytest.mark.netns

#: The wire between the host and what is outside; no corpus names an address of these.
_LINK = {4: ("198.18.255.1", "198.18.255.2", 30), 6: ("fd99::1", "fd99::2", 64)}
#: What no pod and no node has.
_OUTSIDE = ("198.51.100.9", "2001:db8:9::9")
_FILE = "state.yaml"
_PORTS = (TCP, UDP, SCTP)
#: Where a state's own rows are of one kind, these are tried for the other.
_SERVICES = ((TCP, 80), (TCP, 81), (UDP, 80), (SCTP, 80))
#: What is refused at apply, by a word of the refusal.
_NOT_ENFORCED = ("domainNames", "Log", "staged")
_IMPLIED = {CALICO_NAME, CALICO_NAMESPACE, CALICO_ORCHESTRATOR, CALICO_SERVICE_ACCOUNT}


class Asked(NamedTuple):
    """A state: its manifests, what it describes, and the flows of which it says what becomes of them."""

    title: str
    manifests: str
    policies: PolicySet
    snapshot: Snapshot
    expected: tuple[tuple[Flow, bool], ...]

    @property
    def pods(self) -> list[Endpoint]:
        """Those with a sandbox of their own."""
        return [
            e
            for e in self.snapshot.endpoints
            if e.kind is EndpointKind.WORKLOAD and not e.host_network and e.addresses
        ]

    @property
    def beyond(self) -> set[str]:
        """The other addresses that it speaks of, and one of each family that it does not."""
        own = {a for pod in self.pods for a in pod.addresses}
        there = {a for e in self.snapshot.endpoints for a in e.addresses}
        asked = {a for flow, _ in self.expected for a in (flow.source, flow.destination)}
        return {*there, *asked, *_OUTSIDE} - own


class Dropped(NamedTuple):
    """A drop counter."""

    port_id: str
    direction: str
    reason: str
    packets: int
    rule: str = ""


class Field:
    """A daemon with the pods of one corpus, and all that is beyond them."""

    def __init__(self, daemon: Daemon, client: Client, world: TestNetns, addresses: Iterable[str]) -> None:
        self._host, self._world, self._client = daemon.host, world, client
        self.sandboxes = Sandboxes(client, addresses)
        self._beyond: dict[str, Place] = {}
        self._places: dict[str, Place] = {}
        self._ports: tuple[Port, ...] = ()
        self._drops = Map.from_pin(next((daemon.run_dir / "bpf").glob("*/maps/pw_drops")))
        self.prober = Prober(self._places, self._counted)

    def _counted(self) -> Iterator[Dropped]:
        """The drop counters where the programs count, read as the daemon does: it is asked a lot here."""
        for port, direction, reason, count in counters.drops({"pw_drops": self._drops}, self._ports):
            yield Dropped(port.port_id, direction, reason, count.packets)

    def be(self, state: Asked) -> None:
        """Make the state's pods and what is beyond them, and put its policy in force."""
        self.sandboxes.be(state.pods)
        here = {a for e in state.snapshot.endpoints if e.local_node for a in e.addresses}
        for address in sorted(state.beyond - set(self._beyond)):
            ns = self._host if address in here else self._world
            width = ipaddress.ip_address(address).max_prefixlen
            _ip(ns, f"addr add {address}/{width} dev lo" + (" nodad" if width == 128 else ""))
            self._beyond[address] = Place(ns.fd)
        self._places.clear()
        self._places.update(self._beyond | self.sandboxes.places)
        self._client.policy_apply([(_FILE, state.manifests)])
        self._ports = self._client.port_list()

    def close(self) -> None:
        """Let go of everything."""
        self.prober.close()
        self._drops.close()
        self.sandboxes.close()


@pytest.fixture
def host(netns_factory: NetnsFactory, world: TestNetns) -> TestNetns:
    """The daemon's host namespace, its uplink with addresses that no corpus has for somebody else."""
    made = netns_factory()
    _ip(made, f"link add up0 type veth peer name w0 netns {world.name}")
    for version, (near, far, width) in _LINK.items():
        nodad = " nodad" if version == 6 else ""
        _ip(made, f"addr add {near}/{width} dev up0{nodad}", "link set up0 up")
        _ip(world, f"addr add {far}/{width} dev w0{nodad}", "link set w0 up")
    for near, far, _ in _LINK.values():
        _ip(made, f"route add default via {far}")
        _ip(world, f"route add default via {near}")
    for ns, dev in ((made, "up0"), (world, "w0")):
        wait_until(partial(_transmits, ns, dev), 5, f"{dev} to transmit")
    return made


def _transmits(ns: TestNetns, dev: str) -> bool:
    return "state UP" in ns.run(["ip", "-o", "link", "show", dev]).stdout


def _ip(ns: TestNetns, *commands: str) -> None:
    ns.run(["ip", "-batch", "-"], input="".join(f"{command}\n" for command in commands))


def _corpus(name: str) -> Iterator[Asked]:
    for case, state in zip(corpus(name).cases, states(name), strict=True):
        yield Asked(
            title=state.title,
            manifests="\n---\n".join(text for _, text in texts(name, case)),
            policies=state.policies,
            snapshot=state.snapshot,
            expected=tuple((flow, row.allowed) for flow, row in state.asked),
        )


def _cyclonus() -> Iterator[Asked]:
    """Its steps but for those that repeat the state of another one."""
    steps = {(step.policies, repr(step.snapshot)): step for step in cyclonus()}
    for step in steps.values():
        bits = iter(step.expected)
        flows = (
            (
                Flow(source=source, destination=target, protocol=protocol, source_port=50_000, port=port),
                next(bits),
            )
            for source in step.addresses
            for target in step.addresses
            for protocol, port in step.ports
        )
        yield Asked(
            title=step.title,
            manifests=_written(step),
            policies=cyclonus_policies(step.policies),
            snapshot=step.snapshot,
            expected=tuple((flow, bit == "1") for flow, bit in flows),
        )


def _written(step: Step) -> str:
    """The step's policies with Namespace and Pod manifests that make its endpoints again."""
    namespaces: dict[str, dict[str, str]] = {}
    items: list[object] = []
    for pod in step.snapshot.endpoints:
        namespaces[pod.namespace] = {
            key.removeprefix(NAMESPACE_PREFIX): value
            for key, value in pod.labels.items()
            if key.startswith(NAMESPACE_PREFIX) and key.removeprefix(NAMESPACE_PREFIX) not in _IMPLIED
        }
        labels = {
            key: value
            for key, value in pod.labels.items()
            if not key.startswith((NAMESPACE_PREFIX, SERVICE_ACCOUNT_PREFIX)) and key not in _IMPLIED
        }
        names = {TCP: "TCP", UDP: "UDP", SCTP: "SCTP"}
        ports = [
            {"name": p.name, "protocol": names[p.protocol], "containerPort": p.port} for p in pod.named_ports
        ]
        items.append(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": pod.name, "namespace": pod.namespace, "labels": labels},
                "spec": {"containers": [{"name": "c", "ports": ports}]},
                "status": {"podIP": pod.addresses[0]},
            }
        )
    for name, labels in namespaces.items():
        items.append({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    return json.dumps(
        {"apiVersion": "v1", "kind": "List", "items": [*items, *json.loads(step.policies)["items"]]}
    )


class Told:
    """What a corpus came to."""

    def __init__(self) -> None:
        self.states = 0
        self.sent: Counter[bool] = Counter()
        self.families: Counter[int] = Counter()
        self.unsent: Counter[str] = Counter()
        self.refused: list[str] = []
        self.lacking: list[str] = []
        self.wrong: list[str] = []

    def __str__(self) -> str:
        lines = [
            f"{self.states} distinct states, {self.sent[True]} allowed and {self.sent[False]} denied pairs "
            f"sent ({self.families[4]} IPv4, {self.families[6]} IPv6)",
            *(f"not sent, {why}: {count}" for why, count in sorted(self.unsent.items())),
            *(f"refused at apply: {title}" for title in self.refused),
            *(f"without a pair of the other kind: {title}" for title in self.lacking),
        ]
        return "\n  ".join(lines)


def _unsendable(flow: Flow, ports: dict[str, str]) -> str:
    """Why no real packet can ask it: '' if one can."""
    if (":" in flow.source) != (":" in flow.destination):
        return "of two families"
    if flow.protocol in _PORTS and flow.port is None:
        return "a later fragment"
    if flow.source not in ports and flow.destination not in ports:
        return "between others than pods"
    if ports.get(flow.source) == ports.get(flow.destination):
        return "of a pod to itself"
    return ""


def _try(field: Field, state: Asked, told: Told) -> None:
    """Send what the state says; where that is of one kind alone, a pair of the other kind if it has one."""
    ports = {address: pod.title for pod in state.pods for address in pod.addresses}
    # Names are resolved by what their resolver answers; nobody asks it here.
    engine = Engine(state.policies, msgspec.structs.replace(state.snapshot, domains={}))
    questions: list[tuple[Flow, bool]] = []
    for flow, allowed in state.expected:
        why = _unsendable(flow, ports)
        if not why and state.snapshot.domains and engine.connect(flow).allowed != allowed:
            why = "to an address that only a name's answer allows"
        if why:
            told.unsent[why] += 1
        else:
            questions.append((flow, allowed))
    kinds = {(_version(flow), allowed) for flow, allowed in questions}
    for version in sorted({_version_of(a) for a in ports}):
        for allowed in (True, False):
            if (version, allowed) not in kinds:
                found = _other_kind(engine, state, version, allowed)
                if found is not None:
                    questions.append((found, allowed))
                elif version == min(map(_version_of, ports)):
                    told.lacking.append(f"{state.title} (none is {'allowed' if allowed else 'denied'})")
    # Denied first: without ports in its header, a packet against the way of an open flow would be its answer.
    questions.sort(key=lambda question: question[1])
    arrived = field.prober.send([flow for flow, _ in questions])
    for (flow, allowed), passed in zip(questions, arrived, strict=True):
        told.sent[allowed] += 1
        told.families[_version(flow)] += 1
        if passed != allowed:
            told.wrong.append(f"{state.title}: {flow} {'arrived' if passed else 'was dropped'}")
    assert questions, f"{state.title}: nothing of it can be sent"


def _other_kind(engine: Engine, state: Asked, version: int, allowed: bool) -> Flow | None:
    """A flow of which the engine says that: of pods, else with what is beyond; None if none is found."""
    ports = {address: pod.title for pod in state.pods for address in pod.addresses}
    ends = [a for a in (*ports, *sorted(state.beyond)) if _version_of(a) == version]
    mine = {(f.protocol, f.port) for f, _ in state.expected if f.protocol in _PORTS and f.port is not None}
    for protocol, port in dict.fromkeys((*_SERVICES, *sorted(mine))):
        for source in ends:
            for target in ends:
                flow = Flow(
                    source=source, destination=target, protocol=protocol, source_port=50_000, port=port
                )
                if not _unsendable(flow, ports) and engine.connect(flow).allowed == allowed:
                    return flow
    return None


def _version_of(address: str) -> int:
    return 6 if ":" in address else 4


def _version(flow: Flow) -> int:
    return _version_of(flow.source)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [*CORPORA, "cyclonus"])
def test_every_state_on_real_packets(
    daemon: Daemon,
    world: TestNetns,
    name: str,
    record_property: Callable[[str, object], None],
) -> None:
    """What a corpus allows arrives and what it denies is dropped and counted, in every state of it, both ways
    at least once where the state has both."""
    asked = list(_cyclonus() if name == "cyclonus" else _corpus(name))
    told = Told()
    addresses = {address for state in asked for pod in state.pods for address in pod.addresses}
    with daemon.client() as client, closing(Field(daemon, client, world, addresses)) as field:
        for state in asked:
            try:
                field.be(state)
            except InvalidInput as error:
                if not any(what in str(error) for what in _NOT_ENFORCED):
                    raise
                told.refused.append(f"{state.title} ({error.field.rpartition(': ')[2]})")
                continue
            told.states += 1
            _try(field, state, told)

    print(f"{name}: {told}")
    record_property("states", told.states)
    record_property("allowed_pairs", told.sent[True])
    record_property("denied_pairs", told.sent[False])
    if told.refused:
        record_property(f"{name} refused", "; ".join(told.refused))
    assert told.wrong == []
    assert told.states + len(told.refused) == len(asked)
    assert told.sent[True] >= told.states / 2
    assert told.sent[False] >= told.states / 2
