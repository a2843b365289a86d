"""What a lint is, and what it is about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import msgspec

from portwright.policy.manifests.documents import Document, Path, steps
from portwright.policy.rules import SCTP, TCP, UDP, Direction, Policy, Rule, Where

#: The one kind that has the forms and the defaults which mislead.
KUBERNETES: Final = "networking.k8s.io/v1"
#: Where Kubernetes' rules list their peers.
SIDES: Final = {Direction.INGRESS: "from", Direction.EGRESS: "to"}
PROTOCOL_NAMES: Final = {TCP: "TCP", UDP: "UDP", SCTP: "SCTP"}

Found = TypeVar("Found")


class Lint(msgspec.Struct, frozen=True):
    """One finding. ``code`` is stable; ``text`` says what the manifest means, ``fix`` what to change."""

    where: Where
    title: str
    code: str
    text: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.title}: {self.text}. {self.fix} [{self.code}]"


class Entry(msgspec.Struct, frozen=True, dict=True):
    """A policy and the document that it came from: the same one as long as both are the same."""

    document: Document
    policy: Policy

    def once(self, find: Callable[[Entry], Found]) -> Found:
        """What ``find`` says of this entry, which must be of nothing else; it is asked once."""
        known: dict[Callable[[Entry], Found], Found] = self.__dict__.setdefault("known", {})
        if find not in known:
            known[find] = find(self)
        return known[find]

    def lint(self, path: Path, code: str, text: str, fix: str) -> Lint:
        """A finding about the field at ``path``."""
        return Lint(self.document.where(path), self.document.title, code, text, fix)


def rules_of(policy: Policy) -> Iterator[tuple[Direction, int, Rule]]:
    """Its rules of both directions, each with its place."""
    for direction in Direction:
        for index, rule in enumerate(policy.rules(direction) or ()):
            yield direction, index, rule


def field_of(entry: Entry, rule: Rule, *below: str | int) -> Path:
    """The path of a rule's field, or of the rule where its manifest has no such field."""
    path = steps(rule.where.path)
    found: Any = entry.document.body
    for step in (*path, *below):
        try:
            found = found[step]
        except (KeyError, IndexError, TypeError):
            return path
    return (*path, *below)
