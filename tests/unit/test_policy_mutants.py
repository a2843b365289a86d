"""The tests are tested: each wrong engine of this list gives another verdict somewhere in our corpora.

An engine is wrong by one patched function of the engine or of label expressions, or by what reaches it: the
document as another reader would have taken it, the rules as another converter would have written them, the
world as another would have seen it. reference/policy.md 2.2 names 46 kinds and the nine that the public
corpora let pass; the rest are the positions of 1.2, the tiers, and Calico's.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from portwright.policy import engine, labels, matching
from portwright.policy.engine import Connection, Decision, Engine, Implicit
from portwright.policy.manifests import shelf
from portwright.policy.manifests.documents import Document, parse
from portwright.policy.matching import World
from portwright.policy.rules import (
    ADMIN,
    BASELINE,
    DEFAULT,
    ICMP,
    PORT_PROTOCOLS,
    SCTP,
    TCP,
    UDP,
    Action,
    Direction,
    Endpoint,
    EndpointKind,
    Flow,
    NamedPort,
    Peer,
    Policy,
    PolicySet,
    PortRange,
    Rule,
    Snapshot,
    Traffic,
)
from tests.fix_policy import CORPORA, State, corpus, mismatches, state, states

Body = dict[str, Any]


class Mutant(msgspec.Struct, kw_only=True):
    """One way to be wrong. ``patches``: (where, name, what stands there instead)."""

    name: str
    patches: list[tuple[Any, str, Any]] = []
    body: Callable[[Body], None] | None = None
    policies: Callable[[PolicySet], PolicySet] | None = None
    snapshot: Callable[[Snapshot], Snapshot] | None = None


MUTANTS: list[Mutant] = []


def patched(name: str, *patches: tuple[Any, str, Any]) -> None:
    """A mutant that has other functions."""
    MUTANTS.append(Mutant(name=name, patches=list(patches)))


# --- as another reader would take the document ---


def spec_reader(name: str) -> Callable[[Callable[[Body], None]], Callable[[Body], None]]:
    """A mutant that reads a NetworkPolicy's spec otherwise."""

    def add(change: Callable[[Body], None]) -> Callable[[Body], None]:
        def body(whole: Body) -> None:
            if whole["kind"] == "NetworkPolicy" and whole["apiVersion"].startswith("networking."):
                change(whole.setdefault("spec", {}))

        MUTANTS.append(Mutant(name=name, body=body))
        return change

    return add


def rules_in(spec: Body) -> Iterator[tuple[str, Body]]:
    """(the field of its peers, rule) of every rule."""
    for direction, side in (("ingress", "from"), ("egress", "to")):
        for rule in spec.get(direction) or []:
            yield side, rule


def peers_in(spec: Body) -> Iterator[Body]:
    """Every peer."""
    for side, rule in rules_in(spec):
        yield from rule.get(side) or []


def ports_in(spec: Body) -> Iterator[Body]:
    """Every entry of ports."""
    for _, rule in rules_in(spec):
        yield from rule.get("ports") or []


@spec_reader("policyTypes absent means both")
def _types_both(spec: Body) -> None:
    spec["policyTypes"] = spec.get("policyTypes") or ["Ingress", "Egress"]


@spec_reader("policyTypes absent never means Egress")
def _types_ingress(spec: Body) -> None:
    spec["policyTypes"] = spec.get("policyTypes") or ["Ingress"]


@spec_reader("policyTypes absent means those with rules")
def _types_present(spec: Body) -> None:
    there = [name for name in ("Ingress", "Egress") if spec.get(name.lower())]
    spec["policyTypes"] = spec.get("policyTypes") or there or ["Ingress"]


@spec_reader("policyTypes absent with an empty egress list means Egress too")
def _types_empty_egress(spec: Body) -> None:
    if not spec.get("policyTypes") and spec.get("egress") == []:
        spec["policyTypes"] = ["Ingress", "Egress"]


@spec_reader("policyTypes is not read: rules isolate where they stand")
def _types_ignored(spec: Body) -> None:
    there = [name for name in ("Ingress", "Egress") if spec.get(name.lower()) is not None]
    spec["policyTypes"] = there or ["Ingress"]


@spec_reader("rules of a direction that policyTypes leaves out isolate")
def _types_and_rules(spec: Body) -> None:
    types = spec.get("policyTypes") or ["Ingress"]
    spec["policyTypes"] = [name for name in ("Ingress", "Egress") if name in types or spec.get(name.lower())]


@spec_reader("an empty rule list allows")
def _empty_list(spec: Body) -> None:
    for direction in ("ingress", "egress"):
        if spec.get(direction) == []:
            spec[direction] = [{}]


@spec_reader("an absent rule list allows")
def _absent_list(spec: Body) -> None:
    for direction in ("ingress", "egress"):
        if spec.get(direction) is None and direction.title() in (spec.get("policyTypes") or ["Ingress"]):
            spec[direction] = [{}]


@spec_reader("an empty rule allows nothing")
def _empty_rule(spec: Body) -> None:
    for direction in ("ingress", "egress"):
        if spec.get(direction) is not None:
            spec[direction] = [rule for rule in spec[direction] if rule]


