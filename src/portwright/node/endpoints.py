"""Whom policy is about: the ports that there are, as the endpoints that they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from portwright.model.network import Isolation
from portwright.model.port import Port
from portwright.policy.engine import selects
from portwright.policy.isolation import Home, labelled
from portwright.policy.lint import Lint
from portwright.policy.lints.chained import chained_ports
from portwright.policy.manifests.cluster import workload_labels
from portwright.policy.manifests.read import DEFAULT_NAMESPACE, Manifests
from portwright.policy.rules import Direction, Endpoint, EndpointKind, Snapshot

#: Labels that CNI's Kubernetes arguments become (docs/cni.md).
POD_NAME, POD_NAMESPACE = "io.kubernetes.pod.name", "io.kubernetes.pod.namespace"


def snapshot_of(
    manifests: Manifests, ports: Iterable[Port], isolating: Mapping[str, Isolation] | None = None
) -> Snapshot:
    """Whom there is: an endpoint for each pod or sandbox that has ports, and what else manifests describe.

    A Pod manifest of the name of one that has ports lends it its labels and named ports; the addresses are
    the ports'. Else it has the labels of all its ports, of two values of one key the older port's.
    ``isolating``: the networks that are not open.
    """
    described = {
        (e.namespace, e.name): e
        for e in manifests.snapshot.endpoints
        if e.kind is EndpointKind.WORKLOAD and not e.host_network
    }
    running: dict[tuple[str, str], Endpoint] = {}
    homes: dict[str, Home] = {}
    for port in sorted(ports, key=lambda port: (port.created, port.port_id)):
        if isolating:
            home = Home(port.network, isolating.get(port.network, "open"))
            homes |= {a.address: home for a in port.addresses}
        key = identity(port)
        known = described.get(key) or _endpoint(port, manifests)
        mine = tuple(a.address for a in port.addresses)
        labels = known.labels
        if key in running:
            mine = (*mine, *running[key].addresses)
            labels = {**labels, **running[key].labels}
        running[key] = msgspec.structs.replace(known, labels=labels, addresses=tuple(dict.fromkeys(mine)))
    if isolating:
        running = {key: labelled(endpoint, homes) for key, endpoint in running.items()}
    # A port stands for the pod of its name, for no network set, node or pod on its node's address.
    taken = {id(described[key]) for key in running.keys() & described.keys()}
    ours = {address for endpoint in running.values() for address in endpoint.addresses}
    rest = (_without(e, ours) for e in manifests.snapshot.endpoints if id(e) not in taken)
    return msgspec.structs.replace(manifests.snapshot, endpoints=(*running.values(), *rest))


def _without(endpoint: Endpoint, ours: set[str]) -> Endpoint:
    """A pod that is described, without addresses that ports have: its manifest is of another day."""
    if endpoint.kind is not EndpointKind.WORKLOAD or ours.isdisjoint(endpoint.addresses):
        return endpoint
    return msgspec.structs.replace(endpoint, addresses=tuple(a for a in endpoint.addresses if a not in ours))


def about(manifests: Manifests, port: Port) -> list[str]:
    """The policies that select a port, none that is staged, as ``KIND NAME``."""
    policies = [p for p in manifests.policy_set.policies if not p.staged]
    if not policies:
        return []
    ends = [e for e in snapshot_of(manifests, [port]).endpoints if (e.namespace, e.name) == identity(port)]
    return [
        f"{policy.kind} {policy.title}"
        for policy in policies
        if any(selects(policy, end, direction) for end in ends for direction in Direction)
    ]


def unheld(manifests: Manifests, chained: Iterable[Port]) -> tuple[Lint, ...]:
    """A finding for each policy that selects taps on other plugins' devices, which it can't hold."""
    found: dict[str, list[str]] = {}
    for port in chained:
        for title in about(manifests, port):
            found.setdefault(title, []).append("/".join(identity(port)))
    return tuple(chained_ports(title, pods) for title, pods in sorted(found.items()))


def identity(port: Port) -> tuple[str, str]:
    """(namespace, name) of the pod that a port belongs to, or of the port's owner."""
    name = port.labels.get(POD_NAME) or port.owner.name or port.owner.container_id
    return port.labels.get(POD_NAMESPACE) or DEFAULT_NAMESPACE, name


def _endpoint(port: Port, manifests: Manifests) -> Endpoint:
    namespace, name = identity(port)
    labels = workload_labels(port.labels, namespace, manifests.namespaces.get(namespace, {}))
    return Endpoint(name=name, namespace=namespace, labels=labels)
