"""Isolation of networks: the rules that stand for it, against the table of docs/policy.md."""

from __future__ import annotations

from itertools import product

import pytest

from portwright.policy.compile import compile_policies
from portwright.policy.engine import Engine
from portwright.policy.explain import explain, explained
from portwright.policy.isolation import Home, labelled, with_isolation
from portwright.policy.manifests.cluster import workload_labels
from portwright.policy.manifests.read import read
from portwright.policy.rules import TCP, Endpoint, Flow, PolicySet, Snapshot
from portwright.policy.tables import Tables

BLUE, RED, FREE = Home("blue", "tenant"), Home("red", "strict"), Home("free", "open")
#: Who has which addresses, each of which network: ``both`` has two, of two networks.
PODS = {
    ("a", "x"): {"10.1.0.1": BLUE, "fd00:1::1": BLUE},
    ("b", "x"): {"10.1.0.2": BLUE, "fd00:1::2": BLUE},
    ("c", "y"): {"10.1.0.3": BLUE, "fd00:1::3": BLUE},
    ("d", "x"): {"10.2.0.4": RED, "fd00:2::4": RED},
    ("e", "x"): {"10.2.0.5": RED, "fd00:2::5": RED},
    ("f", "x"): {"10.3.0.6": FREE, "fd00:3::6": FREE},
    ("g", "y"): {"10.3.0.7": FREE, "fd00:3::7": FREE},
    ("both", "x"): {"10.2.0.8": RED, "fd00:1::8": BLUE, "10.3.0.8": FREE, "fd00:3::8": FREE},
}
HOMES = {address: home for pod in PODS.values() for address, home in pod.items()}
OWNER = {address: pod for pod, addresses in PODS.items() for address in addresses}
WORLD = ("192.0.2.1", "2001:db8::1")
#: Selects d, of the strict network, for ingress alone; lets c out to other tenants, and passes on all else of
#: it; and lets f in to e by a tier that comes after all that have an order.
POLICIES = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: d, namespace: x}
spec:
  podSelector: {matchLabels: {name: d}}
  ingress: [{ports: [{port: 80}]}]
---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: c-to-a}
spec:
  tier: Baseline
  priority: 1
  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {name: c}}}}
  egress: [{name: e, action: Accept, to: [{pods: {namespaceSelector: {}, podSelector: {}}}]}]
---
apiVersion: projectcalico.org/v3
kind: Tier
metadata: {name: zzz}
spec: {}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: zzz.e}
spec:
  tier: zzz
  selector: name == 'e'
  ingress: [{action: Allow, source: {selector: name == 'f'}}]
"""


def snapshot(homes: dict[str, Home] | None = None) -> Snapshot:
    """The pods, labelled where there are networks that are not open."""
    found = [
        Endpoint(
            name=name,
            namespace=namespace,
            labels=workload_labels({"name": name}, namespace, {}),
            addresses=tuple(addresses),
        )
        for (name, namespace), addresses in PODS.items()
    ]
    return Snapshot(endpoints=tuple(labelled(e, homes) if homes else e for e in found))


def allowed(source: str, destination: str, *, policies: bool) -> bool:
    """What docs/policy.md says of port 80, in its own words."""
    if OWNER.get(source) is not None and OWNER.get(source) == OWNER.get(destination):
        return True
    return egress(source, destination, policies) and ingress(source, destination, policies)


def egress(source: str, destination: str, policies: bool) -> bool:
    """The sender's side."""
    pod, home = OWNER.get(source), HOMES.get(source, FREE)
    if policies and pod == ("c", "y") and destination in HOMES:
        return True
    if home.isolation == "strict":
        return False
    return home.isolation == "open" or destination not in HOMES or same_tenant(source, destination)


def ingress(source: str, destination: str, policies: bool) -> bool:
    """The receiver's side."""
    pod, home = OWNER.get(destination), HOMES.get(destination, FREE)
    if policies and pod in {("d", "x"), ("e", "x")}:
        return pod == ("d", "x") or OWNER.get(source) == ("f", "x")
    if home.isolation == "strict":
        return False
    return home.isolation == "open" or same_tenant(source, destination)


