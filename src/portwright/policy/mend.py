"""What to change so that a denied flow passes, as values that can be applied, shown and checked.

Small changes: another label on the pod that a rule would have let in, one more rule that allows just this,
one rule less that denies; and where no policy decided but the network's isolation, a policy that allows it.
:func:`options` proposes them for one side; :mod:`portwright.policy.explain` applies each and keeps those with
which the engine does allow the flow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import msgspec
from msgspec.structs import replace

from portwright.policy.engine import Decision, sides
from portwright.policy.isolation import KIND as OF_NETWORK
from portwright.policy.labels import (
    NAMESPACE_NAME,
    NAMESPACE_PREFIX,
    And,
    Contains,
    EndsWith,
    Everything,
    Expr,
    Has,
    In,
    Labels,
    Not,
    Or,
    StartsWith,
    both,
    matches,
)
from portwright.policy.lacks import label_text, rule_peer_lacks, rule_traffic_lacks
from portwright.policy.matching import World
from portwright.policy.rules import (
    DEFAULT,
    KUBERNETES_ORDER,
    Action,
    Direction,
    Endpoint,
    EndpointKind,
    Flow,
    Policy,
    PolicySet,
    Rule,
    Snapshot,
)
from portwright.policy.snippets import IMPLIED, Snippet, allowing

#: What a label gets whose value no rule asks about.
_ANY_VALUE = "true"


class ChangeLabels(msgspec.Struct, frozen=True, kw_only=True, tag="labels"):
    """Give the workload ``endpoint`` (its title) these labels; None takes one away."""

    endpoint: str
    labels: dict[str, str | None]

    def __str__(self) -> str:
        given = [label_text(key, value) for key, value in sorted(self.labels.items()) if value is not None]
        taken = [label_text(key) for key, value in sorted(self.labels.items()) if value is None]
        parts = [f"give {self.endpoint} the label {' and '.join(given)}"] if given else []
        parts += [f"take the label {' and '.join(taken)} from {self.endpoint}"] if taken else []
        return "; ".join(parts)


class AddRule(msgspec.Struct, frozen=True, kw_only=True, tag="add-rule"):
    """Put the snippet's rule into ``policy`` before the rule that is at ``index`` now."""

    policy: Policy
    direction: Direction
    index: int
    snippet: Snippet

    def __str__(self) -> str:
        count = len(self.policy.rules(self.direction) or ())
        place = f" before {self.direction} rule {self.index + 1}" if self.index < count else ""
        return f"add to {place_text(self.policy)}{place} an {self.direction} rule: {self.snippet.says}"


class LiftRule(msgspec.Struct, frozen=True, kw_only=True, tag="lift-rule"):
    """Take the rule at ``index`` out of ``policy``."""

    policy: Policy
    direction: Direction
    index: int

    def __str__(self) -> str:
        rule = (self.policy.rules(self.direction) or ())[self.index]
        where = f" ({rule.where})" if str(rule.where) else ""
        return f"lift {self.direction} rule {self.index + 1}{where} of {place_text(self.policy)}"


class AddPolicy(msgspec.Struct, frozen=True, kw_only=True, tag="add-policy"):
    """Apply ``policy``, a NetworkPolicy for one workload whose only rule is the snippet's."""

    policy: Policy
    direction: Direction
    snippet: Snippet

    def __str__(self) -> str:
        return (
            f"apply a {self.policy.kind} of namespace {self.policy.namespace} that selects "
            f"{self.policy.name} and has an {self.direction} rule: {self.snippet.says}"
        )


Change: TypeAlias = ChangeLabels | AddRule | LiftRule | AddPolicy


def place_text(policy: Policy) -> str:
    """A policy and where it stands: ``NetworkPolicy db/in (db.yaml:3)``."""
    where = f" ({policy.where})" if str(policy.where) else ""
    return f"{policy.kind} {policy.title}{where}"


def applied(
    changes: tuple[Change, ...], policies: PolicySet, snapshot: Snapshot
) -> tuple[PolicySet, Snapshot]:
    """Both, with the changes made; neither is changed itself. Changes of one policy refer to it as it was."""
    changed = {_key(policy): policy for policy in policies.policies}
    endpoints = list(snapshot.endpoints)
    added: list[Policy] = []
    for change in changes:
        if isinstance(change, ChangeLabels):
            endpoints = [_labelled(endpoint, change) for endpoint in endpoints]
            continue
        if isinstance(change, AddPolicy):
            added.append(change.policy)
            continue
        policy = changed[_key(change.policy)]
        rules = list(policy.rules(change.direction) or ())
        if isinstance(change, AddRule):
            rules.insert(change.index, change.snippet.rule)
        else:
            del rules[change.index]
        if change.direction is Direction.INGRESS:
            changed[_key(policy)] = replace(policy, ingress=tuple(rules))
        else:
            changed[_key(policy)] = replace(policy, egress=tuple(rules))
    return (
        replace(policies, policies=(*(changed[_key(policy)] for policy in policies.policies), *added)),
        replace(snapshot, endpoints=tuple(endpoints)),
    )


def _labelled(endpoint: Endpoint, change: ChangeLabels) -> Endpoint:
    """The workload that is meant with its new labels; a node or a set may have the same name."""
    if endpoint.kind is not EndpointKind.WORKLOAD or endpoint.title != change.endpoint:
        return endpoint
    labels = {**endpoint.labels, **change.labels}
    return replace(endpoint, labels={key: value for key, value in labels.items() if value is not None})


