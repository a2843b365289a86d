"""The matrix of manifests: which cells there are, and by which addresses they are judged."""

from __future__ import annotations

import ipaddress

from portwright.policy.manifests.read import read
from portwright.policy.matrix import addressed, matrix, pods_of, questions
from portwright.policy.rules import SCTP, TCP, UDP

PODS = """
apiVersion: v1
kind: Pod
metadata: {name: both, namespace: b}
spec:
  containers:
  - name: c
    ports: [{containerPort: 80}, {name: http, containerPort: 80}, {containerPort: 53, protocol: UDP},
      {name: sig, containerPort: 9, protocol: SCTP}]
status: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: six, namespace: a}
spec: {containers: [{name: c, ports: [{containerPort: 8080}]}]}
status: {podIP: "fd00::2"}
---
apiVersion: v1
kind: Pod
metadata: {name: four, namespace: a}
status: {podIP: 10.0.0.3}
---
apiVersion: v1
kind: Pod
metadata: {name: nowhere, namespace: a}
---
apiVersion: v1
kind: Pod
metadata: {name: node, namespace: a}
spec: {hostNetwork: true, containers: [{name: c, ports: [{containerPort: 22}]}]}
status: {podIP: 192.0.2.1}
"""


def test_a_cell_for_each_declared_port_and_sender() -> None:
    """Every port that containers declare has its cells, with a name or without, once each, in order of
    receiver, protocol and port, then sender; a pod on its node's address has none, nor have two pods without
    a common family."""
    manifests = read([("pods.yaml", PODS)])
    cells = matrix(manifests.policy_set, manifests.snapshot)
    asked = list(questions(addressed(manifests.snapshot)))

    senders = ["a/four", "a/nowhere", "a/six", "b/both"]
    assert [(c.source, c.target, c.protocol, c.port) for c in cells] == [
        *((s, "a/six", "TCP", 8080) for s in senders if s != "a/four"),
        *((s, "b/both", p, n) for p, n in (("TCP", 80), ("UDP", 53), ("SCTP", 9)) for s in senders),
    ]
    assert all(cell.allowed for cell in cells)
    assert [(s.title, t.title, f.port) for s, t, f in asked] == [(c.source, c.target, c.port) for c in cells]
    assert {flow.protocol for _, _, flow in asked} == {TCP, UDP, SCTP}


def test_both_ends_are_of_one_family() -> None:
    """A cell is of addresses of its two pods, IPv4 where both have it."""
    for source, target, flow in questions(addressed(read([("pods.yaml", PODS)]).snapshot)):
        near, far = ipaddress.ip_address(flow.source), ipaddress.ip_address(flow.destination)
        assert flow.source in source.addresses
        assert flow.destination in target.addresses
        common = {ipaddress.ip_address(a).version for a in source.addresses} & {
            ipaddress.ip_address(a).version for a in target.addresses
        }
        assert near.version == far.version == min(common)


def test_a_pod_without_an_address_has_one_of_each_family() -> None:
    """It is nobody else's, and the same each time."""
    snapshot = read([("pods.yaml", PODS)]).snapshot
    world = addressed(snapshot)
    nowhere = next(pod for pod in pods_of(world) if pod.name == "nowhere")

    assert sorted(ipaddress.ip_address(a).version for a in nowhere.addresses) == [4, 6]
    assert sum(a in pod.addresses for pod in world.endpoints for a in nowhere.addresses) == 2
    assert addressed(snapshot) == world
