"""Kubernetes' NetworkPolicy, networking.k8s.io/v1, to rules that allow (reference/policy.md, 1.1 and 1.2).

The forms that are easily confused, and what they become here:

- ``ingress`` absent, null or ``[]``: no rule. That isolates where ``policyTypes`` holds the direction.
- a rule ``{}``, or its ``from`` absent, null or ``[]``: ``peers=None``, anybody. ``ports`` likewise:
  ``traffic=None``, all of it.
- ``policyTypes`` absent, null or ``[]``: Ingress, and Egress if there is an egress rule.
- ``namespaceSelector`` and ``podSelector`` in one item are ANDed, in two they are two peers.
"""

from __future__ import annotations

import ipaddress

from portwright.policy.labels import NAMESPACE_NAME, NAMESPACE_PREFIX, Expr, In, both
from portwright.policy.manifests.cluster import WORKLOADS
from portwright.policy.manifests.convert import Context, Converted, on_change
from portwright.policy.manifests.documents import Document
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
from portwright.policy.rules import (
    DEFAULT,
    KUBERNETES_ORDER,
    Action,
    Peer,
    Policy,
    PortRange,
    Rule,
    Traffic,
)

KIND = "NetworkPolicy"
API_VERSION = "networking.k8s.io/v1"


def network_policy(document: Document, context: Context) -> Converted:
    """One NetworkPolicy. Raises InvalidInput for what the API server would refuse, and unknown fields."""
    spec = spec_of(document, "podSelector", "policyTypes", "ingress", "egress")
    namespace = context.namespace_of(document)
    selector = spec.get("podSelector")
    ingress, egress = spec.get("ingress"), spec.get("egress")
    incoming = [_rule(rule, "from", namespace) for rule in ingress.items()] if ingress else []
    outgoing = [_rule(rule, "to", namespace) for rule in egress.items()] if egress else []
    types = _types(spec.get("policyTypes"), bool(outgoing))
    policy = Policy(
        kind=KIND,
        name=document.name,
        namespace=namespace,
        tier=DEFAULT.name,
        order=KUBERNETES_ORDER,
        subject=both(in_namespace(namespace), *([label_selector(selector)] if selector else [])),
        ingress=tuple(incoming) if "Ingress" in types else None,
        egress=tuple(outgoing) if "Egress" in types else None,
        on_change=on_change(document),
        where=document.where(()),
    )
    return Converted(policies=(policy,))


def in_namespace(name: str) -> Expr:
    """True of what is in that namespace."""
    return In(NAMESPACE_PREFIX + NAMESPACE_NAME, frozenset({name}))


def _types(field: Field | None, has_egress: bool) -> frozenset[str]:
    given = field.items() if field is not None else []
    if given:
        return frozenset(item.choice("Ingress", "Egress") for item in given)
    return frozenset({"Ingress", "Egress"} if has_egress else {"Ingress"})


def _rule(field: Field, side: str, namespace: str) -> Rule:
    field.only(side, "ports")
    peers, ports = field.get(side), field.get("ports")
    return Rule(
        action=Action.ALLOW,
        peers=tuple(_peer(item, namespace) for item in peers.items()) or None if peers else None,
        traffic=tuple(_traffic(item) for item in ports.items()) or None if ports else None,
        where=field.where,
    )


def _peer(field: Field, namespace: str) -> Peer:
    field.only("podSelector", "namespaceSelector", "ipBlock")
    pods, namespaces, block = (field.get(name) for name in ("podSelector", "namespaceSelector", "ipBlock"))
    if block is not None:
        if pods is not None or namespaces is not None:
            raise field.refuse("ipBlock stands alone; write the selectors as a peer of their own")
        return _block(block)
    if pods is None and namespaces is None:
        raise field.refuse(
            "a peer needs podSelector, namespaceSelector or ipBlock; anybody is no `from`/`to`"
        )
    where = (
        label_selector(namespaces, NAMESPACE_PREFIX) if namespaces is not None else in_namespace(namespace)
    )
    return Peer(selector=both(WORKLOADS, where, *([label_selector(pods)] if pods is not None else [])))


def _block(field: Field) -> Peer:
    field.only("cidr", "except")
    cidr = network(field.need("cidr"))
    whole = ipaddress.ip_network(cidr)
    without: list[str] = []
    excepted = field.get("except")
    for item in excepted.items() if excepted else []:
        hole = ipaddress.ip_network(network(item))
        inside = (
            hole.version == whole.version
            and hole.prefixlen > whole.prefixlen
            and (hole.supernet(new_prefix=whole.prefixlen) == whole)
        )
        if not inside:
            raise item.refuse(f"what is excepted lies inside {cidr} and is smaller")
        without.append(str(hole))
    return Peer(nets=(cidr,), not_nets=tuple(without))


def _traffic(field: Field) -> Traffic:
    field.only("protocol", "port", "endPort")
    protocol, port, end = field.get("protocol"), field.get("port"), field.get("endPort")
    number = PROTOCOLS[protocol.choice(*PROTOCOLS) if protocol is not None else "TCP"]
    if port is None:
        if end is not None:
            raise end.refuse("endPort needs a numeric port beside it")
        return Traffic(protocol=number)
    if isinstance(port.value, str):
        if end is not None:
            raise end.refuse("endPort needs a numeric port beside it; a name is one port")
        return Traffic(protocol=number, names=(port_name(port),))
    if end is not None:
        return Traffic(protocol=number, ports=(port_range(port, end, least=0),))
    first = port_number(port)
    return Traffic(protocol=number, ports=(PortRange(first, first),))


KINDS = {(API_VERSION, KIND): network_policy}
