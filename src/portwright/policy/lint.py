"""Manifests that say something else than was meant: the classic mistakes, each with the exact way to mend it.

A lint is no error: what it is about is valid and does what the specification says. Those that ask who is
selected look at the snapshot, and keep silent where it has no pods: nothing is known then.
"""

from __future__ import annotations

from collections.abc import Sequence

from portwright.policy.lints.entry import KUBERNETES, Entry, Lint
from portwright.policy.lints.selected import named_ports, nobody
from portwright.policy.lints.together import dns, equal_priorities, excepts, whose_names
from portwright.policy.lints.written import written
from portwright.policy.population import Population
from portwright.policy.rules import EndpointKind, Snapshot

__all__ = ["Entry", "Lint", "lint"]


def lint(entries: Sequence[Entry], snapshot: Snapshot) -> tuple[Lint, ...]:
    """All that is to be said of these policies, by file, line and code."""
    world = Population(
        [end for end in snapshot.endpoints if end.kind is not EndpointKind.NODE and not end.host_network]
    )
    on_host = Population([end for end in snapshot.endpoints if end.host_network])
    found: list[Lint] = []
    for entry in entries:
        found += entry.once(_form)
        found += nobody(entry, world, on_host)
        found += named_ports(entry, world)
    found += dns(entries, world)
    found += whose_names(entries, world)
    found += excepts(entries, world)
    found += equal_priorities(entries, world)
    return tuple(sorted(set(found), key=lambda one: (one.where.file, one.where.line, one.code, one.text)))


def _form(entry: Entry) -> tuple[Lint, ...]:
    return tuple(written(entry)) if entry.document.api_version == KUBERNETES else ()
