"""What every kind's converter is given and gives.

A converter reads one document strictly: it raises InvalidInput with the field's dotted path in the document
(``spec.ingress[0].from``) and the way out. The reader adds the file, the line and the object's title.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import msgspec

from portwright.model.errors import InvalidInput
from portwright.policy.manifests.documents import Document
from portwright.policy.rules import Endpoint, OnChange, Policy, Tier

#: The annotation, on any kind of policy, that says what its change means for open flows.
ON_CHANGE: Final = "portwright.dev/on-change"


class Context(msgspec.Struct, frozen=True):
    """What the other manifests say of the world of one document, and all that a converter sees of them.

    ``namespace_labels``: those of the document's namespace, among them Calico's ``projectcalico.org/name``;
    of an object that has no namespace, none. ``default_namespace``: where an object is that names none.
    """

    namespace_labels: dict[str, str]
    default_namespace: str = "default"

    def namespace_of(self, document: Document) -> str:
        """The namespace of an object of a namespaced kind."""
        return document.namespace or self.default_namespace


class Converted(msgspec.Struct, frozen=True):
    """What a document becomes."""

    policies: tuple[Policy, ...] = ()
    tiers: tuple[Tier, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()


Converter: TypeAlias = Callable[[Document, Context], Converted]


def on_change(document: Document) -> OnChange:
    """What the policy's annotation asks for; RECHECK without it. Raises InvalidInput for an unknown value."""
    annotations = document.body["metadata"].get("annotations")
    value = annotations.get(ON_CHANGE) if isinstance(annotations, dict) else None
    if value is None:
        return OnChange.RECHECK
    if value not in tuple(OnChange):
        choices = ", ".join(OnChange)
        raise InvalidInput(f"metadata.annotations.{ON_CHANGE}", value, f"one of: {choices}")
    return OnChange(value)
