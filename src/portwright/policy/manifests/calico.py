"""Calico's kinds: policies, tiers, network sets, host endpoints and staged policies.

``projectcalico.org/v3``, and the same objects as ``crd.projectcalico.org/v1`` stores them (an export of a
cluster's own resources): there the name, labels and annotations that the user wrote stand in an annotation.

Semantics: reference/policy.md, 1.4. Whatever a manifest asks that is not done here is an InvalidInput.
A policy that has nothing but Log rules isolates, as it does in Calico.
"""

from __future__ import annotations

import math
import re
from typing import Any, Final

import msgspec

from portwright.model.errors import InvalidInput
from portwright.policy import selector as selectors
from portwright.policy.labels import Expr, Has, In, both
from portwright.policy.manifests import calico_hosts, kubernetes
from portwright.policy.manifests.calico_rules import no_namespace, path, read_rules, text
from portwright.policy.manifests.convert import Context, Converted, Converter, on_change
from portwright.policy.manifests.documents import Document
from portwright.policy.manifests.fields import Field, root, spec_of
from portwright.policy.rules import (
    BUILT_IN_TIERS,
    DEFAULT,
    Action,
    Direction,
    Policy,
    Rule,
    StagedAction,
    Tier,
)

V3: Final = "projectcalico.org/v3"
STORED: Final = "crd.projectcalico.org/v1"

#: Kubernetes has a NetworkPolicy too, and both may have one name in one namespace.
_KINDS_FOR_PEOPLE: Final = {"NetworkPolicy": "CalicoNetworkPolicy"}
_STORED_METADATA: Final = "projectcalico.org/metadata"
_TIER_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_COMMON = (
    "tier",
    "order",
    "selector",
    "serviceAccountSelector",
    "types",
    "ingress",
    "egress",
    "performanceHints",
)
_GLOBAL = (*_COMMON, "namespaceSelector", "applyOnForward", "preDNAT", "doNotTrack")


def network_policy(document: Document, context: Context) -> Converted:
    """A NetworkPolicy: of its namespace's workloads."""
    return _namespaced(document, context, staged=False)


def staged_network_policy(document: Document, context: Context) -> Converted:
    """The same as a dry run."""
    return _namespaced(document, context, staged=True)


def global_network_policy(document: Document, context: Context) -> Converted:
    """A GlobalNetworkPolicy: of workloads everywhere and of host endpoints."""
    del context
    return _global(document, staged=False)


def staged_global_network_policy(document: Document, context: Context) -> Converted:
    """The same as a dry run."""
    del context
    return _global(document, staged=True)


def staged_kubernetes_network_policy(document: Document, context: Context) -> Converted:
    """Kubernetes' NetworkPolicy as a dry run."""
    spec = root(document).get("spec") or Field(document, ("spec",), {})
    action = _staged_action(spec)
    body = dict(document.body)
    body["spec"] = {key: value for key, value in spec.mapping().items() if key != "stagedAction"}
    converted = kubernetes.network_policy(msgspec.structs.replace(document, body=body), context)
    return Converted(
        policies=tuple(
            _without_rules(msgspec.structs.replace(policy, kind=document.kind, staged=True), action)
            for policy in converted.policies
        )
    )


def tier(document: Document, context: Context) -> Converted:
    """A Tier. The built-in ones may be written too, as they are."""
    del context
    no_namespace(document)
    spec = spec_of(document, "order", "defaultAction")
    if not _TIER_NAME.fullmatch(document.name):
        raise InvalidInput(
            "metadata.name", document.name, "a tier's name has lower case letters, digits and '-', at most 63"
        )
    default = spec.get("defaultAction")
    given = Tier(
        name=document.name,
        order=_order(spec),
        default=Action.PASS
        if default is not None and default.choice("Deny", "Pass") == "Pass"
        else Action.DENY,
    )
    for built_in in BUILT_IN_TIERS:
        if given.name == built_in.name and given != built_in:
            raise spec.refuse(
                f"tier {given.name} always has order {built_in.order:.0f} and defaultAction "
                f"{built_in.default.capitalize()}: write these, or leave the tier out"
            )
    return Converted(tiers=(given,))