@spec_reader("an empty list of peers is nobody")
def _empty_peers(spec: Body) -> None:
    for side, rule in rules_in(spec):
        if rule.get(side) == []:
            rule[side] = [{"podSelector": {"matchLabels": {"no": "body"}}}]


@spec_reader("absent peers are the cluster's only")
def _absent_peers(spec: Body) -> None:
    for side, rule in rules_in(spec):
        rule[side] = rule.get(side) or [{"namespaceSelector": {}}]


@spec_reader("an empty list of ports is none")
def _empty_ports(spec: Body) -> None:
    for _, rule in rules_in(spec):
        if rule.get("ports") == []:
            rule["ports"] = [{"port": 1, "protocol": "SCTP"}]


@spec_reader("absent ports are TCP's only")
def _absent_ports(spec: Body) -> None:
    for _, rule in rules_in(spec):
        rule["ports"] = rule.get("ports") or [{"protocol": "TCP"}]


@spec_reader("absent ports are those of TCP, UDP and SCTP, so no ICMP")
def _absent_ports_all(spec: Body) -> None:
    for _, rule in rules_in(spec):
        rule["ports"] = rule.get("ports") or [{"protocol": name} for name in ("TCP", "UDP", "SCTP")]


@spec_reader("the protocol defaults to UDP")
def _protocol_udp(spec: Body) -> None:
    for port in ports_in(spec):
        port.setdefault("protocol", "UDP")


@spec_reader("a port's protocol is not read")
def _protocol_ignored(spec: Body) -> None:
    for _, rule in rules_in(spec):
        if rule.get("ports"):
            rule["ports"] = [
                {**port, "protocol": name} for port in rule["ports"] for name in ("TCP", "UDP", "SCTP")
            ]


@spec_reader("SCTP is read as TCP")
def _sctp_tcp(spec: Body) -> None:
    for port in ports_in(spec):
        if port.get("protocol") == "SCTP":
            port["protocol"] = "TCP"


@spec_reader("a rule for SCTP is dropped with its policy")
def _sctp_dropped(spec: Body) -> None:
    if any(port.get("protocol") == "SCTP" for port in ports_in(spec)):
        spec["podSelector"] = {"matchLabels": {"no": "body"}}


@spec_reader("endPort is not read")
def _end_port_ignored(spec: Body) -> None:
    for port in ports_in(spec):
        port.pop("endPort", None)


@spec_reader("endPort is exclusive")
def _end_port_exclusive(spec: Body) -> None:
    for port in ports_in(spec):
        if "endPort" in port and port["endPort"] > port["port"]:
            port["endPort"] -= 1


@spec_reader("a range's first port is exclusive")
def _first_port_exclusive(spec: Body) -> None:
    for port in ports_in(spec):
        if "endPort" in port and port["endPort"] > port["port"]:
            port["port"] += 1


@spec_reader("an entry without a port is the first port")
def _no_port(spec: Body) -> None:
    for port in ports_in(spec):
        port.setdefault("port", 1)


@spec_reader("only the first entry of ports is read")
def _first_ports(spec: Body) -> None:
    for _, rule in rules_in(spec):
        if rule.get("ports"):
            rule["ports"] = rule["ports"][:1]


@spec_reader("ports are not read")
def _no_ports(spec: Body) -> None:
    for _, rule in rules_in(spec):
        rule.pop("ports", None)


@spec_reader("a rule's second port is ignored with a named first")
def _named_first(spec: Body) -> None:
    for _, rule in rules_in(spec):
        if rule.get("ports") and isinstance(rule["ports"][0].get("port"), str):
            rule["ports"] = rule["ports"][:1]


@spec_reader("peers and ports are ORed")
def _peers_or_ports(spec: Body) -> None:
    for direction, side in (("ingress", "from"), ("egress", "to")):
        split = []
        for rule in spec.get(direction) or []:
            if rule.get(side) and rule.get("ports"):
                split += [{side: rule[side]}, {"ports": rule["ports"]}]
            else:
                split.append(rule)
        if split:
            spec[direction] = split


@spec_reader("only the first peer is read")
def _first_peer(spec: Body) -> None:
    for side, rule in rules_in(spec):
        if rule.get(side):
            rule[side] = rule[side][:1]


@spec_reader("peers are not read")
def _no_peers(spec: Body) -> None:
    for side, rule in rules_in(spec):
        rule.pop(side, None)


@spec_reader("both selectors in one peer are ORed")
def _selectors_or(spec: Body) -> None:
    for side, rule in rules_in(spec):
        split = []
        for peer in rule.get(side) or []:
            split += [{key: peer[key]} for key in peer]
        if split:
            rule[side] = split


@spec_reader("two peers of one selector each are one peer of both")
def _selectors_and(spec: Body) -> None:
    for side, rule in rules_in(spec):
        peers = rule.get(side) or []
        for one, two in itertools.pairwise(peers):
            if set(one) == {"namespaceSelector"} and set(two) == {"podSelector"}:
                rule[side] = [{**one, **two}]


@spec_reader("podSelector alone reaches all namespaces")
def _pods_everywhere(spec: Body) -> None:
    for peer in peers_in(spec):
        if set(peer) == {"podSelector"}:
            peer["namespaceSelector"] = {}


@spec_reader("namespaceSelector is not read")
def _no_namespace_selector(spec: Body) -> None:
    for peer in peers_in(spec):
        if peer.pop("namespaceSelector", None) is not None:
            peer.setdefault("podSelector", {})


