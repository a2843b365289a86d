"""Ports as endpoints: whose labels and addresses they have, and what a port's own labels can't say."""

from __future__ import annotations

from itertools import permutations

import pytest

from portwright.node.endpoints import identity, snapshot_of
from portwright.policy.manifests.read import read
from portwright.policy.rules import EndpointKind
from tests.fix_ports import port

NAMESPACE, NAME = "io.kubernetes.pod.namespace", "io.kubernetes.pod.name"
NAMESPACES = """
apiVersion: v1
kind: Namespace
metadata: {name: x, labels: {team: a}}
"""
OTHERS = """
apiVersion: projectcalico.org/v3
kind: NetworkSet
metadata: {name: p, namespace: x}
spec: {nets: [192.0.2.0/24]}
---
apiVersion: v1
kind: Node
metadata: {name: p}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: h, namespace: x}
spec: {hostNetwork: true, containers: []}
status: {podIP: 192.0.2.1}
---
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: x, labels: {app: lent}}
spec: {containers: [{ports: [{name: http, containerPort: 80}]}]}
"""


def test_reserved_keys_are_lost() -> None:
    """What policy knows an endpoint's namespace, account, network and interface by is in no port's hand."""
    mine = {"app": "web", "a/b": "c"}
    forged = {
        "ns:team": "b",
        "sa:role": "admin",
        "pw:strict:n1": "no address",
        "host:node": "n",
        ":": "",
        "projectcalico.org/namespace": "y",
        "projectcalico.org/serviceaccount": "admin",
        "projectcalico.org/orchestrator": "none",
    }
    manifests = read([("n.yaml", NAMESPACES)])
    honest, forger = (
        snapshot_of(manifests, [port(1, {NAMESPACE: "x", **labels})]).endpoints[0].labels
        for labels in (mine, mine | forged)
    )
    assert forger == honest
    assert forger["ns:team"] == "a"
    assert mine.items() <= forger.items()


@pytest.mark.parametrize("labels", [{}, {NAMESPACE: ""}, {NAMESPACE: "default", NAME: ""}])
def test_without_a_word_it_is_of_the_default_namespace(labels: dict[str, str]) -> None:
    """An empty word is none."""
    assert identity(port(1, labels)) == ("default", "port-1")


def test_the_ports_of_a_pod_are_one_endpoint() -> None:
    """Whatever their numbers: all addresses, all labels, and of two values the older port's."""
    who = {NAMESPACE: "x", NAME: "p"}
    own: list[dict[str, str]] = [{"app": "web", "a": ""}, {"app": "db", "b": ""}, {"app": "x", "c": ""}]
    for numbers in permutations((1, 2, 3)):
        ports = [
            port(n, who | labels, created=age)
            for age, (n, labels) in enumerate(zip(numbers, own, strict=True))
        ]
        (endpoint,) = snapshot_of(read([]), sorted(ports, key=lambda p: p.port_id)).endpoints
        assert endpoint.title == "x/p"
        assert len(endpoint.addresses) == 6
        assert {key: endpoint.labels.get(key) for key in ("app", "a", "b", "c")} == {
            "app": "web",
            "a": "",
            "b": "",
            "c": "",
        }


def test_a_pods_manifest_lends_and_nothing_else_does() -> None:
    """The Pod of a port's name lends it labels and named ports; what else has the name stays beside it."""
    manifests = read([("n.yaml", NAMESPACES), ("o.yaml", OTHERS)])
    ports = [port(1, {NAMESPACE: "x", NAME: "p", "app": "own"}), port(2, {NAMESPACE: "x", NAME: "h"})]
    found = snapshot_of(manifests, ports).endpoints
    lent = next(e for e in found if "10.0.0.1" in e.addresses)
    assert (lent.title, lent.labels["app"], len(lent.named_ports)) == ("x/p", "lent", 1)
    assert sorted((e.kind, e.title, e.host_network) for e in found if e is not lent) == sorted(
        [
            (EndpointKind.NETWORK_SET, "x/p", False),
            (EndpointKind.NODE, "p", False),
            (EndpointKind.WORKLOAD, "x/h", False),
            (EndpointKind.WORKLOAD, "x/h", True),
        ]
    )
