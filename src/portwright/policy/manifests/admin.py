"""The admin tiers: ClusterNetworkPolicy v1alpha2, (Baseline)AdminNetworkPolicy v1alpha1.

Group policy.networking.k8s.io (reference/policy.md, 1.3; kubernetes-sigs/network-policy-api, ``apis``).
Within a tier the lower priority decides first. A field or peer that is unknown is refused at apply: a person
is there to mend it, where a controller could only fail closed.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from portwright.model.errors import InvalidInput
from portwright.policy.labels import NAMESPACE_PREFIX, Expr, both
from portwright.policy.manifests.cluster import WORKLOADS
from portwright.policy.manifests.convert import Context, Converted, on_change
from portwright.policy.manifests.documents import Document, dotted
from portwright.policy.manifests.fields import (
    PROTOCOLS,
    Field,
    label_selector,
    network,
    port_name,
    port_number,
    port_range,
    spec_of,
)
from portwright.policy.rules import ADMIN, BASELINE, Action, Peer, Policy, PortRange, Rule, Tier, Traffic

GROUP: Final = "policy.networking.k8s.io"
#: BaselineAdminNetworkPolicy has no priority: it follows every ClusterNetworkPolicy of its tier (0 to 1000).
BASELINE_ORDER: Final = 1_001.0
MAX_PRIORITY: Final = 1_000
_MAX_NETWORKS = 25
_MAX_NAME = 100
_MAX_DOMAIN = 253
_DOMAIN = re.compile(
    r"(?:\*\.)?(?:[A-Za-z0-9](?:[-A-Za-z0-9_]{0,61}[A-Za-z0-9])?\.)+"
    r"[A-Za-z0-9](?:[-A-Za-z0-9_]{0,61}[A-Za-z0-9])?\.?",
    re.ASCII,
)


class _Kind(msgspec.Struct, frozen=True):
    """What one kind calls things, and how many it allows."""

    name: str
    actions: dict[str, Action]
    ports: str
    most: int
    egress_peers: tuple[str, ...] = ("namespaces", "pods", "nodes", "networks", "domainNames")


_ADMIN_ACTIONS = {"Allow": Action.ALLOW, "Deny": Action.DENY, "Pass": Action.PASS}
_CLUSTER = _Kind(
    "ClusterNetworkPolicy",
    {"Accept": Action.ALLOW, "Deny": Action.DENY, "Pass": Action.PASS},
    "protocols",
    25,
)
_ADMIN = _Kind("AdminNetworkPolicy", _ADMIN_ACTIONS, "ports", 100)
_BASELINE = _Kind(
    "BaselineAdminNetworkPolicy",
    {"Allow": Action.ALLOW, "Deny": Action.DENY},
    "ports",
    100,
    ("namespaces", "pods", "nodes", "networks"),
)


def cluster_network_policy(document: Document, _context: Context) -> Converted:
    """A ClusterNetworkPolicy v1alpha2 of either tier."""
    _cluster_wide(document)
    spec = spec_of(document, "tier", "priority", "subject", "ingress", "egress")
    tier = {"Admin": ADMIN, "Baseline": BASELINE}[spec.need("tier").choice("Admin", "Baseline")]
    return _policy(document, spec, _CLUSTER, tier, _priority(spec))


def admin_network_policy(document: Document, _context: Context) -> Converted:
    """An AdminNetworkPolicy v1alpha1."""
    _cluster_wide(document)
    spec = spec_of(document, "priority", "subject", "ingress", "egress")
    return _policy(document, spec, _ADMIN, ADMIN, _priority(spec))


def baseline_admin_network_policy(document: Document, _context: Context) -> Converted:
    """The BaselineAdminNetworkPolicy v1alpha1, of which there is one."""
    _cluster_wide(document)
    if document.name != "default":
        raise InvalidInput("metadata.name", document.name, "the one of this kind is called default")
    spec = spec_of(document, "subject", "ingress", "egress")
    return _policy(document, spec, _BASELINE, BASELINE, BASELINE_ORDER)


def _cluster_wide(document: Document) -> None:
    if document.namespace:
        raise InvalidInput(
            "metadata.namespace", document.namespace, f"a {document.kind} has no namespace; leave it out"
        )


def _priority(spec: Field) -> float:
    return float(spec.need("priority").integer(0, MAX_PRIORITY))


def _policy(document: Document, spec: Field, kind: _Kind, tier: Tier, order: float) -> Converted:
    subject = spec.need("subject").one_of("namespaces", "pods")
    ingress, egress = spec.get("ingress"), spec.get("egress")
    incoming = [_rule(item, "from", kind) for item in ingress.items(kind.most)] if ingress else []
    outgoing = [_rule(item, "to", kind) for item in egress.items(kind.most)] if egress else []
    policy = Policy(
        kind=kind.name,
        name=document.name,
        tier=tier.name,
        order=order,
        subject=both(WORKLOADS, _pods(subject)),
        # Without a rule it has no say in the direction; there is no implied isolation.
        ingress=tuple(incoming) or None,
        egress=tuple(outgoing) or None,
        on_change=on_change(document),
        where=document.where(()),
    )
    return Converted(policies=(policy,))


def _pods(field: Field) -> Expr:
    """Either form of choosing pods: by their namespace, or by namespace and pod."""
    if field.path[-1] == "namespaces":
        return label_selector(field, NAMESPACE_PREFIX)
    field.only("namespaceSelector", "podSelector")
    namespaces = field.get("namespaceSelector")
    pods = label_selector(field.need("podSelector", "required; {} is all pods of those namespaces"))
    return both(*([label_selector(namespaces, NAMESPACE_PREFIX)] if namespaces else []), pods)


def _rule(field: Field, side: str, kind: _Kind) -> Rule:
    field.only("name", "action", side, kind.ports)
    name = field.get("name")
    if name is not None and len(name.text()) > _MAX_NAME:
        raise name.refuse(f"a rule's name has at most {_MAX_NAME} characters")
    action = kind.actions[field.need("action").choice(*kind.actions)]
    several = field.need(side, "required, one peer at least; anywhere is networks: ['0.0.0.0/0', '::/0']")
    peers = [_peer(item, side, kind, action) for item in several.items(kind.most, least=1)]
    ports = field.get(kind.ports)
    traffic: list[Traffic] = []
    for item in ports.items(kind.most, least=1) if ports else []:
        traffic += _protocol(item) if kind is _CLUSTER else _port(item)
    if any(part.names for part in traffic) and any(peer.selector is None for peer in peers):
        raise InvalidInput(
            dotted((*field.path, kind.ports)),
            "a named port",
            "networks, nodes and domainNames have no named ports; make it a rule of its own, or give numbers",
        )
    return Rule(
        action=action,
        peers=tuple(peers),
        traffic=tuple(traffic) if ports else None,
        name=name.text() if name else "",
        where=field.where,
    )


def _peer(field: Field, side: str, kind: _Kind, action: Action) -> Peer:
    chosen = field.one_of(*(kind.egress_peers if side == "to" else ("namespaces", "pods")))
    match chosen.path[-1]:
        case "nodes":
            return Peer(nodes=label_selector(chosen))
        case "networks":
            nets = [network(item) for item in chosen.items(_MAX_NETWORKS, least=1)]
            return Peer(nets=tuple(dict.fromkeys(nets)))
        case "domainNames":
            if action is not Action.ALLOW:
                raise chosen.refuse("domain names are for rules that accept; deny the rest after them")
            names = [_domain(item) for item in chosen.items(_MAX_NETWORKS, least=1)]
            return Peer(domains=tuple(dict.fromkeys(names)))
        case _:
            return Peer(selector=both(WORKLOADS, _pods(chosen) if kind is _CLUSTER else _old_pods(chosen)))


def _old_pods(field: Field) -> Expr:
    """A peer of v1alpha1, whose first releases (to v0.1.1) had one layer more around the namespaces."""
    if field.path[-1] == "namespaces":
        return _old_namespaces(field)
    wrapped = field.get("namespaces")
    if wrapped is None:
        return _pods(field)
    pods = label_selector(field.only("namespaces", "podSelector").need("podSelector"))
    return both(_old_namespaces(wrapped), pods)


def _old_namespaces(field: Field) -> Expr:
    for name in ("sameLabels", "notSameLabels"):
        if (found := field.get(name)) is not None:
            raise found.refuse(f"{name} left the API in v0.1.2: write a policy for each value of the label")
    inner = field.get("namespaceSelector")
    if inner is None:
        return label_selector(field, NAMESPACE_PREFIX)
    field.only("namespaceSelector")
    return label_selector(inner, NAMESPACE_PREFIX)


def _domain(field: Field) -> str:
    """A domain name in lower case without the root's dot, ``*.`` only as its first label."""
    text = field.text()
    if len(text) > _MAX_DOMAIN or not _DOMAIN.fullmatch(text):
        raise field.refuse(
            "a domain name is needed here, like example.com or *.example.com (all below it, not itself)"
        )
    return text.lower().removesuffix(".")