@spec_reader("podSelector beside namespaceSelector is not read")
def _no_pod_selector(spec: Body) -> None:
    for peer in peers_in(spec):
        if "namespaceSelector" in peer:
            peer.pop("podSelector", None)


@spec_reader("an empty podSelector in a peer is nobody")
def _empty_pod_selector(spec: Body) -> None:
    for peer in peers_in(spec):
        if peer.get("podSelector") == {}:
            peer["podSelector"] = {"matchLabels": {"no": "body"}}


@spec_reader("an empty namespaceSelector is the own namespace")
def _empty_namespace_selector(spec: Body) -> None:
    for peer in peers_in(spec):
        if peer.get("namespaceSelector") == {}:
            del peer["namespaceSelector"]
            peer.setdefault("podSelector", {})


@spec_reader("an empty podSelector selects nobody")
def _empty_subject(spec: Body) -> None:
    if not spec.get("podSelector"):
        spec["podSelector"] = {"matchLabels": {"no": "body"}}


@spec_reader("podSelector is not read: the whole namespace")
def _whole_namespace(spec: Body) -> None:
    spec["podSelector"] = {}


@spec_reader("except is not read")
def _no_except(spec: Body) -> None:
    for peer in peers_in(spec):
        if "ipBlock" in peer:
            peer["ipBlock"].pop("except", None)


@spec_reader("only the first exception is read")
def _first_except(spec: Body) -> None:
    for peer in peers_in(spec):
        if peer.get("ipBlock", {}).get("except"):
            peer["ipBlock"]["except"] = peer["ipBlock"]["except"][:1]


@spec_reader("a block's exceptions bind the other peers of its rule")
def _shared_except(spec: Body) -> None:
    for side, rule in rules_in(spec):
        blocks = [peer["ipBlock"] for peer in rule.get(side) or [] if "ipBlock" in peer]
        holes = [hole for block in blocks for hole in block.get("except") or []]
        rule[side] = [
            peer
            for peer in rule.get(side) or []
            if "except" in peer.get("ipBlock", {"except": 1}) or not holes
        ]


@spec_reader("matchExpressions are not read")
def _no_expressions(spec: Body) -> None:
    for selector in selectors_in(spec):
        selector.pop("matchExpressions", None)


@spec_reader("matchExpressions are not read beside matchLabels")
def _labels_win(spec: Body) -> None:
    for selector in selectors_in(spec):
        if selector.get("matchLabels"):
            selector.pop("matchExpressions", None)


@spec_reader("matchLabels are not read beside matchExpressions")
def _expressions_win(spec: Body) -> None:
    for selector in selectors_in(spec):
        if selector.get("matchExpressions"):
            selector.pop("matchLabels", None)


@spec_reader("only the first expression is read")
def _first_expression(spec: Body) -> None:
    for selector in selectors_in(spec):
        if selector.get("matchExpressions"):
            selector["matchExpressions"] = selector["matchExpressions"][:1]


@spec_reader("only the first value is read")
def _first_value(spec: Body) -> None:
    for expression in expressions_in(spec):
        if expression.get("values"):
            expression["values"] = expression["values"][:1]


def operator_as(name: str, operator: str, other: str | None) -> None:
    """A mutant that takes one operator for another, or (None) does not read it."""

    def change(spec: Body) -> None:
        for selector in selectors_in(spec):
            kept = []
            for expression in selector.get("matchExpressions") or []:
                if expression["operator"] == operator:
                    if other is None:
                        continue
                    expression["operator"] = other
                kept.append(expression)
            if "matchExpressions" in selector:
                selector["matchExpressions"] = kept

    spec_reader(name)(change)


operator_as("Exists is not read", "Exists", None)
operator_as("DoesNotExist is not read", "DoesNotExist", None)
operator_as("NotIn is not read", "NotIn", None)
operator_as("NotIn is In", "NotIn", "In")
operator_as("Exists is DoesNotExist", "Exists", "DoesNotExist")


def selectors_in(spec: Body) -> Iterator[Body]:
    """Every selector of labels."""
    yield spec.get("podSelector") or {}
    for peer in peers_in(spec):
        yield from (peer[key] for key in ("podSelector", "namespaceSelector") if peer.get(key))


def expressions_in(spec: Body) -> Iterator[Body]:
    """Every expression of every selector."""
    for selector in selectors_in(spec):
        yield from selector.get("matchExpressions") or []


# --- as another converter would write the rules ---


def rule_writer(name: str) -> Callable[[Callable[[Policy], Policy]], Callable[[Policy], Policy]]:
    """A mutant that has other policies."""

    def add(change: Callable[[Policy], Policy]) -> Callable[[Policy], Policy]:
        def policies(whole: PolicySet) -> PolicySet:
            return replace(whole, policies=tuple(change(policy) for policy in whole.policies))

        MUTANTS.append(Mutant(name=name, policies=policies))
        return change

    return add


Rules = tuple[Rule, ...]


def rewritten(policy: Policy, change: Callable[[Rules], Rules]) -> Policy:
    """The policy with other rules in both directions."""
    ingress = None if policy.ingress is None else change(policy.ingress)
    egress = None if policy.egress is None else change(policy.egress)
    return replace(policy, ingress=ingress, egress=egress)


