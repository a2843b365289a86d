"""A rule for one flow in each kind's own words, to be pasted into a manifest.

The narrowest that the kind can say: a pod by its namespace and all its own labels that a manifest can name,
anything else by its address; the flow's own port. Kinds of Kubernetes know ports of TCP, UDP and SCTP only:
for ICMP and the like a rule has to allow all traffic of the peer, and :attr:`Snippet.says` tells so.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from portwright.policy.labels import NAMESPACE_NAME, NAMESPACE_PREFIX, In, both
from portwright.policy.lacks import PROTOCOL_NAMES, flow_text, label_text
from portwright.policy.manifests.fields import is_label_key, is_label_value
from portwright.policy.matching import World
from portwright.policy.rules import (
    ICMP,
    ICMP6,
    PORT_PROTOCOLS,
    Action,
    Direction,
    Flow,
    Peer,
    PortRange,
    Rule,
    Traffic,
)

_KUBERNETES = "NetworkPolicy"
_ADMIN = frozenset({"ClusterNetworkPolicy", "AdminNetworkPolicy", "BaselineAdminNetworkPolicy"})
_CALICO = frozenset({"CalicoNetworkPolicy", "GlobalNetworkPolicy"})
#: Labels under this prefix are implied of a workload, not its owner's to set.
IMPLIED = "projectcalico.org/"
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*", re.ASCII)
_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})


class Snippet(msgspec.Struct, frozen=True, kw_only=True):
    """``rule`` is what the reader makes of ``body``; ``body`` is None of a kind that has no manifest."""

    rule: Rule
    says: str
    body: dict[str, Any] | None


class _Who(msgspec.Struct, frozen=True):
    """A peer: a pod's namespace and labels, or a net."""

    namespace: str
    labels: dict[str, str]
    net: str = ""


def allowing(kind: str, direction: Direction, other: str, flow: Flow, world: World) -> Snippet:
    """A rule of a policy of ``kind`` that allows ``flow``; ``other`` is its peer's address."""
    who = _who(other, world)
    traffic = _traffic(kind, flow)
    what = flow_text(flow) if traffic is not None else f"all traffic (a {kind} cannot name {flow_text(flow)})"
    if traffic is not None and flow.port is not None and not traffic.ports:
        what = f"all of {PROTOCOL_NAMES[flow.protocol]} (a {kind} cannot name {flow_text(flow)})"
    word = "to" if direction is Direction.EGRESS else "from"
    return Snippet(
        rule=Rule(
            action=Action.ALLOW,
            peers=(_peer(who),),
            traffic=None if traffic is None else (traffic,),
        ),
        says=f"allow {word} {_said(who)}, {what}",
        body=_body(kind, direction, who, flow, traffic),
    )


def _who(address: str, world: World) -> _Who:
    """By labels such as manifests have: a port's may be any text, which a selector would take for its own."""
    net = _Who("", {}, f"{address}/{128 if ':' in address else 32}")
    endpoint = world.workload(address)
    namespace = endpoint.labels.get(NAMESPACE_PREFIX + NAMESPACE_NAME) if endpoint is not None else None
    if endpoint is None or not namespace or not is_label_value(namespace):
        return net
    all_own = {k: v for k, v in sorted(endpoint.labels.items()) if not k.startswith(IMPLIED) and ":" not in k}
    own = {key: value for key, value in all_own.items() if is_label_key(key) and is_label_value(value)}
    return _Who(namespace, own) if own or not all_own else net


def _peer(who: _Who) -> Peer:
    if who.net:
        return Peer(nets=(who.net,))
    terms = [In(NAMESPACE_PREFIX + NAMESPACE_NAME, frozenset({who.namespace}))]
    return Peer(selector=both(*terms, *(In(key, frozenset({value})) for key, value in who.labels.items())))


def _said(who: _Who) -> str:
    if who.net:
        return who.net
    shown = ", ".join(label_text(key, value) for key, value in who.labels.items())
    return f"{f'pods {shown}' if shown else 'all pods'} of namespace {who.namespace}"


def _traffic(kind: str, flow: Flow) -> Traffic | None:
    """As narrow as the kind can say it; None is all. No kind of Kubernetes can name port 0."""
    with_ports = flow.protocol in PORT_PROTOCOLS
    if with_ports and flow.port is not None and (flow.port > 0 or kind not in {_KUBERNETES, *_ADMIN}):
        return Traffic(protocol=flow.protocol, ports=(PortRange(flow.port, flow.port),))
    if kind in _ADMIN or (kind == _KUBERNETES and not with_ports):
        return None
    return Traffic(protocol=flow.protocol, icmp_type=flow.icmp_type, icmp_code=flow.icmp_code)


def _body(
    kind: str, direction: Direction, who: _Who, flow: Flow, traffic: Traffic | None
) -> dict[str, Any] | None:
    if kind in _CALICO:
        return _calico(direction, who, flow)
    side = "to" if direction is Direction.EGRESS else "from"
    name = PROTOCOL_NAMES.get(flow.protocol, "").upper()
    pods = {
        "namespaceSelector": {"matchLabels": {NAMESPACE_NAME: who.namespace}},
        "podSelector": {"matchLabels": who.labels} if who.labels else {},
    }
    port = traffic.ports[0].first if traffic is not None and traffic.ports else None
    if kind == _KUBERNETES:
        body: dict[str, Any] = {side: [{"ipBlock": {"cidr": who.net}} if who.net else pods]}
        if traffic is not None:
            body["ports"] = [{"protocol": name} if port is None else {"protocol": name, "port": port}]
        return body
    if kind not in _ADMIN:
        return None
    peer = {"networks": [who.net]} if who.net else {"pods": pods}
    cluster = kind == "ClusterNetworkPolicy"
    body = {"action": "Accept" if cluster else "Allow", side: [peer]}
    if port is not None and cluster:
        body["protocols"] = [{name.lower(): {"destinationPort": {"number": port}}}]
    elif port is not None:
        body["ports"] = [{"portNumber": {"protocol": name, "port": port}}]
    return body


def _calico(direction: Direction, who: _Who, flow: Flow) -> dict[str, Any]:
    names = {ICMP: "ICMP", ICMP6: "ICMPv6"}
    known = PROTOCOL_NAMES.get(flow.protocol)
    body: dict[str, Any] = {
        "action": "Allow",
        "protocol": names.get(flow.protocol) or (known.upper() if known else flow.protocol),
    }
    if flow.icmp_type is not None:
        body["icmp"] = {"type": flow.icmp_type}
        if flow.icmp_code is not None:
            body["icmp"]["code"] = flow.icmp_code
    peer: dict[str, Any] = {"nets": [who.net]} if who.net else {}
    if not who.net:
        peer["namespaceSelector"] = f"{IMPLIED}name == '{who.namespace}'"
        peer["selector"] = " && ".join(f"{key} == '{value}'" for key, value in who.labels.items()) or "all()"
    side = "source" if direction is Direction.INGRESS else "destination"
    body[side] = peer
    if flow.port is not None:
        body.setdefault("destination", {})["ports"] = [flow.port]
    return body


def flow_style(value: object) -> str:
    """A value as YAML on one line, with quotes only where text could be read as something else."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow_style(key)}: {flow_style(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(flow_style(each) for each in value) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value)
