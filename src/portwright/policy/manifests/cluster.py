"""Namespaces, service accounts, pods and nodes: whom policies select, and their effective labels.

These are objects that users have from clusters, with many fields of no concern here, so unknown fields are
accepted; those of concern are read strictly.
"""

from __future__ import annotations

from typing import Final

import msgspec

from portwright.policy.labels import NAMESPACE_NAME, NAMESPACE_PREFIX, SERVICE_ACCOUNT_PREFIX, In, Labels
from portwright.policy.manifests.documents import Document
from portwright.policy.manifests.fields import (
    PROTOCOLS,
    Field,
    address,
    metadata_labels,
    port_name,
    port_number,
    root,
)
from portwright.policy.rules import Endpoint, EndpointKind, NamedPort

#: What Calico says of every workload, under its own keys.
CALICO_NAMESPACE: Final = "projectcalico.org/namespace"
CALICO_ORCHESTRATOR: Final = "projectcalico.org/orchestrator"
CALICO_SERVICE_ACCOUNT: Final = "projectcalico.org/serviceaccount"
#: And of namespaces and service accounts: their names.
CALICO_NAME: Final = "projectcalico.org/name"

#: True of workloads and of nothing else: not of a namespaced network set, nor of a host's interface.
WORKLOADS: Final = In(CALICO_ORCHESTRATOR, frozenset({"k8s"}))

#: A pod that names none runs under this one.
DEFAULT_SERVICE_ACCOUNT: Final = "default"


class Cluster(msgspec.Struct, frozen=True):
    """What pods are seen against: labels of namespaces by name, of service accounts by (namespace, name)."""

    namespaces: dict[str, dict[str, str]]
    service_accounts: dict[tuple[str, str], dict[str, str]]
    default_namespace: str = "default"


def workload_labels(
    labels: Labels,
    namespace: str,
    namespace_labels: Labels,
    service_account: str = "",
    sa_labels: Labels | None = None,
) -> dict[str, str]:
    """The effective labels of a workload (see :mod:`portwright.policy.labels`).

    What is implied cannot be claimed: a workload's own labels under the implied keys are lost, and all with a
    colon, which no manifest has, but a port may have.
    """
    found = {key: value for key, value in labels.items() if ":" not in key and key != CALICO_SERVICE_ACCOUNT}
    found |= {CALICO_NAMESPACE: namespace, CALICO_ORCHESTRATOR: "k8s"}
    of_namespace = {**namespace_labels, NAMESPACE_NAME: namespace, CALICO_NAME: namespace}
    found |= _under(NAMESPACE_PREFIX, of_namespace)
    if service_account:
        found[CALICO_SERVICE_ACCOUNT] = service_account
        found |= _under(SERVICE_ACCOUNT_PREFIX, {**(sa_labels or {}), CALICO_NAME: service_account})
    return found


def _under(prefix: str, labels: Labels) -> dict[str, str]:
    return {prefix + key: value for key, value in labels.items()}


def namespace_labels(document: Document) -> dict[str, str]:
    """A Namespace's labels, with the one that carries its name."""
    found = metadata_labels(document)
    if found.get(NAMESPACE_NAME, document.name) != document.name:
        field = root(document).need("metadata").need("labels").need(NAMESPACE_NAME)
        raise field.refuse(f"this label is always the namespace's name, {document.name}; leave it out")
    return {**found, NAMESPACE_NAME: document.name}


def pod(document: Document, cluster: Cluster) -> Endpoint:
    """A Pod's endpoint. One that has ended has no address: its node may have given it to another."""
    whole = root(document)
    namespace = document.namespace or cluster.default_namespace
    spec = whole.get("spec") or Field(document, ("spec",), {})
    account = spec.get("serviceAccountName") or spec.get("serviceAccount")
    service_account = account.text() if account else DEFAULT_SERVICE_ACCOUNT
    host_network = spec.get("hostNetwork")
    named, unnamed = _container_ports(spec)
    return Endpoint(
        name=document.name,
        namespace=namespace,
        labels=workload_labels(
            metadata_labels(document),
            namespace,
            cluster.namespaces.get(namespace, {}),
            service_account,
            cluster.service_accounts.get((namespace, service_account)),
        ),
        addresses=_pod_addresses(whole.get("status")),
        named_ports=named,
        unnamed_ports=unnamed,
        host_network=host_network.boolean() if host_network else False,
    )


def _pod_addresses(status: Field | None) -> tuple[str, ...]:
    if status is None:
        return ()
    phase = status.get("phase")
    if phase is not None and phase.text() in {"Succeeded", "Failed"}:
        return ()
    found = [field] if (field := status.get("podIP")) is not None and field.value != "" else []
    several = status.get("podIPs")
    found += [item.need("ip") for item in several.items()] if several else []
    return tuple(dict.fromkeys(address(field) for field in found))


def _container_ports(spec: Field) -> tuple[tuple[NamedPort, ...], tuple[tuple[int, int], ...]]:
    """With and without a name: of its containers, and of those init containers that stay (sidecars)."""
    several = spec.get("containers")
    containers = several.items() if several else []
    first = spec.get("initContainers")
    for container in first.items() if first else []:
        policy = container.get("restartPolicy")
        if policy is not None and policy.value == "Always":
            containers.append(container)
    found: list[NamedPort] = []
    unnamed: list[tuple[int, int]] = []
    for container in containers:
        ports = container.get("ports")
        for port in ports.items() if ports else []:
            number = port_number(port.need("containerPort"))
            name, protocol = port.get("name"), port.get("protocol")
            kind = PROTOCOLS[protocol.choice(*PROTOCOLS) if protocol else "TCP"]
            if name is not None and name.value != "":
                found.append(NamedPort(port_name(name), kind, number))
            else:
                unnamed.append((kind, number))
    return tuple(dict.fromkeys(found)), tuple(dict.fromkeys(unnamed))


def node(document: Document) -> Endpoint:
    """A Node's endpoint: its addresses of the kinds InternalIP and ExternalIP, and its own labels."""
    status = root(document).get("status")
    several = status.get("addresses") if status else None
    found: list[str] = []
    for item in several.items() if several else []:
        if item.need("type").text() in {"InternalIP", "ExternalIP"}:
            found.append(address(item.need("address")))
    return Endpoint(
        name=document.name,
        kind=EndpointKind.NODE,
        labels=metadata_labels(document),
        addresses=tuple(dict.fromkeys(found)),
    )
