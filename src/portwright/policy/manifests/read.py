"""Manifests to the rule model: all of them, or an error and nothing.

What endpoints there are comes first, Namespaces and ServiceAccounts before Pods, whose labels take in those
of the former; then policies. Each kind has one converter, found by its apiVersion and kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeVar

import msgspec

from portwright.model.errors import InvalidInput
from portwright.policy.labels import NAMESPACE_NAME
from portwright.policy.lint import Lint, lint
from portwright.policy.manifests import admin, calico, cluster, kubernetes
from portwright.policy.manifests.convert import Context, Converted, Converter
from portwright.policy.manifests.documents import Document, steps
from portwright.policy.manifests.fields import metadata_labels
from portwright.policy.manifests.shelf import Shelf
from portwright.policy.rules import BUILT_IN_TIERS, Endpoint, Policy, PolicySet, Snapshot, Tier

DEFAULT_NAMESPACE: Final = "default"

Result = TypeVar("Result")

#: What is no policy but what policies are about.
_CLUSTER_KINDS = ("Namespace", "Node", "Pod", "ServiceAccount")
#: Which of them have no namespace.
_CLUSTER_WIDE = frozenset({"Namespace", "Node"})

_CALICO_CLUSTER_WIDE = frozenset(
    {"GlobalNetworkPolicy", "GlobalNetworkSet", "HostEndpoint", "StagedGlobalNetworkPolicy", "Tier"}
)

_CONVERTERS: dict[tuple[str, str], Converter] = {**kubernetes.KINDS, **admin.KINDS, **calico.KINDS}


class Manifests(msgspec.Struct, frozen=True, kw_only=True):
    """What the files say. ``snapshot`` has the endpoints that they describe, sorted.

    ``namespaces``: labels by name, of those too that are only named. ``warnings``: what the policies say that
    was hardly meant (see :mod:`portwright.policy.lint`).
    """

    policy_set: PolicySet
    snapshot: Snapshot
    namespaces: dict[str, dict[str, str]]
    warnings: tuple[Lint, ...] = ()


def read(
    files: Iterable[tuple[str, str]], known: Iterable[Endpoint] = (), *, shelf: Shelf | None = None
) -> Manifests:
    """The manifests in these texts, each with its file's name.

    ``known``: endpoints beside those of the manifests (live ports), whom the warnings count as there; the
    result's snapshot is without them. ``shelf``: what is kept of these files from one time to the next.

    Raises InvalidInput, its field ``file:line: Kind name: path``, for the first thing that can't be honoured.
    """
    files = list(files)
    shelf = shelf or Shelf(0)
    shelf.keep({name for name, _ in files})
    documents = [document for name, text in files for document in shelf.documents(text, name)]
    for document in documents:
        _known(document)
    _unique(documents)
    of_kind: dict[str, list[Document]] = {kind: [] for kind in _CLUSTER_KINDS}
    policies: list[Document] = []
    for document in documents:
        place = of_kind[document.kind] if document.api_version == "v1" else policies
        place.append(document)
    world = _world(of_kind, documents)
    endpoints = [_told(document, lambda d: cluster.pod(d, world)) for document in of_kind["Pod"]]
    _no_shared_address(of_kind["Pod"], endpoints)
    endpoints += [_told(document, cluster.node) for document in of_kind["Node"]]
    implied = {name: {**labels, cluster.CALICO_NAME: name} for name, labels in world.namespaces.items()}
    converted = [(document, _converted(document, implied, shelf)) for document in policies]
    for _, part in converted:
        endpoints += part.endpoints
    tiers = _tiers(converted)
    snapshot = Snapshot(endpoints=tuple(sorted(endpoints, key=_endpoint_key)))
    entries = [entry for document, part in converted for entry in shelf.entries(document, part)]
    return Manifests(
        policy_set=PolicySet(tiers=tiers, policies=_sorted(converted, tiers)),
        snapshot=snapshot,
        namespaces=world.namespaces,
        warnings=lint(entries, Snapshot(endpoints=(*snapshot.endpoints, *known))),
    )


def _endpoint_key(endpoint: Endpoint) -> tuple[str, str, str]:
    return (endpoint.kind, endpoint.namespace, endpoint.name)


def _known(document: Document) -> None:
    """Raise unless there is a converter."""
    if document.api_version == "v1" and document.kind in _CLUSTER_KINDS:
        return
    if (document.api_version, document.kind) in _CONVERTERS:
        return
    versions = sorted(version for version, kind in _understood() if kind == document.kind)
    if versions:
        why = f"{document.kind} is understood as {' or '.join(versions)}"
        raise _at(document, "apiVersion", document.api_version, why)
    kinds = ", ".join(sorted({kind for _, kind in _understood()}))
    raise _at(document, "kind", f"{document.api_version} {document.kind}", f"understood are {kinds}")


def _understood() -> Iterator[tuple[str, str]]:
    yield from _CONVERTERS
    yield from (("v1", kind) for kind in _CLUSTER_KINDS)


def _at(document: Document, field: str, value: object, why: str) -> InvalidInput:
    place = f"{document.file}:{document.line(steps(field))}"
    return InvalidInput(f"{place}: {document.title}: {field}", value, why)


def _told(document: Document, convert: Callable[[Document], Result]) -> Result:
    """What the converter gives; its error tells the file, the line and the object too."""
    try:
        return convert(document)
    except InvalidInput as error:
        raise _at(document, error.field, error.value, error.why) from error


def _converted(document: Document, namespaces: dict[str, dict[str, str]], shelf: Shelf) -> Converted:
    """What a policy, a tier or a set becomes; of the other manifests, its namespace's labels alone matter."""
    of_namespace = {} if _cluster_wide(document) else namespaces[document.namespace or DEFAULT_NAMESPACE]
    context = Context(of_namespace, DEFAULT_NAMESPACE)
    convert = _CONVERTERS[document.api_version, document.kind]
    return shelf.converted(document, context, lambda: _told(document, lambda d: convert(d, context)))