def every_rule(name: str, change: Callable[[Rule], Rule]) -> None:
    """A mutant that has other rules."""
    rule_writer(name)(lambda policy: rewritten(policy, lambda rules: tuple(change(r) for r in rules)))


def acting(name: str, action: Action, other: Action) -> None:
    """A mutant that takes one action for another."""
    every_rule(name, lambda rule: replace(rule, action=other) if rule.action is action else rule)


rule_writer("only the first rule is read")(lambda p: rewritten(p, lambda rules: rules[:1]))
rule_writer("only the last rule is read")(lambda p: rewritten(p, lambda rules: rules[-1:]))
rule_writer("rules are read backwards")(lambda p: rewritten(p, lambda rules: rules[::-1]))
rule_writer("egress is not enforced")(lambda p: replace(p, egress=None))
rule_writer("ingress is not enforced")(lambda p: replace(p, ingress=None))
rule_writer("the directions are swapped")(lambda p: replace(p, ingress=p.egress, egress=p.ingress))
rule_writer("what selects isolates both directions")(
    lambda p: replace(p, ingress=p.ingress or (), egress=p.egress or ())
)
rule_writer("an empty direction is one not said")(
    lambda p: replace(p, ingress=p.ingress or None, egress=p.egress or None)
)
rule_writer("everything is selected")(lambda p: replace(p, subject=labels.EVERYTHING))
rule_writer("staged policies are enforced")(lambda p: replace(p, staged=False))
rule_writer("a policy without an order is first")(
    lambda p: replace(p, order=-1.0 if p.order == float("inf") else p.order)
)
rule_writer("priority is read backwards")(lambda p: replace(p, order=-p.order))
rule_writer("priorities are compared as text")(
    lambda p: replace(p, order=float(str(int(p.order))[:1]) if p.order < float("inf") else p.order)
)
acting("deny is pass", Action.DENY, Action.PASS)
acting("deny is allow", Action.DENY, Action.ALLOW)
acting("pass is allow", Action.PASS, Action.ALLOW)
acting("pass is deny", Action.PASS, Action.DENY)
acting("pass is passed over", Action.PASS, Action.LOG)
acting("log is allow", Action.LOG, Action.ALLOW)
acting("log is deny", Action.LOG, Action.DENY)
every_rule("what is not meant is not read", lambda rule: replace(rule, not_traffic=()))
every_rule("the own side's condition is not read", lambda rule: replace(rule, local=None))


@rule_writer("a policy that only logs does not isolate")
def _log_only(policy: Policy) -> Policy:
    def change(rules: Rules | None) -> Rules | None:
        return None if rules and all(rule.action is Action.LOG for rule in rules) else rules

    return replace(policy, ingress=change(policy.ingress), egress=change(policy.egress))


def every_traffic(name: str, change: Callable[[Traffic], Traffic]) -> None:
    """A mutant that has other descriptions of packets."""

    def rule(rule: Rule) -> Rule:
        traffic = None if rule.traffic is None else tuple(change(each) for each in rule.traffic)
        return replace(rule, traffic=traffic, not_traffic=tuple(change(each) for each in rule.not_traffic))

    every_rule(name, rule)


every_traffic("named ports are not read", lambda traffic: replace(traffic, names=()))
every_traffic("source ports are not read", lambda traffic: replace(traffic, source_ports=()))
every_traffic("ICMP types are not read", lambda traffic: replace(traffic, icmp_type=None))
every_traffic("ICMP codes are not read", lambda traffic: replace(traffic, icmp_code=None))
every_traffic("the IP version is not read", lambda traffic: replace(traffic, ip_version=None))
every_traffic("numbered protocols are not read", lambda traffic: replace(traffic, protocol=None))


def every_peer(name: str, change: Callable[[Peer], Peer]) -> None:
    """A mutant that has other peers."""

    def rule(rule: Rule) -> Rule:
        return rule if rule.peers is None else replace(rule, peers=tuple(change(each) for each in rule.peers))

    every_rule(name, rule)


def _negated(peer: Peer) -> Peer:
    if peer.not_selector is None:
        return peer
    return replace(peer, selector=labels.Not(peer.not_selector), not_selector=None)


every_peer("nodes are any address", lambda peer: replace(peer, nodes=None))
every_peer("any node is a node", lambda peer: replace(peer, nodes=peer.nodes and labels.EVERYTHING))
every_peer("domain names are any address", lambda peer: replace(peer, domains=None))
every_peer("a not-selector is a negated selector", _negated)
every_peer("nets that are not meant are not read", lambda peer: replace(peer, not_nets=()))
every_peer(
    "a domain pattern holds for its apex",
    lambda peer: replace(
        peer, domains=peer.domains and tuple(name.removeprefix("*.") for name in peer.domains)
    ),
)
every_peer(
    "a block is its first address",
    lambda peer: replace(peer, nets=peer.nets and tuple(f"{net.split('/')[0]}" for net in peer.nets)),
)


def tier_order(name: str, **orders: float) -> None:
    """A mutant that has tiers in another order."""

    def policies(whole: PolicySet) -> PolicySet:
        tiers = [replace(t, order=orders.get(t.name.replace("-", "_"), t.order)) for t in whole.tiers]
        return replace(whole, tiers=tuple(tiers))

    MUTANTS.append(Mutant(name=name, policies=policies))