def _protocol(field: Field) -> list[Traffic]:
    """One item of ``protocols``, v1alpha2."""
    chosen = field.one_of("tcp", "udp", "sctp", "destinationNamedPort")
    if chosen.path[-1] == "destinationNamedPort":
        return _named(chosen)
    port = chosen.only("destinationPort").need(
        "destinationPort", "required; all ports are range: {start: 1, end: 65535}"
    )
    given = port.one_of("number", "range")
    if given.path[-1] == "number":
        first = port_number(given)
        ports = PortRange(first, first)
    else:
        given.only("start", "end")
        ports = port_range(given.need("start"), given.need("end"), least=1)
    return [Traffic(protocol=PROTOCOLS[str(chosen.path[-1]).upper()], ports=(ports,))]


def _port(field: Field) -> list[Traffic]:
    """One item of ``ports``, v1alpha1."""
    chosen = field.one_of("portNumber", "portRange", "namedPort")
    if chosen.path[-1] == "namedPort":
        return _named(chosen)
    number = chosen.path[-1] == "portNumber"
    chosen.only("protocol", *(("port",) if number else ("start", "end")))
    protocol = chosen.get("protocol")
    if number:
        first = port_number(chosen.need("port"))
        ports = PortRange(first, first)
    else:
        ports = port_range(chosen.need("start"), chosen.need("end"), least=1)
    return [Traffic(protocol=PROTOCOLS[protocol.choice(*PROTOCOLS) if protocol else "TCP"], ports=(ports,))]


def _named(field: Field) -> list[Traffic]:
    """A name is the destination's, whichever protocol its port has."""
    name = port_name(field)
    return [Traffic(protocol=protocol, names=(name,)) for protocol in PROTOCOLS.values()]


KINDS = {
    (f"{GROUP}/v1alpha2", _CLUSTER.name): cluster_network_policy,
    (f"{GROUP}/v1alpha1", _ADMIN.name): admin_network_policy,
    (f"{GROUP}/v1alpha1", _BASELINE.name): baseline_admin_network_policy,
}