def _namespaced(document: Document, context: Context, *, staged: bool) -> Converted:
    spec = spec_of(document, *_COMMON, *(["stagedAction"] if staged else []))
    namespace = context.namespace_of(document)
    terms: list[Expr] = [In(selectors.NAMESPACE_KEY, frozenset({namespace}))]
    if selector := text(spec, "selector"):
        terms.append(selectors.parse(selector, path(spec, "selector")))
    if accounts := text(spec, "serviceAccountSelector"):
        terms.append(selectors.parse_service_account(accounts, path(spec, "serviceAccountSelector")))
    policy = _policy(document, spec, both(*terms), namespace, staged=staged)
    return Converted(policies=(policy,))


def _global(document: Document, *, staged: bool) -> Converted:
    no_namespace(document)
    spec = spec_of(document, *_GLOBAL, *(["stagedAction"] if staged else []))
    terms: list[Expr] = []
    if selector := text(spec, "selector"):
        terms.append(selectors.parse(selector, path(spec, "selector")))
    if namespaces := text(spec, "namespaceSelector"):
        if "global(" in namespaces:
            field = spec.need("namespaceSelector")
            raise field.refuse("global() has a meaning in a rule alone; here, select hosts by their labels")
        terms.append(selectors.parse_namespace(namespaces, path(spec, "namespaceSelector")))
    if accounts := text(spec, "serviceAccountSelector"):
        every = Has(selectors.CALICO_SERVICE_ACCOUNT)
        where = path(spec, "serviceAccountSelector")
        terms.append(selectors.parse_service_account(accounts, where, every))
    policy = _policy(document, spec, both(*terms), "", staged=staged)
    forward, pre_dnat, untracked = (_flag(spec, key) for key in ("applyOnForward", "preDNAT", "doNotTrack"))
    if pre_dnat and untracked:
        raise spec.need("preDNAT").refuse("preDNAT and doNotTrack exclude each other: write two policies")
    if (pre_dnat or untracked) and not forward:
        name = "preDNAT" if pre_dnat else "doNotTrack"
        raise spec.need(name).refuse("this needs applyOnForward: true beside it")
    if pre_dnat and policy.egress is not None:
        raise spec.need("preDNAT").refuse(
            "a preDNAT policy is of ingress only: leave out egress, and its type"
        )
    return Converted(
        policies=(
            msgspec.structs.replace(
                policy, apply_on_forward=forward, pre_dnat=pre_dnat, do_not_track=untracked
            ),
        )
    )


def _policy(document: Document, spec: Field, subject: Expr, namespace: str, *, staged: bool) -> Policy:
    """What all policies have in common."""
    action = _staged_action(spec) if staged else StagedAction.SET
    _performance_hints(spec.get("performanceHints"))
    ingress, egress = (read_rules(spec, direction, namespace) for direction in Direction)
    types = _types(spec.get("types"), bool(ingress), bool(egress))
    policy = Policy(
        kind=_KINDS_FOR_PEOPLE.get(document.kind, document.kind),
        name=document.name,
        namespace=namespace,
        tier=text(spec, "tier") or DEFAULT.name,
        order=_order(spec),
        subject=subject,
        ingress=_of_type(spec, "Ingress", types, ingress),
        egress=_of_type(spec, "Egress", types, egress),
        on_change=on_change(document),
        staged=staged,
        where=document.where(()),
    )
    return _without_rules(policy, action)


def _types(field: Field | None, ingress: bool, egress: bool) -> frozenset[str]:
    """The directions that the policy is about; if it doesn't say, those of its rules, or ingress."""
    items = field.items(2) if field is not None else []
    if not items:
        return frozenset(
            name for name, holds in (("Ingress", ingress or not egress), ("Egress", egress)) if holds
        )
    found = [item.choice("Ingress", "Egress") for item in items]
    if len(set(found)) != len(found):
        raise items[-1].refuse("this type stands here twice: keep one")
    return frozenset(found)


def _of_type(
    spec: Field, name: str, types: frozenset[str], rules: tuple[Rule, ...]
) -> tuple[Rule, ...] | None:
    if name in types:
        return rules
    if rules:
        field = spec.need(name.lower())
        raise InvalidInput(
            path(spec, name.lower()),
            f"{len(field.items())} rules",
            f"types lacks {name}, so none of them would count: add it, or leave them out",
        )
    return None