def tier_default(name: str, tier: str | None, default: Action) -> None:
    """A mutant whose tier (None: those that users made) has another default."""

    def policies(whole: PolicySet) -> PolicySet:
        built_in = {ADMIN.name, DEFAULT.name, BASELINE.name}
        tiers = [
            replace(t, default=default) if t.name == tier or (tier is None and t.name not in built_in) else t
            for t in whole.tiers
        ]
        return replace(whole, tiers=tuple(tiers))

    MUTANTS.append(Mutant(name=name, policies=policies))


tier_order("baseline before network policies", kube_baseline=DEFAULT.order - 1)
tier_order("admin after network policies", kube_admin=DEFAULT.order + 1)
tier_order("baseline before admin", kube_baseline=ADMIN.order - 1)
tier_order("a user's tier after the default one", guard=DEFAULT.order + 1)
tier_order("tiers by name", zeta=2.0, alpha=1.0)
tier_default("admin policies isolate", ADMIN.name, Action.DENY)
tier_default("baseline policies isolate", BASELINE.name, Action.DENY)
tier_default("network policies do not isolate", DEFAULT.name, Action.PASS)
tier_default("a user's tier always denies by default", None, Action.DENY)
tier_default("a user's tier always passes by default", None, Action.PASS)


@rule_writer("a network policy's order is after Calico's")
def _kubernetes_last(policy: Policy) -> Policy:
    return replace(policy, order=5_000.0) if policy.kind == "NetworkPolicy" else policy


@rule_writer("a network policy's order is before Calico's")
def _kubernetes_first(policy: Policy) -> Policy:
    return replace(policy, order=0.0) if policy.kind == "NetworkPolicy" else policy


# --- as another would see the world ---


def seen(name: str, change: Callable[[Endpoint], Endpoint]) -> None:
    """A mutant that has other endpoints."""

    def snapshot(whole: Snapshot) -> Snapshot:
        return replace(whole, endpoints=tuple(change(endpoint) for endpoint in whole.endpoints))

    MUTANTS.append(Mutant(name=name, snapshot=snapshot))


def _plain(key: str) -> str:
    return key.removeprefix(labels.NAMESPACE_PREFIX)


seen("host-network pods are pods", lambda e: replace(e, host_network=False))
seen("the local node is a node like others", lambda e: replace(e, local_node=False))
seen("every node is the local one", lambda e: replace(e, local_node=e.kind is EndpointKind.NODE))
seen("second addresses are nobody's", lambda e: replace(e, addresses=e.addresses[:1]))
seen(
    "a namespace's labels are its pods'",
    lambda e: replace(e, labels={**{_plain(key): value for key, value in e.labels.items()}, **e.labels}),
)
seen(
    "a pod's labels are its namespace's",
    lambda e: replace(e, labels={**e.labels, **{f"ns:{key}": value for key, value in e.labels.items()}}),
)
seen(
    "namespaces carry no label of their name",
    lambda e: replace(e, labels={k: v for k, v in e.labels.items() if not k.endswith("metadata.name")}),
)
seen(
    "labels without a value are no labels",
    lambda e: replace(e, labels={k: v for k, v in e.labels.items() if v}),
)
seen("named ports are TCP's", lambda e: replace(e, named_ports=_as_tcp(e)))
seen("named ports have no protocol", lambda e: replace(e, named_ports=_as_any(e)))
seen(
    "a name has one port",
    lambda e: replace(e, named_ports=tuple({n.name: n for n in e.named_ports}.values())),
)


def _as_tcp(endpoint: Endpoint) -> tuple[NamedPort, ...]:
    return tuple(NamedPort(named.name, TCP, named.port) for named in endpoint.named_ports)


def _as_any(endpoint: Endpoint) -> tuple[NamedPort, ...]:
    return tuple(
        NamedPort(named.name, protocol, named.port)
        for named in endpoint.named_ports
        for protocol in (TCP, UDP, SCTP)
    )


def _one_number(whole: Snapshot) -> Snapshot:
    numbers: dict[tuple[str, int], int] = {}
    for endpoint in whole.endpoints:
        for named in endpoint.named_ports:
            numbers.setdefault((named.name, named.protocol), named.port)
    return replace(
        whole,
        endpoints=tuple(
            replace(
                endpoint,
                named_ports=tuple(
                    NamedPort(n.name, n.protocol, numbers[n.name, n.protocol]) for n in endpoint.named_ports
                ),
            )
            for endpoint in whole.endpoints
        ),
    )


MUTANTS.append(Mutant(name="a name is one number everywhere", snapshot=_one_number))
MUTANTS.append(Mutant(name="domain names are never resolved", snapshot=lambda w: replace(w, domains={})))
MUTANTS.append(
    Mutant(
        name="network sets are not found",
        snapshot=lambda w: replace(
            w, endpoints=tuple(e for e in w.endpoints if e.kind is not EndpointKind.NETWORK_SET)
        ),
    )
)

# --- other functions ---

Judge = Callable[[labels.Expr, labels.Labels], bool]


