"""Calico's network sets and host endpoints: what policies select and peers are made of, beside workloads.

A host endpoint's interface and node stand in its labels under ``host:``, which no selector can name and no
manifest can claim (a colon is no part of a label's name).
"""

from __future__ import annotations

import ipaddress
from typing import Final

from portwright.policy import selector as selectors
from portwright.policy.labels import NAMESPACE_NAME, NAMESPACE_PREFIX
from portwright.policy.manifests.calico_rules import no_namespace, protocol_number, text
from portwright.policy.manifests.cluster import CALICO_NAMESPACE
from portwright.policy.manifests.convert import Context, Converted
from portwright.policy.manifests.documents import Document
from portwright.policy.manifests.fields import (
    Field,
    address,
    metadata_labels,
    network,
    port_number,
    root,
    spec_of,
)
from portwright.policy.rules import PORT_PROTOCOLS, Endpoint, EndpointKind, NamedPort

#: Where a host endpoint's interface ("eth0"; "*": all of the host's) and its node stand in its labels.
HOST_INTERFACE: Final = "host:interface"
HOST_NODE: Final = "host:node"

#: Nets of one set. Calico states no bound.
MAX_SET: Final = 100_000


def network_set(document: Document, context: Context) -> Converted:
    """A NetworkSet: nets with labels of their own and of their namespace."""
    namespace = context.namespace_of(document)
    of_namespace = {**context.namespace_labels, NAMESPACE_NAME: namespace}
    labels = {
        **_labels(document),
        CALICO_NAMESPACE: namespace,
        **{NAMESPACE_PREFIX + key: value for key, value in of_namespace.items()},
    }
    return Converted(endpoints=(_set(document, namespace, labels),))


def global_network_set(document: Document, context: Context) -> Converted:
    """A GlobalNetworkSet: nets with labels, in no namespace."""
    del context
    no_namespace(document)
    return Converted(endpoints=(_set(document, "", _labels(document)),))


def host_endpoint(document: Document, context: Context) -> Converted:
    """A HostEndpoint: an interface of a host, or all of them, or whichever has one of the addresses."""
    del context
    no_namespace(document)
    spec = spec_of(document, "node", "interfaceName", "expectedIPs", "profiles", "ports")
    profiles = spec.get("profiles")
    if profiles is not None and profiles.items():
        raise profiles.refuse("profiles are not read: write their rules as a GlobalNetworkPolicy")
    node, interface = spec.need("node", "the host's name is required").text(), text(spec, "interfaceName")
    expected = spec.get("expectedIPs")
    addresses = (
        tuple(dict.fromkeys(address(item) for item in expected.items())) if expected is not None else ()
    )
    if not node:
        raise spec.need("node").refuse("the host's name is required")
    if len(interface) > 15:
        raise spec.need("interfaceName").refuse("an interface's name has at most 15 characters")
    if not interface and not addresses:
        raise spec.refuse("interfaceName or expectedIPs is needed: which interface is it?")
    ports = spec.get("ports")
    endpoint = Endpoint(
        name=document.name,
        kind=EndpointKind.HOST,
        labels={**_labels(document), HOST_NODE: node, **({HOST_INTERFACE: interface} if interface else {})},
        addresses=addresses,
        named_ports=tuple(_port(item) for item in ports.items()) if ports is not None else (),
    )
    return Converted(endpoints=(endpoint,))


def _labels(document: Document) -> dict[str, str]:
    """Its own labels. Raises for one that says what only a workload or its namespace can be."""
    labels = metadata_labels(document)
    for key in (
        selectors.CALICO_NAMESPACE,
        selectors.CALICO_SERVICE_ACCOUNT,
        "projectcalico.org/orchestrator",
    ):
        if key in labels:
            field = root(document).need("metadata").need("labels").need(key)
            raise field.refuse("this label is Calico's own, set by what an endpoint is: leave it out")
    return labels


def _set(document: Document, namespace: str, labels: dict[str, str]) -> Endpoint:
    spec = spec_of(document, "nets", "allowedEgressDomains")
    domains = spec.get("allowedEgressDomains")
    if domains is not None:
        raise domains.refuse("name them in an egress rule's destination.domains; a set has nets only")
    nets = spec.get("nets")
    return Endpoint(
        name=document.name,
        namespace=namespace,
        kind=EndpointKind.NETWORK_SET,
        labels=labels,
        nets=tuple(dict.fromkeys(_net(item) for item in nets.items(MAX_SET))) if nets is not None else (),
    )


def _net(field: Field) -> str:
    """A net, or an address, which is a net of one."""
    given = field.text()
    if "/" in given:
        return network(field)
    return str(ipaddress.ip_network(address(field)))


def _port(field: Field) -> NamedPort:
    protocol = field.only("name", "protocol", "port").need("protocol")
    number = protocol_number(protocol)
    if number not in PORT_PROTOCOLS:
        raise protocol.refuse("a protocol that has ports is needed here: TCP, UDP or SCTP")
    name = field.need("name").text()
    if not name:
        raise field.need("name").refuse("a port's name is needed here")
    return NamedPort(name, number, port_number(field.need("port")))