def _key(policy: Policy) -> tuple[str, str, str, str]:
    return (policy.kind, policy.tier, policy.namespace, policy.name)


def options(
    decision: Decision, near: tuple[tuple[Policy, int, Rule], ...], flow: Flow, world: World
) -> Iterator[Change]:
    """Changes that may let this side's denied flow pass, the smallest first.

    ``near``: the rules of the deciding tier, nearest first. The last option is a rule that allows just this
    flow, which always does on this side.
    """
    if decision.policy is not None and decision.policy.kind == OF_NETWORK:
        yield _selecting(decision, flow, world)
        return
    if decision.policy is not None and decision.index is not None:
        yield LiftRule(policy=decision.policy, direction=decision.direction, index=decision.index)
        yield _allowing(decision, decision.policy, decision.index, flow, world)
        return
    own, other = sides(flow, decision.direction)
    peer = world.workload(other)
    for _, _, rule in near:
        if rule.action is Action.ALLOW and peer is not None and not rule_traffic_lacks(rule, flow, world):
            yield from _labels_for(rule, own, other, peer, world)
    policies = [policy for policy, _, _ in near]
    policies += [
        p for p in decision.selected_by if decision.tier is not None and p.tier == decision.tier.name
    ]
    if policies:
        rules = policies[0].rules(decision.direction) or ()
        yield _allowing(decision, policies[0], len(rules), flow, world)


def _labels_for(rule: Rule, own: str, other: str, peer: Endpoint, world: World) -> Iterator[Change]:
    """Labels with which ``peer`` would be one of the rule's."""
    wishes = []
    for each in rule.peers or ():
        alone = replace(rule, peers=(replace(each, selector=None),))
        if each.selector is None or rule_peer_lacks(alone, own, other, world):
            continue
        wish = wished(each.selector, peer.labels)
        if wish:
            wishes.append(wish)
    for wish in sorted(wishes, key=lambda wish: (len(wish), any(wish[key] is None for key in wish))):
        yield ChangeLabels(endpoint=peer.title, labels=wish)


def wished(expr: Expr, labels: Labels, want: bool = True) -> dict[str, str | None] | None:
    """The changes of an endpoint's own labels that make ``expr`` true (``want``) or false; None: none do."""
    if matches(expr, labels) is want:
        return {}
    match expr:
        case In(key, values):
            return _own(key, min(values, default=None) if want else None, want)
        case Has(key):
            return _own(key, _ANY_VALUE if want else None, want)
        case Contains(key, text) | StartsWith(key, text) | EndsWith(key, text):
            return _own(key, text if want else None, want)
        case Not(term):
            return wished(term, labels, not want)
        case And(terms):
            return _all(terms, labels, want) if want else _any(terms, labels, want)
        case Or(terms):
            return _any(terms, labels, want) if want else _all(terms, labels, want)
        case Everything():
            return None


def _own(key: str, value: str | None, want: bool) -> dict[str, str | None] | None:
    """That change, if the key is the endpoint's own to set."""
    if ":" in key or key.startswith(IMPLIED) or (want and value is None):
        return None
    return {key: value}


def _all(terms: tuple[Expr, ...], labels: Labels, want: bool) -> dict[str, str | None] | None:
    found: dict[str, str | None] = {}
    for term in terms:
        now = {key: value for key, value in {**labels, **found}.items() if value is not None}
        wish = wished(term, now, want)
        if wish is None:
            return None
        found |= wish
    now = {key: value for key, value in {**labels, **found}.items() if value is not None}
    return found if all(matches(term, now) is want for term in terms) else None


def _any(terms: tuple[Expr, ...], labels: Labels, want: bool) -> dict[str, str | None] | None:
    ways = [wish for term in terms if (wish := wished(term, labels, want)) is not None]
    return min(ways, key=len, default=None)


def _allowing(decision: Decision, policy: Policy, index: int, flow: Flow, world: World) -> AddRule:
    """A rule in ``policy`` for just this flow, as narrow as its kind can say it."""
    _, other = sides(flow, decision.direction)
    snippet = allowing(policy.kind, decision.direction, other, flow, world)
    return AddRule(policy=policy, direction=decision.direction, index=index, snippet=snippet)


def _selecting(decision: Decision, flow: Flow, world: World) -> AddPolicy:
    """A NetworkPolicy that selects the endpoint, so that its network's isolation has no say in the flow."""
    _, other = sides(flow, decision.direction)
    endpoint, ingress = decision.endpoint, decision.direction is Direction.INGRESS
    snippet = allowing("NetworkPolicy", decision.direction, other, flow, world)
    own = (In(key, frozenset({value})) for key, value in endpoint.labels.items() if ":" not in key)
    policy = Policy(
        kind="NetworkPolicy",
        namespace=endpoint.namespace,
        name=endpoint.name,
        tier=DEFAULT.name,
        order=KUBERNETES_ORDER,
        subject=both(In(NAMESPACE_PREFIX + NAMESPACE_NAME, frozenset({endpoint.namespace})), *own),
        ingress=(snippet.rule,) if ingress else None,
        egress=None if ingress else (snippet.rule,),
    )
    return AddPolicy(policy=policy, direction=decision.direction, snippet=snippet)