def labelled(name: str, change: Callable[[labels.Expr, labels.Labels, Judge], bool | None]) -> None:
    """A mutant that judges some label expressions otherwise (None: as the product does)."""

    def wrong(expr: labels.Expr, of: labels.Labels) -> bool:
        found = change(expr, of, wrong)
        if found is not None:
            return found
        match expr:
            case labels.Not(term):
                return not wrong(term, of)
            case labels.And(terms):
                return all(wrong(term, of) for term in terms)
            case labels.Or(terms):
                return any(wrong(term, of) for term in terms)
        return labels.matches(expr, of)

    patched(name, (engine, "matches", wrong), (matching, "matches", wrong))


def _not_in(expr: labels.Expr) -> labels.In | None:
    return expr.term if isinstance(expr, labels.Not) and isinstance(expr.term, labels.In) else None


def _missing_is_false(expr: labels.Expr, of: labels.Labels, _: Judge) -> bool | None:
    term = _not_in(expr)
    return False if term is not None and term.key not in of else None


def _missing_is_empty(expr: labels.Expr, of: labels.Labels, _: Judge) -> bool | None:
    return of.get(expr.key, "") in expr.values if isinstance(expr, labels.In) else None


def _ors_own_labels(expr: labels.Expr, of: labels.Labels, wrong: Judge) -> bool | None:
    """MatchLabels ORed: the terms on a pod's own keys; what pins the namespace stays."""
    if not isinstance(expr, labels.And):
        return None
    own = [t for t in expr.terms if isinstance(t, labels.In) and ":" not in t.key and "/" not in t.key]
    rest = [t for t in expr.terms if t not in own]
    return (not own or any(wrong(t, of) for t in own)) and all(wrong(t, of) for t in rest)


def _value_matters(expr: labels.Expr, of: labels.Labels, _: Judge) -> bool | None:
    return bool(of.get(expr.key)) if isinstance(expr, labels.Has) else None


def _any_case(expr: labels.Expr, of: labels.Labels, _: Judge) -> bool | None:
    if not isinstance(expr, labels.In) or expr.key not in of:
        return None
    return of[expr.key].lower() in {value.lower() for value in expr.values}


def _no_ends(expr: labels.Expr, of: labels.Labels, _: Judge) -> bool | None:
    if not isinstance(expr, labels.StartsWith | labels.EndsWith):
        return None
    return expr.text in of.get(expr.key, "")


labelled("NotIn needs the label", _missing_is_false)
labelled("a missing label is an empty one", _missing_is_empty)
labelled("a selector's labels are ORed", _ors_own_labels)
labelled("Exists needs a value", _value_matters)
labelled("values are compared without case", _any_case)
labelled("starts with and ends with are contains", _no_ends)

_traffic, _peer, _known = matching.traffic_matches, matching.peer_matches, World.known
_selecting, _candidates, _judge, _connect = Engine.selecting, Engine.candidates, Engine.judge, Engine.connect


def _source_names(traffic: Traffic, flow: Flow, world: World) -> bool:
    turned = replace(flow, source=flow.destination, destination=flow.source) if traffic.names else flow
    return _traffic(traffic, turned, world)


def _icmp_is_port(traffic: Traffic, flow: Flow, world: World) -> bool:
    if flow.protocol == ICMP and flow.icmp_type is not None:
        return _traffic(
            replace(traffic, protocol=None if traffic.ports else traffic.protocol),
            replace(flow, port=flow.icmp_type),
            world,
        )
    return _traffic(traffic, flow, world)


def _fragments(traffic: Traffic, flow: Flow, world: World) -> bool:
    if flow.protocol in PORT_PROTOCOLS and flow.port is None:
        return _traffic(replace(traffic, ports=(), names=()), flow, world)
    return _traffic(traffic, flow, world)


def _low_port(traffic: Traffic, flow: Flow, world: World) -> bool:
    wide = tuple(PortRange(0 if ports.first == 1 else ports.first, ports.last) for ports in traffic.ports)
    return _traffic(replace(traffic, ports=wide), flow, world)


def _names_or(traffic: Traffic, flow: Flow, world: World) -> bool:
    """The name resolves at either end."""
    return _traffic(traffic, flow, world) or (bool(traffic.names) and _source_names(traffic, flow, world))


def _strangers(peer: Peer, address: str, world: World) -> bool:
    stranger = next(world.known(address), None) is None and peer.selector is not None
    return stranger or _peer(peer, address, world)


def _no_pods_in_nets(peer: Peer, address: str, world: World) -> bool:
    if peer.nets is not None and world.at(address):
        return False
    return _peer(peer, address, world)


def _no_nodes_in_nets(peer: Peer, address: str, world: World) -> bool:
    if peer.nets is not None and world.nodes(address):
        return False
    return _peer(peer, address, world)


def _nodes_are_found(self: World, address: str) -> Iterator[Endpoint]:
    yield from _known(self, address)
    for pod in self.snapshot.endpoints:
        if pod.host_network and address in pod.addresses:
            yield pod


def _families_mix(address: str, net: str) -> bool:
    return net.endswith("/0") or (
        matching.address_key(address)[0] == matching.net_key(net)[0] and _in_net(address, net)
    )


def _only_v4(address: str, net: str) -> bool:
    return matching.address_key(address)[0] == 4 and _in_net(address, net)


_in_net = matching.in_net


