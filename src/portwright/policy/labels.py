"""Label expressions: one small algebra for every manifest's selectors.

An endpoint has one flat set of labels. Those of the pod itself, or of a Calico endpoint, stand under
their own keys; its namespace's under ``ns:`` + key, its service account's under ``sa:`` + key. A colon is
no part of a label's name (Kubernetes: ``[A-Za-z0-9-_./]``), so no pod can claim its namespace's labels. A
port may be labelled with any key; those with a colon are not policy's (manifests/cluster.py).

The operators are apimachinery's and Calico's, who agree: ``NotIn`` and ``!=`` are true where the key is
absent, ``In`` and the string operators are false there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import msgspec

Labels: TypeAlias = Mapping[str, str]

#: Where a namespace's and a service account's labels stand in an endpoint's.
NAMESPACE_PREFIX = "ns:"
SERVICE_ACCOUNT_PREFIX = "sa:"
#: The label that every namespace carries (Kubernetes 1.21).
NAMESPACE_NAME = "kubernetes.io/metadata.name"


class Everything(msgspec.Struct, frozen=True, tag="all"):
    """True of every endpoint: ``{}``, ``all()``."""


class Has(msgspec.Struct, frozen=True, tag="has"):
    """The key is there, whatever its value: ``Exists``, ``has(k)``."""

    key: str


class In(msgspec.Struct, frozen=True, tag="in"):
    """The key is there with one of these values: ``In``, ``k == 'v'``, ``matchLabels``."""

    key: str
    values: frozenset[str]


class Contains(msgspec.Struct, frozen=True, tag="contains"):
    """The key is there and its value contains this text."""

    key: str
    text: str


class StartsWith(msgspec.Struct, frozen=True, tag="starts"):
    """The key is there and its value starts with this text."""

    key: str
    text: str


class EndsWith(msgspec.Struct, frozen=True, tag="ends"):
    """The key is there and its value ends with this text."""

    key: str
    text: str


class Not(msgspec.Struct, frozen=True, tag="not"):
    """``DoesNotExist`` is Not(Has), ``NotIn`` and ``!=`` are Not(In)."""

    term: Expr


class And(msgspec.Struct, frozen=True, tag="and"):
    """All of them; of none: true."""

    terms: tuple[Expr, ...]


class Or(msgspec.Struct, frozen=True, tag="or"):
    """One of them at least; of none: false."""

    terms: tuple[Expr, ...]


Expr: TypeAlias = Everything | Has | In | Contains | StartsWith | EndsWith | Not | And | Or

EVERYTHING = Everything()
NOTHING = Or(())


def matches(expr: Expr, labels: Labels) -> bool:
    """Whether ``expr`` is true of an endpoint with these labels."""
    match expr:
        case Everything():
            return True
        case Has(key):
            return key in labels
        case In(key, values):
            return labels.get(key) in values
        case Contains(key, text):
            return text in labels.get(key, "") and key in labels
        case StartsWith(key, text):
            return key in labels and labels[key].startswith(text)
        case EndsWith(key, text):
            return key in labels and labels[key].endswith(text)
        case Not(term):
            return not matches(term, labels)
        case And(terms):
            return all(matches(term, labels) for term in terms)
        case Or(terms):
            return any(matches(term, labels) for term in terms)


def both(*terms: Expr) -> Expr:
    """Their conjunction, without what says nothing."""
    left = tuple(term for term in terms if not isinstance(term, Everything))
    if not left:
        return EVERYTHING
    return left[0] if len(left) == 1 else And(left)