def _group(document: Document) -> str:
    """The API group; Calico's two are one, as written and as stored."""
    group, slash, _ = document.api_version.partition("/")
    return group.removeprefix("crd.") if slash else ""


def _unique(documents: list[Document]) -> None:
    """Raise if an object is given twice."""
    seen: dict[tuple[str, str, str, str], Document] = {}
    for document in documents:
        namespace = document.namespace or ("" if _cluster_wide(document) else DEFAULT_NAMESPACE)
        key = (_group(document), document.kind, namespace, document.name)
        first = seen.setdefault(key, document)
        if first is not document:
            raise _at(
                document, "metadata.name", document.name, f"it stands in {first.where(())} too; keep one"
            )


def _cluster_wide(document: Document) -> bool:
    """Whether its kind has no namespace."""
    if document.api_version == "v1":
        return document.kind in _CLUSTER_WIDE
    return _group(document) == admin.GROUP or document.kind in _CALICO_CLUSTER_WIDE


def _world(of_kind: dict[str, list[Document]], documents: list[Document]) -> cluster.Cluster:
    """Namespaces and service accounts; a namespace that is only named has only its name."""
    for document in of_kind["Namespace"] + of_kind["Node"]:
        if document.namespace:
            why = f"a {document.kind} has no namespace; leave it out"
            raise _at(document, "metadata.namespace", document.namespace, why)
    namespaces = {d.name: _told(d, cluster.namespace_labels) for d in of_kind["Namespace"]}
    for document in documents:
        if not _cluster_wide(document):
            name = document.namespace or DEFAULT_NAMESPACE
            namespaces.setdefault(name, {NAMESPACE_NAME: name})
    accounts = {
        (document.namespace or DEFAULT_NAMESPACE, document.name): _told(document, metadata_labels)
        for document in of_kind["ServiceAccount"]
    }
    return cluster.Cluster(dict(sorted(namespaces.items())), accounts, DEFAULT_NAMESPACE)


def _no_shared_address(documents: list[Document], endpoints: list[Endpoint]) -> None:
    """Raise if two pods have one address, since nobody could tell whose policy holds."""
    owners: dict[str, Endpoint] = {}
    for document, endpoint in zip(documents, endpoints, strict=True):
        for address in () if endpoint.host_network else endpoint.addresses:
            other = owners.setdefault(address, endpoint)
            if other is not endpoint:
                raise _at(document, "status.podIP", address, f"{other.title} has this address too; keep one")


def _tiers(converted: list[tuple[Document, Converted]]) -> tuple[Tier, ...]:
    """The built-in tiers and the given ones, in order. Raises if a policy names another."""
    tiers = {tier.name: tier for tier in BUILT_IN_TIERS}
    for _, part in converted:
        tiers |= {tier.name: tier for tier in part.tiers}
    for document, part in converted:
        for policy in part.policies:
            if policy.tier not in tiers:
                raise _at(document, "spec.tier", policy.tier, f"no such tier; there are {', '.join(tiers)}")
    return tuple(sorted(tiers.values(), key=lambda tier: (tier.order, tier.name)))


def _sorted(converted: list[tuple[Document, Converted]], tiers: tuple[Tier, ...]) -> tuple[Policy, ...]:
    place = {tier.name: index for index, tier in enumerate(tiers)}
    found = [policy for _, part in converted for policy in part.policies]
    return tuple(sorted(found, key=lambda p: (place[p.tier], p.order, p.name, p.namespace, p.kind)))