def _octets(address: str, net: str) -> bool:
    """Whole bytes of a prefix only."""
    version, number = matching.address_key(address)
    net_version, first, bits = matching.net_key(net)
    bits = bits // 8 * 8
    return version == net_version and number >> bits == first >> bits


def _first_policy(self: Engine, endpoint: Endpoint, direction: Direction) -> Any:
    return tuple((tier, those[:1]) for tier, those in _selecting(self, endpoint, direction))


def _last_policy(self: Engine, endpoint: Endpoint, direction: Direction) -> Any:
    return tuple((tier, those[-1:]) for tier, those in _selecting(self, endpoint, direction))


def _last_match(self: Engine, *pair: Any) -> Any:
    return tuple((tier, found[::-1]) for tier, found in _candidates(self, *pair))


def _all_must_allow(self: Engine, endpoint: Endpoint, direction: Direction, flow: Flow) -> Decision:
    whole = _judge(self, endpoint, direction, flow)
    for policy in whole.selected_by:
        alone = Engine(
            PolicySet(tiers=tuple(t for t, _ in self.tiers), policies=(policy,)), self.world.snapshot
        )
        one = _judge(alone, endpoint, direction, flow)
        if not one.allowed:
            return one
    return whole


def _pass_to_next_policy(self: Engine, endpoint: Endpoint, direction: Direction, flow: Flow) -> Decision:
    passed: set[str] = set()
    for tier, found in _candidates(self, endpoint, direction, *engine.sides(flow, direction)):
        for near in found:
            if near.policy.title in passed or not matching.rule_traffic_matches(near.rule, flow, self.world):
                continue
            if near.rule.action is Action.PASS:
                passed.add(near.policy.title)
            elif near.rule.action is not Action.LOG:
                return Decision(verdict=near.rule.action, direction=direction, endpoint=endpoint, tier=tier)
        if tier.default is Action.DENY and not passed:
            return Decision(verdict=Action.DENY, direction=direction, endpoint=endpoint, tier=tier)
    return Decision(verdict=Action.ALLOW, direction=direction, endpoint=endpoint)


def _pass_keeps_default(self: Engine, endpoint: Endpoint, direction: Direction, flow: Flow) -> Decision:
    """A pass leaves the rules of a tier, but not its default."""
    for tier, found in _candidates(self, endpoint, direction, *engine.sides(flow, direction)):
        for near in found:
            if (
                not matching.rule_traffic_matches(near.rule, flow, self.world)
                or near.rule.action is Action.LOG
            ):
                continue
            if near.rule.action is Action.PASS:
                break
            return Decision(verdict=near.rule.action, direction=direction, endpoint=endpoint, tier=tier)
        if tier.default is Action.DENY:
            return Decision(verdict=Action.DENY, direction=direction, endpoint=endpoint, tier=tier)
    return Decision(verdict=Action.ALLOW, direction=direction, endpoint=endpoint)


def _accept_is_final(self: Engine, flow: Flow) -> Connection:
    """What the source's admin allows, the destination's policies are not asked about."""
    found = _connect(self, flow)
    rules = (side.policy for side in (found.egress, found.ingress) if side is not None and side.allowed)
    final = any(policy is not None and policy.tier == ADMIN.name for policy in rules)
    return replace(found, allowed=True) if final else found


def _closed(self: Engine, endpoint: Endpoint, direction: Direction, flow: Flow) -> Decision:
    found = _judge(self, endpoint, direction, flow)
    return replace(found, verdict=Action.DENY) if found.implicit is Implicit.NO_POLICY else found


def _one_side(which: Callable[[Connection], Decision | None]) -> Callable[[Engine, Flow], Connection]:
    def connect(self: Engine, flow: Flow) -> Connection:
        found = _connect(self, flow)
        side = which(found)
        return replace(found, allowed=side is None or side.allowed)

    return connect


def _either(self: Engine, flow: Flow) -> Connection:
    found = _connect(self, flow)
    sides = [side.allowed for side in (found.egress, found.ingress) if side is not None]
    return replace(found, allowed=not sides or any(sides))


def _baseline_if_unmatched(self: Engine, endpoint: Endpoint, direction: Direction, flow: Flow) -> Decision:
    """What no network policy allows goes on to the baseline."""
    found = _judge(self, endpoint, direction, flow)
    there = any(policy.tier == BASELINE.name for policy in found.selected_by)
    if found.implicit is Implicit.TIER_DEFAULT and found.tier == DEFAULT and there:
        return replace(found, verdict=Action.ALLOW)
    return found


def _any_built_in(self: Engine, endpoint: Endpoint, direction: Direction, flow: Flow) -> Implicit:
    found = _built_in(self, endpoint, direction, flow)
    _, other = engine.sides(flow, direction)
    return Implicit.LOCAL_NODE if self.world.is_local_node(other) else found


def _same_labels(self: Engine, endpoint: Endpoint, direction: Direction, flow: Flow) -> Implicit:
    found = _built_in(self, endpoint, direction, flow)
    other = self.world.workload(engine.sides(flow, direction)[1])
    same = other is not None and (other.namespace, other.labels.get("app")) == (
        endpoint.namespace,
        endpoint.labels.get("app"),
    )
    return Implicit.OWN_ADDRESS if same and endpoint.labels.get("app") else found