def _order(spec: Field) -> float:
    """The order; without one, after all that have one."""
    field = spec.get("order")
    if field is None:
        return math.inf
    if isinstance(field.value, bool) or not isinstance(field.value, int | float):
        raise field.refuse("a number is needed here")
    return float(field.value)


def _flag(spec: Field, name: str) -> bool:
    field = spec.get(name)
    return field.boolean() if field is not None else False


def _staged_action(spec: Field) -> StagedAction:
    """What is staged. A deletion says nothing but the tier, in which both policies are."""
    field = spec.get("stagedAction")
    action = StagedAction(field.choice(*StagedAction)) if field is not None else StagedAction.SET
    if action is StagedAction.DELETE:
        for name in spec.mapping():
            if name not in {"stagedAction", "tier"} and (said := spec.get(name)) is not None:
                raise said.refuse("stagedAction is Delete, which needs the name alone; leave this out")
    return action


def _without_rules(policy: Policy, action: StagedAction) -> Policy:
    """The policy with its staged action; one that stages a deletion selects nobody for anything."""
    if action is StagedAction.DELETE:
        policy = msgspec.structs.replace(policy, ingress=None, egress=None)
    return msgspec.structs.replace(policy, staged_action=action)


def _performance_hints(field: Field | None) -> None:
    """Checked and done with: by their definition hints never change what a policy means."""
    for item in field.items() if field is not None else []:
        item.choice("AssumeNeededOnEveryNode")


def _stored(convert: Converter) -> Converter:
    """The converter of the same object as ``crd.projectcalico.org/v1`` stores it."""

    def converted(document: Document, context: Context) -> Converted:
        return convert(_as_written(document), context)

    return converted


def _as_written(document: Document) -> Document:
    """The object as its user wrote it: the name, labels and annotations in the annotation that keeps them.

    Older Calico had no such annotation, and stored policies of the default tier as ``default.NAME``.
    """
    metadata = document.body["metadata"]
    fields = root(document).need("metadata")
    annotations = _mapping(fields, "annotations")
    kept: dict[str, Any] = {}
    if _STORED_METADATA in annotations:
        given = annotations.pop(_STORED_METADATA)
        field = f"metadata.annotations.{_STORED_METADATA}"
        try:
            kept = msgspec.json.decode(given, type=dict[str, Any])
        except (msgspec.MsgspecError, TypeError, UnicodeError, RecursionError):
            raise InvalidInput(field, given, "expected the JSON that Calico keeps here") from None
        for key in ("labels", "annotations"):
            if not isinstance(kept.get(key), dict | None):
                raise InvalidInput(field, given, f"{key} is a mapping")
    name = kept.get("name") or document.name
    spec = document.body.get("spec")
    tier_name = spec.get("tier") if isinstance(spec, dict) else None
    if not kept.get("name") and document.kind.endswith("Policy") and tier_name in (None, "", DEFAULT.name):
        name = document.name.removeprefix("default.") or document.name
    if not isinstance(name, str):
        raise InvalidInput("metadata.name", name, "a name is text")
    body = dict(document.body)
    body["metadata"] = {
        **metadata,
        "name": name,
        "labels": {**_mapping(fields, "labels"), **(kept.get("labels") or {})},
        "annotations": {**annotations, **(kept.get("annotations") or {})},
    }
    return msgspec.structs.replace(document, name=name, body=body)


def _mapping(fields: Field, name: str) -> dict[str, Any]:
    field = fields.get(name)
    return dict(field.mapping()) if field is not None else {}


_OF_V3: Final[dict[str, Converter]] = {
    "NetworkPolicy": network_policy,
    "GlobalNetworkPolicy": global_network_policy,
    "StagedNetworkPolicy": staged_network_policy,
    "StagedGlobalNetworkPolicy": staged_global_network_policy,
    "StagedKubernetesNetworkPolicy": staged_kubernetes_network_policy,
    "Tier": tier,
    "NetworkSet": calico_hosts.network_set,
    "GlobalNetworkSet": calico_hosts.global_network_set,
    "HostEndpoint": calico_hosts.host_endpoint,
}

#: The converter of each kind, by apiVersion and kind.
KINDS: Final[dict[tuple[str, str], Converter]] = {
    **{(V3, kind): convert for kind, convert in _OF_V3.items()},
    **{(STORED, kind): _stored(convert) for kind, convert in _OF_V3.items()},
}