def same_tenant(one: str, other: str) -> bool:
    """Whether both are ports' addresses, of pods of one namespace."""
    return one in OWNER and other in OWNER and OWNER[one][1] == OWNER[other][1]


def flows() -> list[Flow]:
    """From every address to every other of its family."""
    every = [*HOMES, *WORLD]
    return [
        Flow(source=s, destination=d, protocol=TCP, source_port=50_000, port=80)
        for s, d in product(every, every)
        if (":" in s) == (":" in d)
    ]


@pytest.mark.parametrize("text", ["", POLICIES], ids=["no policies", "policies"])
def test_engine_and_tables_say_what_the_table_says(text: str) -> None:
    """Every pair of addresses, each by its own network's isolation, alone and under policies."""
    world = snapshot(HOMES)
    policies = with_isolation(read([("p.yaml", text)]).policy_set, world)
    engine, tables = Engine(policies, world), Tables(compile_policies(policies, world))
    verdicts = set()
    for flow in flows():
        want = allowed(flow.source, flow.destination, policies=bool(text))
        assert engine.connect(flow).allowed is want, flow
        assert tables.lookup(flow).allowed is want, flow
        verdicts.add(want)
    assert verdicts == {True, False}


def test_open_networks_cost_nothing() -> None:
    """Without a network that is not open the policies are the very same."""
    written = read([("p.yaml", POLICIES)]).policy_set
    assert with_isolation(written, snapshot()) is written
    assert with_isolation(written, snapshot(dict.fromkeys(HOMES, FREE))) is written


def test_a_ports_own_labels_forge_nothing() -> None:
    """Labels under the reserved prefix are lost, whatever gave them to the port."""
    forged = Endpoint(
        name="z",
        namespace="x",
        labels=workload_labels({"pw:tenant:blue": "", "pw:port": "", "a": "b"}, "x", {}),
        addresses=("10.2.0.9",),
    )
    labels = labelled(forged, {"10.2.0.9": RED}).labels
    assert {key for key in labels if key.startswith("pw:")} == {"pw:port", "pw:strict:red"}
    assert labels["a"] == "b"


def test_why_names_the_network_and_mends() -> None:
    """A denied flow is told by the network's name and isolation, and what is proposed lets it pass."""
    world = snapshot(HOMES)
    policies = with_isolation(PolicySet(), world)
    for source, destination, said in (
        ("10.1.0.1", "10.1.0.3", "egress of x/a: DENY by network blue: isolation tenant of x\n"),
        ("fd00:1::1", "fd00:1::3", "ingress of y/c: DENY by network blue: isolation tenant of y\n"),
        ("10.3.0.6", "10.2.0.5", "ingress of x/e: DENY by network red: isolation strict\n"),
        ("192.0.2.1", "10.2.0.8", "DENY by network red: isolation strict for 10.2.0.8\n"),
    ):
        flow = Flow(source=source, destination=destination, protocol=TCP, source_port=50_000, port=80)
        told = explain(policies, world, flow)
        assert said in str(told)
        assert told.mends
        assert "apply a NetworkPolicy of namespace" in str(told)


@pytest.mark.parametrize("text", ["", POLICIES], ids=["no policies", "policies"])
def test_every_deny_can_be_mended(text: str) -> None:
    """For each pair that may not talk there is a change after which it may (explain has tried it)."""
    world = snapshot(HOMES)
    policies = with_isolation(read([("p.yaml", text)]).policy_set, world)
    engine = Engine(policies, world)
    denied = [told for flow in flows() if not (told := explained(engine, policies, flow)).allowed]
    assert len(denied) > 50
    assert [told.flow for told in denied if not told.mends] == []


def test_tenants_cost_a_few_cells_each() -> None:
    """The tables grow with the tenants, not with their square."""
    pods = [
        Endpoint(
            name=f"p{number}",
            namespace=f"n{number}",
            labels=workload_labels({}, f"n{number}", {}),
            addresses=(f"10.0.{number >> 8}.{number & 255}",),
        )
        for number in range(300)
    ]
    world = Snapshot(endpoints=tuple(labelled(pod, {pod.addresses[0]: BLUE}) for pod in pods))
    size = compile_policies(with_isolation(PolicySet(), world), world).size
    assert size.cells <= 4 * 300