def _one_own_address(self: Engine, endpoint: Endpoint, direction: Direction, flow: Flow) -> Implicit:
    found = _built_in(self, endpoint, direction, flow)
    return Implicit.NONE if found is Implicit.OWN_ADDRESS and flow.source != flow.destination else found


def _not_own(self: Engine, endpoint: Endpoint, direction: Direction, flow: Flow) -> Implicit:
    found = _built_in(self, endpoint, direction, flow)
    return Implicit.NONE if found is Implicit.OWN_ADDRESS else found


_built_in = Engine.built_in

patched("a name is the source's", (matching, "traffic_matches", _source_names))
patched("a name is either end's", (matching, "traffic_matches", _names_or))
patched("an ICMP type is a port", (matching, "traffic_matches", _icmp_is_port))
patched("a later fragment matches every port", (matching, "traffic_matches", _fragments))
patched("port 1 and above is port 0 too", (matching, "traffic_matches", _low_port))
patched("selectors find outside", (matching, "peer_matches", _strangers))
patched("blocks hold no pods", (matching, "peer_matches", _no_pods_in_nets))
patched("blocks hold no nodes", (matching, "peer_matches", _no_nodes_in_nets))
patched("selectors find host-network pods", (World, "known", _nodes_are_found))
patched("all of one family is all", (matching, "in_net", _families_mix))
patched("there is no IPv6", (matching, "in_net", _only_v4))
patched("prefixes are whole bytes", (matching, "in_net", _octets))
patched("the first policy that selects decides", (Engine, "selecting", _first_policy))
patched("the last policy that selects decides", (Engine, "selecting", _last_policy))
patched("the last match decides", (Engine, "candidates", _last_match))
patched("every policy must allow", (Engine, "judge", _all_must_allow))
patched("pass goes to the next policy", (Engine, "judge", _pass_to_next_policy))
patched("pass goes to the tier's default", (Engine, "judge", _pass_keeps_default))
patched("no policy is a deny", (Engine, "judge", _closed))
patched("baseline rescues what network policies deny", (Engine, "judge", _baseline_if_unmatched))
patched("an admin's accept binds the other side", (Engine, "connect", _accept_is_final))
patched("only the source is asked", (Engine, "connect", _one_side(lambda found: found.egress)))
patched("only the destination is asked", (Engine, "connect", _one_side(lambda found: found.ingress)))
patched("one side's allow is enough", (Engine, "connect", _either))
patched("the local node is let in and reached", (Engine, "built_in", _any_built_in))
patched("like labels are the own address", (Engine, "built_in", _same_labels))
patched("the own second address is another's", (Engine, "built_in", _one_own_address))
patched("traffic to oneself is subject to policy", (Engine, "built_in", _not_own))
patched("nothing is built in", (Engine, "built_in", lambda *_: Implicit.NONE))


# --- the run ---


@functools.cache
def documents(text: str, file: str) -> list[Document]:
    """A file's documents, parsed once for all mutants."""
    return parse(text, file)


def changed_states(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    """Every state of every corpus as the mutant has it; ours first, since they find most."""
    change = mutant.body
    if change is not None:

        def wrong(text: str, file: str) -> list[Document]:
            found = copy.deepcopy([document.body for document in documents(text, file)])
            for body in found:
                change(body)
            return [
                replace(document, body=body)
                for document, body in zip(documents(text, file), found, strict=True)
            ]

        monkeypatch.setattr(shelf, "parse", wrong)
    for name in CORPORA:
        for index, case in enumerate(corpus(name).cases):
            found = states(name)[index] if change is None else state(name, case)
            if mutant.policies is not None:
                found = replace(found, policies=mutant.policies(found.policies))
            if mutant.snapshot is not None:
                found = replace(found, snapshot=mutant.snapshot(found.snapshot))
            yield found


def caught_by(mutant: Mutant) -> str | None:
    """The first verdict that the mutant has wrong."""
    for name in CORPORA:
        states(name)  # read before anything is patched
    with pytest.MonkeyPatch.context() as monkeypatch:
        for where, name, what in mutant.patches:
            monkeypatch.setattr(where, name, what)
        for asked in changed_states(mutant, monkeypatch):
            for sentence in mismatches(asked):
                return sentence
    return None


def test_there_are_enough_of_them() -> None:
    """The list has more than the 60 that the claim names, and none twice."""
    names = [mutant.name for mutant in MUTANTS]

    assert len(names) == len(set(names)) >= 60


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant: Mutant, record_property: Callable[[str, object], None]) -> None:
    """Some verdict of our corpora is another with this wrong engine."""
    caught = caught_by(mutant)

    record_property("caught_by", caught or "nothing")
    print(f"{mutant.name:60} {caught}")
    assert caught is not None


@pytest.mark.parametrize(
    "mutant",
    [
        Mutant(name="none"),
        Mutant(name="document", body=lambda _: None),
        Mutant(name="policies", policies=lambda whole: whole),
        Mutant(name="snapshot", snapshot=lambda whole: whole),
        Mutant(
            name="patch", patches=[(engine, "matches", labels.matches), (matching, "matches", labels.matches)]
        ),
    ],
    ids=lambda mutant: mutant.name,
)
def test_right_engine_is_not_caught(mutant: Mutant) -> None:
    """The machinery of mutants itself changes no verdict: what it catches, the mutation did."""
    assert caught_by(mutant) is None
